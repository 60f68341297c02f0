//! Pagers move pages between a memory object and its backing.

use crate::counters::{Counters, count};
use crate::errors::{FaultCode, StoreError};
use crate::interrupt;
use crate::store::Store;
use crate::units::{ByteCount, ByteOffset};
use std::sync::Arc;
use std::time::Duration;

pub mod channel;
pub mod external;

const BACKOFF_FIRST: Duration = Duration::from_millis(20);

/// The store pager: fills pages from a [`Store`], tries transient errors again, and fills with
/// zeros what lies past the end of the data; writes pages back to it.
pub struct StorePager {
    store: Arc<dyn Store>,
    retries: u32,
}

impl StorePager {
    /// A pager that tries a read up to `retries` times again when it fails in a way that may pass.
    pub fn new(store: Arc<dyn Store>, retries: u32) -> Self {
        StorePager { store, retries }
    }

    /// The store behind.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// Fills `buf` with the bytes from `offset` on.
    ///
    /// # Errors
    /// What the store said last.
    pub fn get_page(
        &self,
        offset: ByteOffset,
        buf: &mut [u8],
        counters: &Counters,
    ) -> Result<(), StoreError> {
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
        self.store.sync().map_err(not_written)
    }

    /// Writes `bytes` back at `offset`, but for what lies past the end of the data. A write is not
    /// tried again: the page stays dirty, and the next sync writes it.
    ///
    /// # Errors
    /// What the store said, as `FaultCode::WriteBack`.
    pub fn put_page(&self, offset: ByteOffset, bytes: &[u8]) -> Result<(), StoreError> {
        let rest = usize::try_from(self.store.size().0.saturating_sub(offset.0)).unwrap_or(usize::MAX);
        self.store.write_at(offset, &bytes[..bytes.len().min(rest)]).map_err(not_written)
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
