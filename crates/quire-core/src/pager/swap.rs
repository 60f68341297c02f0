//! The swap pager: pages of a memory object that has no other place to write them (anonymous
//! memory, private copies). Each page that went out has a slot, kept while it is resident again, so
//! that a page that was only read goes without being written.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::errors::{MapError, StoreError};
use crate::swap::{Swap, SwapSlot};
use crate::sys::lazy_words::LazyWords;
use crate::units::{ByteCount, PageCount, PageIndex};

/// The slots of one memory object in a swap of its own.
pub struct SwapPager {
    swap: Swap,
    slots: LazyWords<AtomicU64>,
}

impl SwapPager {
    /// Nothing is in the swap yet.
    ///
    /// # Errors
    /// When the address space has no room.
    pub fn new(swap: Swap, pages: PageCount) -> Result<Self, MapError> {
        let words = usize::try_from(pages.0)
            .map_err(|_| MapError::Invalid(format!("{} pages do not fit this machine", pages.0)))?;
        Ok(SwapPager { swap, slots: LazyWords::new(2 * words)? })
    }

    /// The swap.
    pub fn swap(&self) -> &Swap {
        &self.swap
    }

    /// The two words of a page's slot.
    fn words(&self, page: PageIndex) -> &[AtomicU64] {
        &self.slots.as_slice()[2 * page.0 as usize..][..2]
    }

    fn slot(&self, page: PageIndex) -> Option<SwapSlot> {
        let [place, check] = [0, 1].map(|word| self.words(page)[word].load(Ordering::Acquire));
        SwapSlot::from_words([place, check])
    }

    /// Whether a page has gone out. For the owner of the page.
    pub fn has(&self, page: PageIndex) -> bool {
        self.slot(page).is_some()
    }

    /// Fills `buf` with a page that has gone out; false when it has not. For the owner of the page.
    ///
    /// # Errors
    /// The swap's.
    pub fn get(&self, page: PageIndex, buf: &mut [u8]) -> Result<bool, StoreError> {
        self.slot(page).map_or(Ok(false), |slot| self.swap.get(slot, buf).map(|()| true))
    }

    /// Puts a page out, in place of the copy that may be there. For the owner of the page.
    ///
    /// # Errors
    /// The swap's; the older copy is still there.
    pub fn put(&self, page: PageIndex, bytes: &[u8]) -> Result<(), StoreError> {
        let slot = self.swap.put(bytes)?;
        let before = self.slot(page);
        if before.is_none() {
            self.slots.begin(2 * page.0 as usize); // until the mapping ends
        }
        // None but the owner is here, so the two words belong together.
        for (word, new) in self.words(page).iter().zip(slot.to_words()) {
            word.store(new, Ordering::Release);
        }
        before.into_iter().for_each(|slot| self.swap.free(slot));
        Ok(())
    }

    /// Bytes that the table of slots takes.
    pub fn table_bytes(&self) -> u64 {
        self.slots.bytes()
    }

    /// Bytes of buffers of one call.
    pub fn buffer_bytes(&self, read: ByteCount) -> ByteCount {
        self.swap.buffer_bytes(read)
    }
}
