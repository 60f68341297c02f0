//! The numbers of pages that went of late: a bounded ring, oldest first, and an index. A page that
//! comes back leaves a gap. Takes about 17 bytes a ghost.

use super::index::Index;
use super::queue::Queue;
use crate::units::PageIndex;

/// A place in the ring that is empty; no page has this number.
const GAP: PageIndex = PageIndex(u64::MAX);
/// Sequence numbers wrap here, so that none is an index's mark of a free entry.
const WRAP: u32 = u32::MAX >> 1;

/// The ghosts. The ghost with sequence number `s` lies at `s - first` of the ring.
#[derive(Default)]
pub struct Ghosts {
    ring: Queue<PageIndex>,
    first: u32,
    index: Index,
}

fn page_at(ring: &Queue<PageIndex>, first: u32, sequence: u32) -> PageIndex {
    *ring.get((sequence.wrapping_sub(first) & WRAP) as usize).expect("an indexed ghost is in the ring")
}

impl Ghosts {
    /// Remembers a page, and at most `limit` in all.
    pub fn push(&mut self, page: PageIndex, limit: usize) {
        self.take(page);
        if limit > 0 {
            let sequence = self.first.wrapping_add(self.ring.len() as u32) & WRAP;
            self.ring.push(page);
            self.index.insert(page, sequence, |s| page_at(&self.ring, self.first, s));
        }
        while self.ring.len() > limit.min(WRAP as usize) {
            self.drop_oldest();
        }
    }

    /// Whether `page` was remembered; it is not any more.
    pub fn take(&mut self, page: PageIndex) -> bool {
        let place = self.index.remove(page, |s| page_at(&self.ring, self.first, s));
        if let Some(sequence) = place {
            let at = (sequence.wrapping_sub(self.first) & WRAP) as usize;
            *self.ring.get_mut(at).expect("an indexed ghost is in the ring") = GAP;
            while self.ring.oldest() == Some(&GAP) {
                self.drop_oldest();
            }
        }
        place.is_some()
    }

    /// Bytes on the heap.
    pub fn bytes(&self) -> usize {
        self.ring.bytes() + self.index.bytes()
    }

    fn drop_oldest(&mut self) {
        let Some(&page) = self.ring.oldest() else { return };
        if page != GAP {
            self.index.remove(page, |s| page_at(&self.ring, self.first, s));
        }
        self.ring.pop();
        self.first = self.first.wrapping_add(1) & WRAP;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against a plain list with gaps, starting just before the sequence numbers wrap.
        #[test]
        fn it_remembers_the_last_ones(ops in prop::collection::vec((0u64..30, any::<bool>()), 0..300), limit in 0usize..12) {
            let mut ghosts = Ghosts { first: WRAP - 5, ..Ghosts::default() };
            let mut model: Vec<Option<u64>> = Vec::new();
            for (number, push) in ops {
                let known = model.iter().position(|page| *page == Some(number));
                if let Some(at) = known {
                    model[at] = None;
                    let gaps = model.iter().take_while(|page| page.is_none()).count();
                    model.drain(..gaps);
                }
                if push {
                    ghosts.push(PageIndex(number), limit);
                    model.push(Some(number));
                    model.drain(..model.len().saturating_sub(limit));
                } else {
                    prop_assert_eq!(ghosts.take(PageIndex(number)), known.is_some());
                }
                prop_assert!(ghosts.ring.len() <= limit);
            }
        }
    }
}
