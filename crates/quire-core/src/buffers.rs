//! Buffers that pages are filled in before they are installed. A few are kept for the next load;
//! those in use are charged to the load that uses them.

use crate::errors::MapError;
use crate::sys::fork::ForkMutex;
use crate::sys::memory::{Buffer, page_bytes};
use crate::units::ByteCount;

const KEPT_MAX: usize = 4;
/// A larger buffer is not kept.
const KEPT_BYTES: usize = 2 << 20;

static KEPT: ForkMutex<Vec<Buffer>> = ForkMutex::new(Vec::new());

/// A buffer of at least `len` bytes, of unspecified content.
///
/// # Errors
/// When the address space has no room.
pub fn take(len: ByteCount) -> Result<Buffer, MapError> {
    let want = len.as_usize().next_multiple_of(page_bytes());
    let mut kept = KEPT.lock();
    match kept.iter().position(|buffer| buffer.capacity() >= want) {
        Some(index) => Ok(kept.swap_remove(index)),
        None => {
            drop(kept);
            Buffer::new(len)
        }
    }
}

/// Gives a buffer back.
pub fn give(buffer: Buffer) {
    if buffer.capacity() > KEPT_BYTES {
        return;
    }
    let mut kept = KEPT.lock();
    let surplus = (kept.len() >= KEPT_MAX).then(|| kept.remove(0));
    kept.push(buffer);
    drop(kept);
    drop(surplus);
}

/// Frees what is kept, when the last mapping goes.
pub fn clear() {
    let kept = std::mem::take(&mut *KEPT.lock());
    drop(kept);
}

/// Forgets the lock, in the child of a fork.
///
/// # Safety
/// Only in the child of a fork while it has one thread.
#[allow(unsafe_code)]
pub unsafe fn reset_in_child() {
    // SAFETY: one thread (contract); what the parent kept is leaked, a few pages of address space.
    unsafe { KEPT.replace_in_child(Vec::new()) }
}
