//! Pagers move pages between a memory object and its backing.

use crate::counters::{Counters, add, count};
use crate::errors::{FaultCode, StoreError};
use crate::interrupt;
use crate::store::Store;
use crate::units::{ByteCount, ByteOffset, PageIndex};
use std::sync::Arc;
use std::time::Duration;

pub mod channel;
pub mod external;
pub mod swap;

use swap::SwapPager;

const BACKOFF_FIRST: Duration = Duration::from_millis(20);

/// Fills pages from a [`Store`], tries transient errors again, and fills with zeros what lies past
/// the end of the data; writes pages back to it, or to swap where writes are private.
pub struct Pager {
    store: Arc<dyn Store>,
    swap: Option<SwapPager>,
    granule: ByteCount,
    retries: u32,
}

impl Pager {
    /// A pager that tries a read up to `retries` times again when it fails in a way that may pass.
    /// With `swap`, pages that were written go there.
    pub fn new(store: Arc<dyn Store>, granule: ByteCount, swap: Option<SwapPager>, retries: u32) -> Self {
        Pager { store, swap, granule, retries }
    }

    /// The store behind.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Where private pages go.
    pub fn swap(&self) -> Option<&SwapPager> {
        self.swap.as_ref()
    }

    /// Bytes of buffers that one call may hold beside the caller's.
    pub fn buffer_bytes(&self, read: ByteCount) -> ByteCount {
        let swap = self.swap.as_ref().map_or(0, |swap| swap.buffer_bytes(self.granule).0);
        ByteCount(self.store.buffer_bytes(read).0.max(swap))
    }

    /// Bytes that stay allocated.
    pub fn standing_bytes(&self) -> ByteCount {
        let swap = self.swap.as_ref().map_or(0, |swap| swap.swap().standing_bytes().0);
        ByteCount(self.store.standing_bytes().0 + swap)
    }

    /// Forgets what is the parent's, in the child of a fork.
    ///
    /// # Safety
    /// Only in the child of a fork while it has one thread.
    #[allow(unsafe_code)]
    pub unsafe fn after_fork_in_child(&self) {
        self.store.after_fork_in_child();
        if let Some(swap) = &self.swap {
            // SAFETY: one thread (contract).
            unsafe { swap.swap().after_fork_in_child() }
        }
    }

    /// Fills `buf` with the bytes from `offset`, a multiple of the granule where there is swap.
    ///
    /// # Errors
    /// What the store or the swap said last.
    pub fn get_page(
        &self,
        offset: ByteOffset,
        buf: &mut [u8],
        counters: &Counters,
    ) -> Result<(), StoreError> {
        let Some(swap) = &self.swap else {
            return self.read(offset, buf, counters);
        };
        // Runs of pages that are not in swap are read at once.
        let granule = self.granule.as_usize();
        let (mut at, mut unread) = (0, 0);
        while at < buf.len() {
            let end = buf.len().min(at + granule);
            let page = ByteOffset(offset.0 + at as u64).page(self.granule);
            if swap.has(page) {
                self.read(ByteOffset(offset.0 + unread as u64), &mut buf[unread..at], counters)?;
                swap.get(page, &mut buf[at..end])?;
                add(&counters.swapped_in_bytes, (end - at) as u64);
                unread = end;
            }
            at = end;
        }
        self.read(ByteOffset(offset.0 + unread as u64), &mut buf[unread..], counters)
    }

    fn read(&self, offset: ByteOffset, buf: &mut [u8], counters: &Counters) -> Result<(), StoreError> {
        if buf.is_empty() {
            return Ok(());
        }
        if self.store.is_slow() {
            interrupt::watch_again();
        }
        let rest = ByteCount(self.store.size().0.saturating_sub(offset.0));
        let filled = buf.len().min(usize::try_from(rest.0).unwrap_or(usize::MAX));
        let (data, tail) = buf.split_at_mut(filled);
        tail.fill(0);
        let mut backoff = BACKOFF_FIRST;
        for attempt in 0.. {
            match self.store.read_at(offset, data) {
                Ok(()) => break,
                Err(error) if error.code.is_transient() && attempt < self.retries => {
                    count(&counters.retries);
                    if !interrupt::sleep(backoff) {
                        let message = "interrupted between two tries";
                        return Err(StoreError::new(FaultCode::Interrupted, offset, message));
                    }
                    backoff *= 4;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    /// What the store said, as `FaultCode::WriteBack`.
    pub fn sync(&self) -> Result<(), StoreError> {
        self.store.sync().map_err(not_synced)
    }

    /// Writes `bytes` back at `offset`, but for what lies past the end of the data. A write is not
    /// tried again: the page stays dirty, and the next sync writes it.
    ///
    /// # Errors
    /// What the store or the swap said, as `FaultCode::WriteBack` or `SwapFull`.
    pub fn put_page(&self, offset: ByteOffset, bytes: &[u8]) -> Result<(), StoreError> {
        if let Some(swap) = &self.swap {
            let first = offset.page(self.granule).0;
            let mut pages = (first..).zip(bytes.chunks(self.granule.as_usize()));
            return pages.try_for_each(|(page, bytes)| swap.put(PageIndex(page), bytes)).map_err(not_written);
        }
        let rest = usize::try_from(self.store.size().0.saturating_sub(offset.0)).unwrap_or(usize::MAX);
        self.store.write_at(offset, &bytes[..bytes.len().min(rest)]).map_err(not_synced)
    }
}

/// The error of a page that stays dirty.
pub fn not_written(error: StoreError) -> StoreError {
    if error.code.is_passing() {
        return error;
    }
    let message = format!("a dirty page could not be written back: {}", error.message);
    StoreError { code: FaultCode::WriteBack, message, ..error }
}

/// As [`not_written`], with the ways out that there are when pages go to their source.
fn not_synced(error: StoreError) -> StoreError {
    let mut error = not_written(error);
    if error.code == FaultCode::WriteBack {
        error.message += "; what was written is in memory still: mend what is in the way and call sync() \
                          again, or give it up with close(discard=True)";
    }
    error
}
