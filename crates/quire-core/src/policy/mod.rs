//! Replacement policies, one per file. A policy is pure: it knows page numbers and is told which
//! were referenced; it reads no clock, takes no lock and touches no memory of pages.

use crate::units::PageIndex;

pub mod clock;

/// Chooses which resident page goes next.
pub trait Policy: Send {
    /// A page became resident.
    fn insert(&mut self, page: PageIndex);

    /// Chooses a page to evict and forgets it. `referenced` tests and clears a page's reference
    /// bit. `None` when no page is known, or none should go just now.
    fn victim(&mut self, referenced: &mut dyn FnMut(PageIndex) -> bool) -> Option<PageIndex>;

    /// Forgets the pages for which `keep` is false.
    fn retain(&mut self, keep: &mut dyn FnMut(PageIndex) -> bool);

    /// Pages known.
    fn len(&self) -> usize;

    /// Whether no page is known.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
