//! S3-FIFO: a tenth of the pages is on probation, and most that are used once leave from there; what
//! is reused there, or comes back soon after it went, is kept (Yang et al., "FIFO queues are all
//! you need for cache eviction", SOSP 2023).
//!
//! One bit a page in place of the paper's counter to 3, as a pager learns of a reference only when
//! it looks; the authors find one bit better for block traces. To be kept a page must be seen
//! referenced a second time: the first is its load. In a pager that sees faults only, the ghosts
//! are what it learns from.

use super::Policy;
use super::filter::{Filter, Rules};
use crate::units::PageIndex;

const RULES: Rules = Rules { probation_percent: 10, ghosts_percent: 90, promotes: true };

/// The queues.
pub struct S3Fifo(Filter);

impl Default for S3Fifo {
    fn default() -> Self {
        S3Fifo(Filter::new(RULES))
    }
}

impl Policy for S3Fifo {
    fn name(&self) -> &'static str {
        "s3fifo"
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

    fn filled(pages: u64) -> S3Fifo {
        let mut policy = S3Fifo::default();
        (0..pages).for_each(|page| policy.insert(PageIndex(page)));
        policy
    }

    #[test]
    fn a_page_is_kept_for_its_second_reference_not_for_its_load() {
        let mut policy = filled(40);
        let mut bits: HashSet<u64> = (0..40).collect(); // loaded by faults
        let mut victim = |again: &[u64]| {
            bits.extend(again);
            policy.victim(&mut |page| bits.remove(&page.0)).map(|page| page.0)
        };
        assert_eq!(victim(&[]), Some(0));
        assert_eq!(victim(&[1, 2]), Some(3), "1 and 2 were reused and are kept");
        // The rest of probation goes first, but for the newest.
        let next: Vec<_> = (0..20).map(|_| victim(&[])).collect();
        assert_eq!(next, (4..24).map(Some).collect::<Vec<_>>());
        assert_eq!([victim(&[]), victim(&[])], [Some(1), Some(2)]);
    }

    #[test]
    fn the_first_use_of_a_page_filled_ahead_is_no_reuse() {
        let mut policy = filled(40);
        assert_eq!(policy.victim(&mut |_| false), Some(PageIndex(0)));
        assert_eq!(policy.victim(&mut |page| page.0 == 1), Some(PageIndex(1)));
    }

    #[test]
    fn a_page_that_comes_back_is_kept() {
        let mut policy = filled(40);
        let victim = |policy: &mut S3Fifo| policy.victim(&mut |_| false).map(|page| page.0);
        assert_eq!(victim(&mut policy), Some(0));
        policy.insert(PageIndex(0));
        let next: Vec<_> = (0..23).map(|_| victim(&mut policy)).collect();
        assert_eq!(next, (1..24).map(Some).collect::<Vec<_>>());
        assert_eq!(victim(&mut policy), Some(0), "the only one of the main part");
    }

    #[test]
    fn a_page_that_was_removed_does_not_come_back() {
        let mut policy = filled(40);
        assert!(policy.remove(PageIndex(0)) && !policy.remove(PageIndex(0)));
        policy.insert(PageIndex(0));
        let order: Vec<_> = (0..40).map(|_| policy.victim(&mut |_| false).map(|page| page.0)).collect();
        assert_eq!(order, (1..40).chain([0]).map(Some).collect::<Vec<_>>());
    }

    #[test]
    fn a_few_new_pages_are_spared_once_and_unused_ones_go() {
        let mut policy = filled(4);
        let mut bits: HashSet<u64> = [0, 1, 3].into();
        let mut victim = || policy.victim(&mut |page| bits.remove(&page.0)).map(|page| page.0);
        assert_eq!([victim(), victim(), victim()], [Some(2), Some(0), Some(1)]);
        let mut policy = filled(2);
        assert_eq!(policy.victim(&mut |_| true), None);
        assert_eq!(policy.victim(&mut |_| false), Some(PageIndex(0)));
    }

    #[test]
    fn pages_referenced_all_the_time_still_yield_a_victim() {
        let mut policy = filled(20);
        let yielded = (0..20).filter(|_| policy.victim(&mut |_| true).is_some()).count();
        assert_eq!(yielded, 4, "the others are few");
    }
}
