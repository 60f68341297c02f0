//! FIFO: the page that came first goes first. No reference changes the order.

use super::queue::Queue;
use super::{FEW, Policy};
use crate::units::PageIndex;

/// The queue.
#[derive(Default)]
pub struct Fifo {
    pages: Queue<PageIndex>,
}

impl Policy for Fifo {
    fn name(&self) -> &'static str {
        "fifo"
    }

    fn insert(&mut self, page: PageIndex) {
        self.pages.push(page);
    }

    fn victim(&mut self, referenced: &mut dyn FnMut(PageIndex) -> bool) -> Option<PageIndex> {
        let oldest = *self.pages.oldest()?;
        if self.pages.len() <= FEW && referenced(oldest) {
            // It may be new, its thread yet to read it. All are spared, once.
            self.pages.iter().for_each(|page| {
                referenced(*page);
            });
            return None;
        }
        self.pages.pop()
    }

    fn remove(&mut self, page: PageIndex) -> bool {
        let at = self.pages.iter().position(|known| *known == page);
        at.and_then(|at| self.pages.remove(at)).is_some()
    }

    fn retain(&mut self, keep: &mut dyn FnMut(PageIndex) -> bool) {
        self.pages.retain(|page| keep(*page));
    }

    fn for_each(&self, visit: &mut dyn FnMut(PageIndex)) {
        self.pages.iter().for_each(|page| visit(*page));
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

    #[test]
    fn references_do_not_change_the_order() {
        let mut fifo = Fifo::default();
        (0..20).for_each(|page| fifo.insert(PageIndex(page)));
        let order: Vec<u64> =
            (0..4).filter_map(|_| fifo.victim(&mut |page| page.0 < 3)).map(|page| page.0).collect();
        assert_eq!(order, [0, 1, 2, 3]);
    }

    #[test]
    fn a_few_are_spared_once_and_go_in_order() {
        let mut fifo = Fifo::default();
        let mut bits: HashSet<u64> = (0..3).collect();
        (0..3).for_each(|page| fifo.insert(PageIndex(page)));
        let mut victim = || fifo.victim(&mut |page| bits.remove(&page.0)).map(|page| page.0);
        assert_eq!([victim(), victim(), victim(), victim()], [None, Some(0), Some(1), Some(2)]);
    }
}
