//! `inline`: userfaultfd with SIGBUS. The faulting thread resolves its own fault in a signal
//! handler, with no other thread involved: the fastest there is, and open to ordinary users.
//! System calls that touch a page which is not there fail with EFAULT.
#![allow(unsafe_code)]

use std::os::fd::AsRawFd;

use super::{Pmap, RunningPmap};
use crate::sys::memory::{self, Range};
use crate::sys::process;
use crate::sys::userfaultfd::{Access, FEATURE_SIGBUS, Userfaultfd};

/// The pmap.
pub struct InlinePmap(Userfaultfd);

impl InlinePmap {
    /// Opens it.
    ///
    /// # Errors
    /// The errno.
    pub fn start() -> Result<Self, i32> {
        Userfaultfd::open(Access::UserModeOnly, FEATURE_SIGBUS).map(InlinePmap)
    }
}

impl Pmap for InlinePmap {
    fn name(&self) -> &'static str {
        "inline"
    }

    fn enter(&self, range: Range) -> Result<(), i32> {
        self.0.register(range)
    }

    fn leave(&self, range: Range) {
        let _ = self.0.unregister(range); // fails only for a range that was never registered
    }

    fn install(&self, start: usize, bytes: &[u8]) -> Result<(), i32> {
        // SAFETY: the fault layer installs only whole pages of entered ranges.
        unsafe { self.0.copy(start, bytes) }
    }

    fn poison(&self, _range: Range) -> Result<(), i32> {
        Err(libc::ENOTSUP)
    }

    fn remove(&self, ranges: &[Range]) {
        // SAFETY: ranges of entered mappings whose pages the caller owns (EVICTING, LOADING).
        unsafe { memory::discard(ranges) }
    }

    fn wake(&self, _range: Range) {}

    fn faults_are_signals(&self) -> bool {
        true
    }
}

impl RunningPmap for InlinePmap {
    fn stop(&self) {}

    fn forget_in_child(&self) {
        process::close_inherited(self.0.as_raw_fd());
    }
}
