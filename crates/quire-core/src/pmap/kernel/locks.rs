//! What the program has locked in memory of a region: mremap(2), which covers and uncovers its pages, forgets it.

use super::Region;
use crate::sys::memory::Range;
use crate::sys::mmap;

/// Parts of a region that are locked, by where they begin in it.
#[derive(Clone, Debug, Default)]
pub struct Locks(Vec<Range>);

impl Locks {
    /// All of so many bytes.
    pub(super) fn of_all(bytes: usize) -> Locks {
        Locks(if bytes == 0 { Vec::new() } else { vec![Range { start: 0, len: bytes }] })
    }

    fn add(&mut self, part: Range) {
        self.remove(part);
        self.0.push(part);
    }

    fn remove(&mut self, part: Range) {
        let rests = |lock: &Range| {
            let below = (lock.start, lock.end().min(part.start));
            [below, (lock.start.max(part.end()), lock.end())]
        };
        let kept = self.0.iter().flat_map(rests).filter(|(start, end)| start < end);
        self.0 = kept.map(|(start, end)| Range { start, len: end - start }).collect();
    }

    /// What of it is in a part.
    fn within(&self, part: Range) -> impl Iterator<Item = Range> {
        self.0.iter().filter_map(move |lock| {
            let (start, end) = (lock.start.max(part.start), lock.end().min(part.end()));
            (start < end).then(|| Range { start, len: end - start })
        })
    }

    /// Takes away what lies behind a byte, of which it becomes the start.
    pub(super) fn split_off(&mut self, at: usize) -> Locks {
        let upper = Range { start: at, len: usize::MAX - at };
        let tail = self.within(upper).map(|lock| Range { start: lock.start - at, ..lock }).collect();
        self.remove(upper);
        Locks(tail)
    }
}

impl Region {
    fn part_of(&self, pages: Range) -> Range {
        Range { start: pages.start.wrapping_sub(self.range.start), len: pages.len }
    }

    /// Pages of it were locked.
    pub fn note_locked(&mut self, pages: Range) {
        self.locks.add(self.part_of(pages));
    }

    /// They no longer are.
    pub fn note_unlocked(&mut self, pages: Range) {
        self.locks.remove(self.part_of(pages));
    }

    fn locked_in(&self, pages: Range) -> impl Iterator<Item = Range> {
        let start = self.range.start;
        let within = self.locks.within(self.part_of(pages));
        within.map(move |part| Range { start: start + part.start, len: part.len })
    }

    /// Ends the locks of pages that are moved away, as they are counted.
    pub(super) fn loosen(&self, pages: Range) {
        self.locked_in(pages).for_each(|part| _ = mmap::unlock(part));
    }

    /// Locks again what is locked of pages that are back: as they are touched, if they are not there.
    pub(super) fn fasten(&self, pages: Range) {
        self.locked_in(pages).for_each(|part| _ = mmap::lock(part, true));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(start: usize, end: usize) -> Range {
        Range { start, len: end - start }
    }

    #[test]
    fn what_is_locked() {
        let mut locks = Locks::default();
        locks.add(part(10, 50));
        locks.add(part(40, 60));
        locks.remove(part(20, 30));
        assert_eq!(locks.0, [part(10, 20), part(30, 40), part(40, 60)]);
        assert_eq!(
            locks.within(part(15, 45)).collect::<Vec<_>>(),
            [part(15, 20), part(30, 40), part(40, 45)]
        );
        assert_eq!(locks.split_off(35).0, [part(0, 5), part(5, 25)]);
        assert_eq!(locks.0, [part(10, 20), part(30, 35)]);
    }
}
