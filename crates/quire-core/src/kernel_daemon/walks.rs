//! Walks among the touches of one range: pages that came near those that came before, looks in a row.
//! No system calls: what a look has seen goes in, what it means comes out.

use crate::sys::memory::{HUGE_BYTES, Range};

/// Touches are near each other across this much: what the kernel maps around a fault where it is cached.
const NEAR: usize = 64 << 10;
/// A walk goes over so much at least, all at once or in so many looks, in which it touched so many bytes.
const LEAST_SPAN: usize = 256 << 10;
const LEAST_LOOKS: u32 = 4;
const LEAST_BYTES: usize = 64 << 10;
/// What came of a walk is at least this part of all that came in a look, and that part of what came all at
/// once: of many touches some are neighbours by chance.
const LEAST_PART: usize = 8;
const LEAST_PART_AT_ONCE: usize = 2;
/// Places that are remembered, and for how many looks a walk is that has stopped.
const KNOWN: usize = 16;
const STOPPED: u64 = 32;

/// Bytes that were touched at least, where so many got translations: a huge page of the page cache gets one
/// by one touch.
fn touched(run: &Range) -> usize {
    let whole = run.start.is_multiple_of(HUGE_BYTES) && run.len.is_multiple_of(HUGE_BYTES);
    if whole { run.len / HUGE_BYTES * NEAR } else { run.len }
}

/// A place where touches came, which becomes a walk when more come beside it.
#[derive(Clone, Debug)]
pub struct Walk {
    /// Addresses that were walked over.
    pub over: Range,
    /// The last touches were at the end rather than at the start.
    pub forward: bool,
    /// What is being read ahead of it: addresses, which may begin behind the walk's end.
    pub ahead: Option<Range>,
    touched: usize,
    /// Of these, in the last look that saw any, which was `seen`.
    touched_last: usize,
    goes_on: bool,
    looks: u32,
    seen: u64,
}

impl Walk {
    fn of(run: &Range, seen: u64) -> Walk {
        let (touched, looks) = (touched(run), 1);
        Walk {
            over: *run,
            forward: true,
            ahead: None,
            touched,
            touched_last: touched,
            goes_on: false,
            looks,
            seen,
        }
    }

    /// Whether it is one.
    pub fn is_walk(&self) -> bool {
        self.over.len >= LEAST_SPAN && self.touched >= LEAST_BYTES && self.goes_on
    }

    /// Judges what came in a look that saw so many bytes come.
    fn judge(&mut self, all: usize) {
        let part = if self.looks >= LEAST_LOOKS { LEAST_PART } else { LEAST_PART_AT_ONCE };
        let long = self.looks >= LEAST_LOOKS || self.touched >= LEAST_SPAN;
        self.goes_on = long && self.touched_last >= all / part;
    }

    fn is_near(&self, run: &Range) -> bool {
        run.start <= self.over.end() + NEAR && self.over.start <= run.end() + NEAR
    }

    fn extend(&mut self, run: &Range, seen: u64) {
        let (start, end) = (self.over.start.min(run.start), self.over.end().max(run.end()));
        self.forward = end > self.over.end() || (self.forward && start == self.over.start);
        self.over = Range { start, len: end - start };
        if self.seen < seen {
            (self.seen, self.looks, self.touched_last) = (seen, self.looks + 1, 0);
        }
        self.touched += touched(run);
        self.touched_last += touched(run);
    }
}

/// What a look has come to.
#[derive(Debug, Default)]
pub struct Noted {
    /// A walk went on.
    pub walking: bool,
    /// All that came went on where touches came before: what may become a walk has been over these addresses.
    pub beginning: Option<Range>,
    /// Touches that are near no others.
    pub scattered: usize,
    /// What was being read ahead of walks that are forgotten.
    pub in_vain: Vec<Range>,
}

/// The places of one range.
#[derive(Default)]
pub struct Walks {
    known: Vec<Walk>,
    looks: u64,
}

impl Walks {
    /// Takes the runs of pages that came since the last look, in order.
    pub fn note(&mut self, fresh: &[Range]) -> Noted {
        self.looks += 1;
        let mut noted = Noted::default();
        for run in fresh {
            match self.known.iter_mut().find(|walk| walk.is_near(run)) {
                Some(walk) => walk.extend(run, self.looks),
                None => self.known.push(Walk::of(run, self.looks)),
            }
        }
        let all: usize = fresh.iter().map(touched).sum();
        for walk in self.known.iter_mut().filter(|walk| walk.seen == self.looks) {
            walk.judge(all);
            if walk.is_walk() {
                noted.walking = true;
            } else {
                noted.scattered += usize::from(walk.looks == 1);
            }
        }
        let mut touched = self.known.iter().filter(|walk| walk.seen == self.looks);
        if let (Some(only), None) = (touched.next(), touched.next())
            && only.looks > 1
            && only.forward
            && !only.is_walk()
        {
            noted.beginning = Some(only.over);
        }
        self.forget(&mut noted.in_vain);
        noted
    }

    /// Keeps walks that go on, and the latest of the other places.
    fn forget(&mut self, in_vain: &mut Vec<Range>) {
        while self.known.len() > KNOWN {
            let now = self.looks;
            let worth = |walk: &Walk| (walk.is_walk() && walk.seen + STOPPED > now, walk.seen);
            let least = self.known.iter().enumerate().min_by_key(|(_, walk)| worth(walk));
            let Some(index) = least.map(|(index, _)| index) else { return };
            in_vain.extend(self.known.remove(index).ahead);
        }
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &Walk> {
        self.known.iter()
    }

    /// The walks that go forward.
    pub fn forward(&mut self) -> impl Iterator<Item = &mut Walk> {
        self.known.iter_mut().filter(|walk| walk.forward && walk.is_walk())
    }

    /// Takes away what is being read ahead.
    pub fn clear_ahead(&mut self) -> impl Iterator<Item = Range> {
        self.known.iter_mut().filter_map(|walk| walk.ahead.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    fn run(start: usize, pages: usize) -> Range {
        Range { start: start * PAGE, len: pages * PAGE }
    }

    #[test]
    fn much_at_once_is_a_walk() {
        assert!(Walks::default().note(&[run(100, 64)]).walking);
        let noted = Walks::default().note(&[run(100, 63)]);
        assert_eq!((noted.walking, noted.scattered), (false, 1));
    }

    #[test]
    fn a_huge_page_is_one_touch() {
        let noted = Walks::default().note(&[run(512, 512), run(4096, 512)]);
        assert_eq!((noted.walking, noted.scattered), (false, 2));
        assert!(Walks::default().note(&[run(512, 4 * 512)]).walking);
    }

    #[test]
    fn little_by_little_too_forward_and_backward() {
        for forward in [true, false] {
            let mut walks = Walks::default();
            let at = |step: usize| if forward { 1000 + step * 16 } else { 1000 - step * 16 };
            let noted: Vec<_> = (0..4).map(|step| walks.note(&[run(at(step), 16)]).walking).collect();
            assert_eq!(noted, [false, false, false, true]);
            assert_eq!(walks.forward().count(), usize::from(forward));
        }
    }

    #[test]
    fn the_beginning_of_a_walk_is_the_only_place_that_goes_on() {
        let mut walks = Walks::default();
        assert_eq!(walks.note(&[run(100, 1)]).beginning, None);
        assert_eq!(walks.note(&[run(101, 2)]).beginning, Some(run(100, 3)));
        assert_eq!(walks.note(&[run(103, 1), run(9000, 1)]).beginning, None); // not alone
        assert_eq!(walks.note(&[run(104, 60)]).beginning, None); // it is one
        assert_eq!(walks.note(&[run(5000, 1)]).beginning, None);
        assert_eq!(walks.note(&[run(4999, 1)]).beginning, None); // backward
    }

    #[test]
    fn every_fourth_page_is_a_walk() {
        let mut walks = Walks::default();
        let found = (0..32).find(|step| walks.note(&[run(1000 + step * 4, 1)]).walking);
        assert_eq!(found, Some(16)); // 64 KiB were touched, over 260 KiB
    }

    #[test]
    fn rows_here_and_there_are_none() {
        let mut state = 88172645463325252u64;
        // Rows in each look, and the pages that come of one: 16 where they were cached.
        for (rows, pages) in [(1, 1), (8, 1), (8, 16), (100, 16)] {
            let (mut walks, mut walking, mut scattered) = (Walks::default(), 0, 0);
            for _ in 0..1000 / rows {
                let random = || {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    state as usize % (1 << 16) / pages * pages // of 256 MiB
                };
                let mut touched: Vec<usize> = std::iter::repeat_with(random).take(rows).collect();
                touched.sort_unstable();
                touched.dedup();
                let runs: Vec<Range> = touched.into_iter().map(|page| run(page, pages)).collect();
                let noted = walks.note(&runs);
                walking += usize::from(noted.walking);
                scattered += noted.scattered;
            }
            assert_eq!(walking, 0, "{rows} rows of {pages}");
            assert!(scattered > 100, "{scattered}");
        }
    }

    #[test]
    fn a_walk_is_kept_among_scattered_touches_and_forgotten_when_it_has_stopped() {
        let mut walks = Walks::default();
        for step in 0..100 {
            let noted = walks.note(&[run(step * 16, 16), run(1 << 20 | step << 8, 1)]);
            assert_eq!(noted.walking, step >= 3, "{step}");
        }
        let ahead = run(1600, 100);
        walks.forward().for_each(|walk| walk.ahead = Some(ahead));
        let in_vain = (0..200).find_map(|step| {
            let gone = walks.note(&[run(1 << 22 | step << 8, 1)]).in_vain;
            (!gone.is_empty()).then_some(gone)
        });
        assert_eq!(in_vain, Some(vec![ahead]));
    }
}
