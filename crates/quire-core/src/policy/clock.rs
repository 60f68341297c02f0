//! CLOCK: a circle of pages and a hand. A page that was referenced since the hand last passed is
//! left for another round (Corbató, "A Paging Experiment with the Multics System", 1969). The
//! circle is a queue whose head is the hand.

use super::queue::Queue;
use super::{FEW, Policy};
use crate::units::PageIndex;

/// The circle.
#[derive(Default)]
pub struct Clock {
    circle: Queue<PageIndex>,
}

impl Clock {
    /// Takes out the next page for which `may_go`, referenced or not.
    pub(super) fn take(&mut self, may_go: impl Fn(PageIndex) -> bool) -> Option<PageIndex> {
        let at = self.circle.iter().position(|page| may_go(*page))?;
        self.circle.remove(at)
    }
}

impl Policy for Clock {
    fn name(&self) -> &'static str {
        "clock"
    }

    fn insert(&mut self, page: PageIndex) {
        self.circle.push(page);
    }

    fn victim(&mut self, referenced: &mut dyn FnMut(PageIndex) -> bool) -> Option<PageIndex> {
        for _ in 0..self.circle.len() {
            let page = self.circle.pop()?;
            if !referenced(page) {
                return Some(page);
            }
            self.circle.push(page);
        }
        // All were referenced: the oldest goes, but not out of so few that it, too, is new: its
        // thread may not have got to read it. It has lost its bit and goes the next time.
        if self.circle.len() > FEW { self.circle.pop() } else { None }
    }

    fn remove(&mut self, page: PageIndex) -> bool {
        self.take(|known| known == page).is_some()
    }

    fn retain(&mut self, keep: &mut dyn FnMut(PageIndex) -> bool) {
        self.circle.retain(|page| keep(*page));
    }

    fn for_each(&self, visit: &mut dyn FnMut(PageIndex)) {
        self.circle.iter().for_each(|page| visit(*page));
    }

    fn len(&self) -> usize {
        self.circle.len()
    }

    fn metadata_bytes(&self) -> usize {
        self.circle.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn a_referenced_page_gets_a_second_chance() {
        let mut clock = Clock::default();
        (0..4).for_each(|page| clock.insert(PageIndex(page)));
        let mut bits: HashSet<u64> = [0, 1].into();
        let order: Vec<u64> =
            std::iter::from_fn(|| clock.victim(&mut |p| bits.remove(&p.0)).map(|p| p.0)).collect();
        assert_eq!(order, [2, 3, 0, 1]);
    }

    #[test]
    fn pages_referenced_all_the_time_still_yield_a_victim() {
        let mut clock = Clock::default();
        (0..20).for_each(|page| clock.insert(PageIndex(page)));
        assert_eq!(clock.victim(&mut |_| true), Some(PageIndex(0)));
        assert_eq!(clock.len(), 19);
    }

    #[test]
    fn a_few_new_pages_are_spared_once() {
        let mut clock = Clock::default();
        let mut bits: HashSet<u64> = [0, 1].into();
        (0..2).for_each(|page| clock.insert(PageIndex(page)));
        assert_eq!(clock.victim(&mut |page| bits.remove(&page.0)), None);
        assert_eq!(clock.victim(&mut |page| bits.remove(&page.0)), Some(PageIndex(0)));
    }
}
