//! `mprotect`: SIGSEGV and page protections, for places where userfaultfd is forbidden and the kernel
//! has no guard pages. The faulting thread resolves its own fault in a signal handler. System
//! calls that touch a page which is not there fail with EFAULT.
//!
//! An absent page is inaccessible, a clean one read-only, a dirty one of a writable mapping open.
//! Neighbours of equal protection share a map entry; at worst every resident granule takes two.

use super::alias::{Alias, Granules, OPEN, READ, joined};
use super::{Kind, Pmap, RunningPmap, Tracking};
use crate::sys::memory::Range;

const HIDDEN: i32 = libc::PROT_NONE;

/// The pmap of one mapping.
pub struct MprotectPmap {
    alias: Alias,
    /// Granules that are not hidden.
    shown: Granules,
}

impl MprotectPmap {
    /// For one mapping.
    ///
    /// # Errors
    /// The errno.
    pub fn start() -> Result<Self, i32> {
        Ok(MprotectPmap { alias: Alias::new()?, shown: Granules::default() })
    }

    fn hide(&self, range: Range) -> bool {
        let hidden = self.alias.protect(range, HIDDEN).is_ok();
        if hidden {
            self.alias.free(range);
            self.shown.give(range);
        }
        hidden
    }
}

impl Pmap for MprotectPmap {
    fn kind(&self) -> Kind {
        Kind::Mprotect
    }

    fn enter(&self, range: Range, writable: bool) -> Result<(), i32> {
        self.alias.enter(range, writable)
    }

    fn leave(&self, range: Range) {
        self.shown.give(range);
    }

    fn install(&self, start: usize, bytes: &[u8], protected: bool) -> Result<(), i32> {
        let range = Range { start, len: bytes.len() };
        let open = self.alias.entered().writable && !protected;
        self.shown.take(start)?;
        let shown = self
            .alias
            .fill(start, bytes)
            .and_then(|()| self.alias.protect(range, if open { OPEN } else { READ }));
        shown.inspect_err(|_| {
            self.shown.give(range);
        })
    }

    fn remove(&self, ranges: &[Range]) {
        for run in joined(ranges) {
            if !self.hide(run) {
                // Without a map entry to spare a page stays as it is, read-only, and shows what its
                // backing holds.
                for range in ranges.iter().filter(|range| run.contains(range.start)) {
                    self.hide(*range);
                }
            }
        }
    }

    fn protect(&self, range: Range, on: bool) -> Result<(), i32> {
        self.alias.protect(range, if on { READ } else { OPEN })
    }

    fn tracking(&self) -> Tracking {
        Tracking::Mprotect
    }

    fn faults_are_signals(&self) -> bool {
        true
    }

    fn absent_is_segv(&self) -> bool {
        true
    }
}

impl RunningPmap for MprotectPmap {
    fn forget_in_child(&self) {
        self.alias.forget_in_child();
    }
}
