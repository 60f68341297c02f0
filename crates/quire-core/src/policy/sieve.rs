//! SIEVE: pages in the order in which they came, and a hand that walks from old to new. It passes
//! over pages that were reused and takes the first that was not; what it passed stays where it is,
//! so new pages soon meet the hand (Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024).
//!
//! ```text
//!   oldest                                          newest
//!     ├── the hand's way ───────────────┬── young ──┤      young: at most FEW
//!          ▲ hand                       └ first young
//! ```
//!
//! Two things differ from the paper, as a pager's reference bit is set by the load itself: that bit
//! is taken before it can count as reuse, and the hand turns back before the newest pages. Of no
//! more than these, the oldest that was not referenced goes. In a pager that sees faults only, no
//! page is ever reused and this is a FIFO.

use super::list::List;
use super::marked::{USED, YOUNG};
use super::{FEW, Policy};
use crate::units::PageIndex;

/// The list and the hand. A place is one in the list.
#[derive(Default)]
pub struct Sieve {
    pages: List,
    /// Where the hand is, never among the young; `None`: at the oldest.
    hand: Option<u32>,
    first_young: Option<u32>,
    young: usize,
    /// From here on the bits that the loads set have not been taken.
    first_unsettled: Option<u32>,
}

impl Sieve {
    /// Takes the bits that the loads set.
    fn settle(&mut self, referenced: &mut dyn FnMut(PageIndex) -> bool) {
        while let Some(place) = self.first_unsettled {
            let item = self.pages.item_mut(place);
            if referenced(item.page()) {
                item.set(USED);
            }
            self.first_unsettled = self.pages.newer(place);
        }
    }

    /// Where the hand goes from `place`.
    fn after(&self, place: u32) -> Option<u32> {
        self.pages.newer(place).filter(|newer| Some(*newer) != self.first_young)
    }

    /// The first young page is young no more.
    fn age(&mut self) {
        if let Some(place) = self.first_young {
            self.pages.item_mut(place).clear(YOUNG);
            self.first_young = self.pages.newer(place);
            self.young -= 1;
        }
    }

    fn take(&mut self, place: u32) -> PageIndex {
        if self.hand == Some(place) {
            self.hand = self.after(place);
        }
        if self.first_unsettled == Some(place) {
            self.first_unsettled = self.pages.newer(place);
        }
        if self.first_young == Some(place) {
            self.age();
        } else if self.pages.item(place).has(YOUNG) {
            self.young -= 1;
        }
        self.pages.remove(place)
    }

    /// The hand's walk, at most once round.
    fn walk(&mut self, referenced: &mut dyn FnMut(PageIndex) -> bool) -> Option<PageIndex> {
        for _ in 0..self.pages.len() - self.young {
            let place = self.hand.or(self.pages.oldest())?;
            let item = self.pages.item_mut(place);
            let (page, used) = (item.page(), item.has(USED));
            item.set(USED);
            // The first reference is the first use; the next is reuse.
            if !(referenced(page) && used) {
                self.hand = Some(place);
                return Some(self.take(place));
            }
            self.hand = self.after(place);
        }
        self.hand.or(self.pages.oldest()).map(|place| self.take(place))
    }
}

impl Policy for Sieve {
    fn name(&self) -> &'static str {
        "sieve"
    }

    fn insert(&mut self, page: PageIndex) {
        if self.pages.find(page).is_none() {
            let place = self.pages.push_newest(page, YOUNG);
            self.first_unsettled.get_or_insert(place);
            self.first_young.get_or_insert(place);
            self.young += 1;
            if self.young > FEW {
                self.age();
            }
        }
    }

    fn victim(&mut self, referenced: &mut dyn FnMut(PageIndex) -> bool) -> Option<PageIndex> {
        if self.pages.len() > FEW {
            self.settle(referenced);
            return self.walk(referenced);
        }
        let mut next = self.pages.oldest();
        while let Some(place) = next {
            let item = self.pages.item_mut(place);
            if !referenced(item.page()) {
                return Some(self.take(place));
            }
            item.set(USED);
            next = self.pages.newer(place);
        }
        None
    }

    fn remove(&mut self, page: PageIndex) -> bool {
        self.pages.find(page).map(|place| self.take(place)).is_some()
    }

    fn retain(&mut self, keep: &mut dyn FnMut(PageIndex) -> bool) {
        let mut next = self.pages.oldest();
        while let Some(place) = next {
            next = self.pages.newer(place);
            if !keep(self.pages.item(place).page()) {
                self.take(place);
            }
        }
    }

    fn for_each(&self, visit: &mut dyn FnMut(PageIndex)) {
        self.pages.pages().for_each(visit);
    }

    fn len(&self) -> usize {
        self.pages.len()
    }

    fn metadata_bytes(&self) -> usize {
        self.pages.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn filled(pages: u64) -> Sieve {
        let mut sieve = Sieve::default();
        (0..pages).for_each(|page| sieve.insert(PageIndex(page)));
        sieve
    }

    #[test]
    fn the_hand_leaves_reused_pages_in_place_and_goes_on_from_there() {
        let mut sieve = filled(24);
        let mut bits: HashSet<u64> = (0..24).collect(); // loaded by faults
        let mut victim = |sieve: &mut Sieve, again: &[u64]| {
            bits.extend(again);
            sieve.victim(&mut |page| bits.remove(&page.0)).map(|page| page.0)
        };
        assert_eq!(victim(&mut sieve, &[]), Some(0), "the load's own reference is no reuse");
        assert_eq!(victim(&mut sieve, &[1, 2]), Some(3));
        sieve.insert(PageIndex(24));
        // The hand is at 4; pages 1 and 2 come again only after the end.
        assert_eq!(victim(&mut sieve, &[4, 24]), Some(5));
        assert_eq!([victim(&mut sieve, &[]), victim(&mut sieve, &[])], [Some(6), Some(7)]);
        // Now 8, the last that is settled, is passed over, and the hand goes round.
        assert_eq!(victim(&mut sieve, &[8, 1]), Some(2));
    }

    #[test]
    fn the_first_use_of_a_page_filled_ahead_is_no_reuse() {
        let mut sieve = filled(20);
        assert_eq!(sieve.victim(&mut |page| page.0 >= 16), Some(PageIndex(0)));
        assert_eq!(sieve.victim(&mut |page| page.0 == 1), Some(PageIndex(1)));
    }

    #[test]
    fn a_few_new_pages_are_spared_once_and_unused_ones_go() {
        let mut sieve = filled(4);
        let mut bits: HashSet<u64> = [0, 1, 3].into();
        let mut victim = || sieve.victim(&mut |page| bits.remove(&page.0)).map(|page| page.0);
        assert_eq!([victim(), victim(), victim()], [Some(2), Some(0), Some(1)]);
        assert_eq!([victim(), victim(), victim()], [None, Some(3), None]);
    }

    #[test]
    fn pages_referenced_all_the_time_still_yield_a_victim() {
        let mut sieve = filled(20);
        assert_eq!(sieve.victim(&mut |_| true), Some(PageIndex(0)));
        assert_eq!(filled(16).victim(&mut |_| true), None);
    }
}
