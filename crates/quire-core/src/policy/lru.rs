//! LRU: the page whose last use lies furthest back goes first. It sees a use only where someone
//! tells it ([`Policy::hit`]), as the simulator does; a pager of mapped pages cannot, and has a
//! FIFO in it.

use super::list::List;
use super::{FEW, Policy};
use crate::units::PageIndex;

/// Pages by their last use.
#[derive(Default)]
pub struct Lru {
    pages: List,
}

impl Policy for Lru {
    fn name(&self) -> &'static str {
        "lru"
    }

    fn insert(&mut self, page: PageIndex) {
        if self.pages.find(page).is_none() {
            self.pages.push_newest(page, 0);
        }
    }

    fn victim(&mut self, referenced: &mut dyn FnMut(PageIndex) -> bool) -> Option<PageIndex> {
        let oldest = self.pages.oldest()?;
        if self.pages.len() <= FEW && referenced(self.pages.item(oldest).page()) {
            // It may be new, its thread yet to read it. All are spared, once.
            self.pages.pages().for_each(|page| {
                referenced(page);
            });
            return None;
        }
        Some(self.pages.remove(oldest))
    }

    fn hit(&mut self, page: PageIndex) {
        if let Some(place) = self.pages.find(page) {
            self.pages.remove(place);
            self.pages.push_newest(page, 0);
        }
    }

    fn remove(&mut self, page: PageIndex) -> bool {
        self.pages.find(page).map(|place| self.pages.remove(place)).is_some()
    }

    fn retain(&mut self, keep: &mut dyn FnMut(PageIndex) -> bool) {
        let mut next = self.pages.oldest();
        while let Some(place) = next {
            next = self.pages.newer(place);
            if !keep(self.pages.item(place).page()) {
                self.pages.remove(place);
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

    #[test]
    fn a_hit_makes_a_page_the_last_to_go() {
        let mut lru = Lru::default();
        (0..4).for_each(|page| lru.insert(PageIndex(page)));
        lru.hit(PageIndex(0));
        lru.hit(PageIndex(2));
        lru.hit(PageIndex(99)); // unknown: nothing
        let order: Vec<u64> = std::iter::from_fn(|| lru.victim(&mut |_| false)).map(|page| page.0).collect();
        assert_eq!(order, [1, 3, 0, 2]);
    }

    #[test]
    fn a_few_are_spared_once() {
        let mut lru = Lru::default();
        let mut bits = std::collections::HashSet::from([0, 1]);
        (0..2).for_each(|page| lru.insert(PageIndex(page)));
        assert_eq!(lru.victim(&mut |page| bits.remove(&page.0)), None);
        assert_eq!(lru.victim(&mut |page| bits.remove(&page.0)), Some(PageIndex(0)));
    }
}
