//! Stores: bytes somewhere, read by offset. A store knows nothing of pages.
//!
//! All I/O of the core passes the one trait [`Store`], so a test can fail, shorten or delay any
//! read by wrapping a store in [`faulty::FaultyStore`].

use crate::errors::{FaultCode, StoreError};
use crate::units::{ByteCount, ByteOffset};

pub mod concat;
pub mod faulty;
pub mod file;
pub mod memory;
pub mod seek_table;
pub mod zero;
pub mod zstd;

/// Bytes somewhere. Reads and writes may come from any thread at the same time, also from a signal handler
/// that interrupted code outside the core; no call may touch a quire mapping or the interpreter.
pub trait Store: Send + Sync {
    /// Size in bytes, fixed at open.
    fn size(&self) -> ByteCount;

    /// What errors name: a path, a URL, or what the user called it.
    fn label(&self) -> &str;

    /// Fills all of `buf` from `offset`. The caller never asks past [`Store::size`].
    ///
    /// # Errors
    /// When any byte cannot be had; the content of `buf` is then unspecified.
    fn read_at(&self, offset: ByteOffset, buf: &mut [u8]) -> Result<(), StoreError>;

    /// Why nothing can be written to it; `None` where it can.
    fn read_only(&self) -> Option<String> {
        Some("it is of a kind that can only be read".into())
    }

    /// Writes all of `bytes` at `offset`. The caller never writes past [`Store::size`].
    ///
    /// # Errors
    /// When any byte could not be written; those before it may have been.
    fn write_at(&self, offset: ByteOffset, bytes: &[u8]) -> Result<(), StoreError> {
        let _ = bytes;
        let why = self.read_only().unwrap_or_default();
        Err(StoreError::new(
            FaultCode::Protection,
            offset,
            format!("{} cannot be written: {why}", self.label()),
        ))
    }

    /// Makes what was written durable (fdatasync(2)). After a failure what was written since the last
    /// success may be lost and has to be written again.
    ///
    /// # Errors
    /// The storage's.
    fn sync(&self) -> Result<(), StoreError> {
        Ok(())
    }

    /// The natural unit of a read in bytes: 1 where any read is as good as another, the
    /// decompressed frame for a compressed store.
    fn grain(&self) -> ByteCount {
        ByteCount(1)
    }

    /// Bytes worth reading at once when a reader goes in order; 1 where it does not matter.
    fn run(&self) -> ByteCount {
        self.grain()
    }

    /// Whether a read may wait for another process or the network, so that it must not hold up
    /// a thread that serves other faults.
    fn is_slow(&self) -> bool {
        false
    }

    /// Bytes of buffers that a read of `read` bytes, at a multiple of `read`, may hold beside the
    /// caller's; counted in the budget.
    fn buffer_bytes(&self, read: ByteCount) -> ByteCount {
        let _ = read;
        ByteCount(0)
    }

    /// Bytes that stay allocated while the store is open (shared memory); counted in the budget.
    fn standing_bytes(&self) -> ByteCount {
        ByteCount(0)
    }

    /// Total bytes read so far from the lowest store of this chain (compressed bytes for a
    /// compressed store): what came from the disk or the network.
    fn bytes_fetched(&self) -> u64;

    /// Ends reads that wait, with `FaultCode::Closed`. Nothing is read afterwards.
    fn close(&self) {}

    /// Called in the child of a fork, in its only thread, before any read there: forget locks
    /// that another thread of the parent may hold and connections that belong to the parent.
    fn after_fork_in_child(&self) {}
}
