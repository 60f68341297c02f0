//! What a memory object knows of its dirty pages on their way back.

use std::ops::Range as Span;

use crate::range_set::RangeSet;
use crate::sys::fork::ForkMutex;
use crate::units::PageIndex;

/// Ranges noted since the last sync; more are noted as one that holds them all.
const NOTED_MAX: usize = 1 << 16;

/// What a memory object knows of its pages on their way back.
#[derive(Default)]
pub struct Dirty {
    /// Held over a scan for written pages and the notes made of it.
    pub scan: ForkMutex<Leaving>,
    /// One sync at a time.
    pub syncing: ForkMutex<()>,
    /// Bytes of the store that are not known to be durable.
    pub noted: ForkMutex<Noted>,
}

/// Pages that are being written back by evictions.
#[derive(Default)]
pub struct Leaving(pub Vec<PageIndex>);

/// Bytes of the store.
#[derive(Default)]
pub struct Noted {
    /// Written since the last successful sync of the store: not known to be durable.
    pub written: RangeSet,
    /// Written, but the store failed to make them durable: to be written again.
    pub lost: RangeSet,
}

impl Dirty {
    /// Forgets all, in the child of a fork.
    ///
    /// # Safety
    /// Only in the child of a fork while it has one thread, which is in no call of this object.
    #[allow(unsafe_code)]
    pub unsafe fn reset_in_child(&self) {
        // SAFETY: one thread (contract).
        unsafe {
            self.scan.replace_in_child(Leaving::default());
            self.syncing.replace_in_child(());
            self.noted.replace_in_child(Noted::default());
        }
    }

    /// Notes bytes that were written to the store.
    pub fn note_written(&self, span: Span<u64>) {
        let written = &mut self.noted.lock().written;
        written.add(span);
        if written.len() > NOTED_MAX {
            let start = written.iter().next().map_or(0, |first| first.start);
            let end = written.iter().last().map_or(0, |last| last.end);
            written.add(start..end);
        }
    }
}
