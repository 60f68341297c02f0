//! CLOCK: a circle of pages and a hand. A page that was referenced since the hand last passed is
//! left for another round (Corbató, "A Paging Experiment with the Multics System", 1969). The
//! circle is a queue whose head is the hand.

use std::collections::VecDeque;

use super::Policy;
use crate::units::PageIndex;

const FEW: usize = 16;

/// The circle.
#[derive(Default)]
pub struct Clock {
    circle: VecDeque<PageIndex>,
}

impl Policy for Clock {
    fn insert(&mut self, page: PageIndex) {
        self.circle.push_back(page);
    }

    fn victim(&mut self, referenced: &mut dyn FnMut(PageIndex) -> bool) -> Option<PageIndex> {
        for _ in 0..self.circle.len() {
            let page = self.circle.pop_front()?;
            if !referenced(page) {
                return Some(page);
            }
            self.circle.push_back(page);
        }
        // All were referenced: the oldest goes, but not out of so few that it, too, is new: its
        // thread may not have got to read it. It has lost its bit and goes the next time.
        if self.circle.len() > FEW { self.circle.pop_front() } else { None }
    }

    fn retain(&mut self, keep: &mut dyn FnMut(PageIndex) -> bool) {
        self.circle.retain(|page| keep(*page));
    }

    fn len(&self) -> usize {
        self.circle.len()
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
