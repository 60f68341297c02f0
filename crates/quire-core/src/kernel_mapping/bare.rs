//! Calls on pages of a mapping while nothing else is shown in their place.
//!
//! What covers a page for another thread (pmap/kernel/cover.rs) would take what is meant for the page: a sync,
//! a lock, an advice, a copy.

use std::sync::atomic::Ordering;

use super::{InUse, KernelMapping};
use crate::errors::MapError;
use crate::space::SPACE;
use crate::sys::memory::Range;

/// A call is made anew so often where other threads meet bad pages meanwhile.
const CALLS: u32 = 64;

impl KernelMapping {
    /// Makes a call on some pages, which is made again where any was covered meanwhile; `None` when one always was.
    ///
    /// # Errors
    /// The call's.
    pub(super) fn with_bare<T, E>(
        used: &InUse,
        pages: Range,
        mut call: impl FnMut() -> Result<T, E>,
    ) -> Result<Option<T>, E> {
        for _ in 0..CALLS {
            let errors = bare(used, pages);
            let done = call()?;
            if errors.is_some() && bare(used, pages) == errors {
                return Ok(Some(done));
            }
        }
        Ok(None)
    }

    /// A call of the kernel's on some pages, by its name.
    ///
    /// # Errors
    /// `Sys`.
    pub(super) fn ask_kernel(
        used: &InUse,
        pages: Range,
        name: &'static str,
        mut call: impl FnMut() -> Result<(), i32>,
    ) -> Result<(), MapError> {
        let done = Self::with_bare(used, pages, || call().map_err(|errno| MapError::sys(name, errno)))?;
        done.ok_or_else(|| MapError::Sys {
            call: name,
            errno: libc::EAGAIN,
            message: "another thread is in a call over pages that cannot be had: try again".into(),
        })
    }
}

/// How many errors there have been, if no page is covered: what was, for another thread, comes back first, and
/// whoever touches it is told.
fn bare(used: &InUse, pages: Range) -> Option<u64> {
    let start = used.range.start;
    let alone = {
        let regions = SPACE.kernel();
        let region = regions.get(&start)?;
        (!region.is_arena() && !region.is_covered(pages)).then(|| region.errors.load(Ordering::Relaxed))
    };
    if alone.is_some() {
        return alone;
    }
    let mut regions = SPACE.kernel_mut();
    let end = start + regions.get(&start)?.reserved;
    let mut errors = 0;
    for (_, region) in regions.range_mut(start..end) {
        if region.is_covered(pages) {
            region.uncover();
        }
        if region.is_covered(pages) {
            return None;
        }
        errors += region.errors.load(Ordering::Relaxed);
    }
    Some(errors)
}
