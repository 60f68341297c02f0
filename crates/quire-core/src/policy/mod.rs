//! Replacement policies, one per file. A policy is pure: it knows page numbers and is told which
//! were referenced; it reads no clock, takes no lock and touches no memory of pages. The pager and
//! the simulator ([`cache::Cache`]) run the same code.
//!
//! # What a policy may know
//!
//! A pager sees faults, not hits. Each page has a reference bit; a policy reads and clears it by the
//! `referenced` that [`Policy::victim`] is given.
//!
//! - A page loaded because a thread touched it comes with the bit **set**, a page filled ahead of
//!   need with the bit **unset**.
//! - The bit is set again by another fault on the page or by a sampled accessed bit. For a page
//!   with a valid translation this is rare, so an unset bit does not prove that a page is idle.
//! - Hence the *first* reference that is seen of a page is its first use, which says nothing of a
//!   second: `s3fifo` and `sieve` note it, and only the next one is reuse. The bit that a load set
//!   is taken when the next victim is asked for. Who samples accessed bits clears them once after a
//!   load before believing them: the touch that loaded the page has set them as well.
//! - Where bits are hardly ever set again, `clock` and `sieve` are `fifo`. `s3fifo` and `2q` still
//!   learn: they remember which pages went of late, and a page that comes back is worth keeping.
//!
//! # What every policy grants a new page
//!
//! The thread for which a page was loaded may not have got to read it when the next victim is
//! wanted. So no policy gives up one of the [`FEW`] newest pages before the bit of its load was
//! taken, and where no more than these are known and referenced it names none, once: the bits are
//! cleared then, and it yields when it is asked again.
//!
//! # Memory
//!
//! Bytes for each resident page, ghosts included: clock and fifo 8 to 10; 2q to 24 and s3fifo to 30
//! (14 to 21 for each ghost, of which 2q keeps half as many as pages, s3fifo nine tenths); sieve and
//! lru 21 to 31 (a node of 16 in a slab, and an index). A test measures them.

use crate::units::PageIndex;

pub mod cache;
pub mod clock;
pub mod fifo;
pub mod lru;
pub mod s3fifo;
pub mod sieve;
pub mod two_queue;

mod filter;
mod ghosts;
mod index;
mod list;
mod marked;
mod queue;

#[cfg(test)]
mod contract;
#[cfg(test)]
mod traces;

/// How many of the newest pages are spared; see the module.
pub const FEW: usize = 16;

/// The names that [`by_name`] knows, the default first.
pub const NAMES: [&str; 6] = ["clock", "s3fifo", "sieve", "2q", "fifo", "lru"];

/// Chooses which resident page goes next.
pub trait Policy: Send {
    /// The name it is chosen by.
    fn name(&self) -> &'static str;

    /// A page became resident. A page that is known already stays as it is, or, where a policy has
    /// no index to tell (clock, fifo, s3fifo, 2q), is named twice: the caller's claim of the victim
    /// decides.
    ///
    /// # Panics
    /// Where the page's number is not below 2^62, which no store has.
    fn insert(&mut self, page: PageIndex);

    /// Chooses a page to evict and forgets it. `referenced` tests and clears a page's reference
    /// bit. `None` when no page is known, or none should go just now: then no bit is set any more
    /// and the next call yields a page, unless all are referenced again.
    fn victim(&mut self, referenced: &mut dyn FnMut(PageIndex) -> bool) -> Option<PageIndex>;

    /// A known page was used, where someone sees that. Only `lru` learns from it; the others are
    /// told by the reference bit.
    fn hit(&mut self, _page: PageIndex) {}

    /// Forgets one page; false when it was not known. It does not count as evicted: should it come
    /// back, it is new. Where there is no index (clock, fifo, s3fifo, 2q) this looks at all pages:
    /// for many at a time use [`Policy::retain`].
    fn remove(&mut self, page: PageIndex) -> bool;

    /// Forgets the pages for which `keep` is false.
    fn retain(&mut self, keep: &mut dyn FnMut(PageIndex) -> bool);

    /// Calls `visit` with each known page, in no stated order.
    fn for_each(&self, visit: &mut dyn FnMut(PageIndex));

    /// Pages known.
    fn len(&self) -> usize;

    /// Whether no page is known.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that the policy holds on the heap.
    fn metadata_bytes(&self) -> usize;
}

/// A new policy of this name, or `None` when there is none; [`NAMES`] has them all.
pub fn by_name(name: &str) -> Option<Box<dyn Policy>> {
    Some(match name {
        "clock" => Box::new(clock::Clock::default()),
        "s3fifo" => Box::new(s3fifo::S3Fifo::default()),
        "sieve" => Box::new(sieve::Sieve::default()),
        "2q" => Box::new(two_queue::TwoQueue::default()),
        "fifo" => Box::new(fifo::Fifo::default()),
        "lru" => Box::new(lru::Lru::default()),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_makes_the_policy_of_that_name() {
        for name in NAMES {
            assert_eq!(by_name(name).map(|policy| policy.name()), Some(name));
        }
        assert!(by_name("LRU").is_none() && by_name("").is_none());
    }
}
