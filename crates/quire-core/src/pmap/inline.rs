//! `inline`: userfaultfd with SIGBUS. The faulting thread resolves its own fault in a signal
//! handler, with no other thread involved: the fastest there is, and open to ordinary users.
//! System calls that touch a page which is not there fail with EFAULT.

use super::frames::Frames;
use super::{Kind, Pmap, RunningPmap, Tracking};
use crate::sys::memory::Range;
use crate::sys::userfaultfd::{Access, FEATURE_SIGBUS};

/// The pmap.
pub struct InlinePmap(Frames);

impl InlinePmap {
    /// Opens it.
    ///
    /// # Errors
    /// The errno.
    pub fn start(tracking: Tracking) -> Result<Self, i32> {
        Frames::open(Access::UserModeOnly, FEATURE_SIGBUS, tracking).map(InlinePmap)
    }
}

impl Pmap for InlinePmap {
    fn kind(&self) -> Kind {
        Kind::Inline
    }

    fn enter(&self, range: Range, writable: bool) -> Result<(), i32> {
        self.0.enter(range, writable)
    }

    fn leave(&self, range: Range) {
        self.0.leave(range);
    }

    fn install(&self, start: usize, bytes: &[u8], protected: bool) -> Result<(), i32> {
        self.0.install(start, bytes, protected)
    }

    fn remove(&self, ranges: &[Range]) {
        self.0.remove(ranges);
    }

    fn protect(&self, range: Range, on: bool) -> Result<(), i32> {
        self.0.protect(range, on)
    }

    fn frames(&self) -> Option<&Frames> {
        Some(&self.0)
    }

    fn tracking(&self) -> Tracking {
        self.0.tracking()
    }

    fn faults_are_signals(&self) -> bool {
        true
    }
}

impl RunningPmap for InlinePmap {
    fn forget_in_child(&self) {
        self.0.forget_in_child();
    }
}
