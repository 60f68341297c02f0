//! 2Q: new pages pass through a queue of a quarter of all; those that come back soon after they have
//! left it are kept (Johnson and Shasha, "2Q: A Low Overhead High Performance Buffer Management
//! Replacement Algorithm", VLDB 1994; the shares are the paper's Kin and Kout).
//!
//! The main part gives second chances by the reference bit, where the paper has an LRU, as a pager
//! does not see hits.

use super::Policy;
use super::filter::{Filter, Rules};
use crate::units::PageIndex;

const RULES: Rules = Rules { probation_percent: 25, ghosts_percent: 50, promotes: false };

/// The queues.
pub struct TwoQueue(Filter);

impl Default for TwoQueue {
    fn default() -> Self {
        TwoQueue(Filter::new(RULES))
    }
}

impl Policy for TwoQueue {
    fn name(&self) -> &'static str {
        "2q"
    }

    fn insert(&mut self, page: PageIndex) {
        self.0.insert(page);
    }

    fn victim(&mut self, referenced: &mut dyn FnMut(PageIndex) -> bool) -> Option<PageIndex> {
        self.0.victim(referenced)
    }

    fn remove(&mut self, page: PageIndex) -> bool {
        self.0.remove(page)
    }

    fn retain(&mut self, keep: &mut dyn FnMut(PageIndex) -> bool) {
        self.0.retain(keep);
    }

    fn for_each(&self, visit: &mut dyn FnMut(PageIndex)) {
        self.0.for_each(visit);
    }

    fn len(&self) -> usize {
        self.0.len()
    }

    fn metadata_bytes(&self) -> usize {
        self.0.metadata_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn filled(pages: u64) -> TwoQueue {
        let mut policy = TwoQueue::default();
        (0..pages).for_each(|page| policy.insert(PageIndex(page)));
        policy
    }

    #[test]
    fn references_on_probation_do_not_count() {
        let mut policy = filled(40);
        let order: Vec<_> = (0..4).map(|_| policy.victim(&mut |_| true).map(|page| page.0)).collect();
        assert_eq!(order, [0, 1, 2, 3].map(Some));
    }

    #[test]
    fn a_page_that_comes_back_is_kept_and_gets_second_chances() {
        let mut policy = filled(40);
        let victim =
            |policy: &mut TwoQueue, bit: u64| policy.victim(&mut |page| page.0 == bit).map(|page| page.0);
        assert_eq!([victim(&mut policy, 99), victim(&mut policy, 99)], [Some(0), Some(1)]);
        policy.insert(PageIndex(0));
        policy.insert(PageIndex(1));
        let next: Vec<_> = (0..22).map(|_| victim(&mut policy, 99)).collect();
        assert_eq!(next, (2..24).map(Some).collect::<Vec<_>>());
        assert_eq!(victim(&mut policy, 0), Some(1), "0 was referenced");
        assert_eq!(policy.len(), 17);
    }

    #[test]
    fn a_page_is_forgotten_as_a_ghost_after_half_as_many() {
        let mut policy = filled(200);
        (0..99).for_each(|_| assert!(policy.victim(&mut |_| false).is_some()));
        // 101 pages are left; the last 51 of 0..99 are ghosts.
        policy.insert(PageIndex(40));
        policy.insert(PageIndex(90));
        let order: HashSet<u64> =
            (0..87).filter_map(|_| policy.victim(&mut |_| false)).map(|page| page.0).collect();
        assert!(order.contains(&90), "in the main part, which goes when probation is short");
        assert!(!order.contains(&40), "the newest on probation");
    }

    #[test]
    fn a_few_new_pages_are_spared_once() {
        let mut policy = filled(2);
        let mut bits: HashSet<u64> = [0, 1].into();
        let mut victim = || policy.victim(&mut |page| bits.remove(&page.0)).map(|page| page.0);
        assert_eq!([victim(), victim(), victim(), victim()], [None, Some(0), Some(1), None]);
    }

    #[test]
    fn a_referenced_old_page_goes_rather_than_one_of_the_newest() {
        let mut policy = filled(17);
        assert_eq!(policy.victim(&mut |_| false), Some(PageIndex(0)));
        policy.insert(PageIndex(0)); // comes back, to the main part
        for page in 17..33 {
            policy.insert(PageIndex(page));
            assert_eq!(policy.victim(&mut |_| false), Some(PageIndex(page - 16)));
        }
        assert_eq!(policy.victim(&mut |_| true), Some(PageIndex(0)));
    }
}
