//! What the two userfaultfd pmaps share: installing, protecting, moving and removing pages.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, RawFd};

use super::Tracking;
use crate::sys::lock::Mutex;
use crate::sys::memory::{self, HUGE_BYTES, Range};
use crate::sys::pagemap::Pagemap;
use crate::sys::process;
use crate::sys::userfaultfd::{
    Access, FEATURE_MOVE, FEATURE_PAGEFAULT_FLAG_WP, FEATURE_WP_ASYNC, FEATURE_WP_UNPOPULATED, Userfaultfd,
};

/// Bytes of a scratch range that is kept for the next eviction.
const SCRATCH: usize = HUGE_BYTES;
const KEPT_MAX: usize = 4;

/// A userfaultfd and what goes with it.
pub struct Frames {
    /// The descriptor.
    pub uffd: Userfaultfd,
    tracking: Tracking,
    pagemap: Option<Pagemap>,
    scratch: Mutex<Vec<Range>>,
}

/// How writes can be noticed with these features of the kernel, best first.
pub fn trackings(features: u64) -> Vec<Tracking> {
    let asynchronous = FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED | FEATURE_MOVE;
    let mut known = Vec::new();
    if features & asynchronous == asynchronous && Pagemap::open().is_ok() {
        known.push(Tracking::WpAsync);
    }
    if features & FEATURE_PAGEFAULT_FLAG_WP != 0 {
        known.push(Tracking::WpSync);
    }
    known
}

fn features_of(tracking: Tracking) -> u64 {
    match tracking {
        Tracking::WpAsync => {
            FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED | FEATURE_PAGEFAULT_FLAG_WP | FEATURE_MOVE
        }
        Tracking::WpSync => FEATURE_PAGEFAULT_FLAG_WP,
        Tracking::None | Tracking::Mprotect | Tracking::Calls => 0,
    }
}

impl Frames {
    /// Opens a userfaultfd with `features` and those that `tracking` needs.
    ///
    /// # Errors
    /// The errno.
    pub fn open(access: Access, features: u64, tracking: Tracking) -> Result<Self, i32> {
        let pagemap = if tracking == Tracking::WpAsync { Some(Pagemap::open()?) } else { None };
        let uffd = Userfaultfd::open(access, features | features_of(tracking))?;
        Ok(Frames { uffd, tracking, pagemap, scratch: Mutex::new(Vec::new()) })
    }

    /// How writes are noticed.
    pub fn tracking(&self) -> Tracking {
        self.tracking
    }

    /// Starts taking the faults of a range.
    pub fn enter(&self, range: Range, writable: bool) -> Result<(), i32> {
        if writable && self.tracking == Tracking::None {
            return Err(libc::ENOTSUP);
        }
        self.uffd.register(range, writable)
    }

    /// Stops taking the faults of a range.
    pub fn leave(&self, range: Range) {
        let _ = self.uffd.unregister(range); // fails only for a range that was never registered
    }

    /// Installs a copy of `bytes`.
    pub fn install(&self, start: usize, bytes: &[u8], protected: bool) -> Result<(), i32> {
        // SAFETY: the fault layer installs only whole pages of entered ranges.
        unsafe { self.uffd.copy(start, bytes, protected) }
    }

    /// Removes pages.
    pub fn remove(&self, ranges: &[Range]) {
        // SAFETY: ranges of entered mappings whose pages the caller owns (EVICTING, LOADING).
        unsafe { memory::discard(ranges) }
    }

    /// Protects pages, or allows writes again.
    pub fn protect(&self, range: Range, on: bool) -> Result<(), i32> {
        self.uffd.write_protect(range, on)
    }

    /// The pages written since they were protected; protects them again.
    pub fn take_written(&self, range: Range, found: &mut dyn FnMut(Range)) -> Result<(), i32> {
        self.pagemap.as_ref().ok_or(libc::ENOTSUP)?.take_written(range, found)
    }

    /// The pages written since they were protected, some of them more than once.
    pub fn look_at_written(&self, range: Range, found: &mut dyn FnMut(Range)) -> Result<(), i32> {
        self.pagemap.as_ref().ok_or(libc::ENOTSUP)?.look_at_written(range, found)
    }

    /// An empty range of at least `len` bytes that pages can be moved to.
    pub fn take_scratch(&self, len: usize) -> Result<Range, i32> {
        let mut kept = self.scratch.lock();
        if let Some(index) = kept.iter().position(|range| range.len >= len) {
            return Ok(kept.swap_remove(index));
        }
        drop(kept);
        let len = len.max(SCRATCH);
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let range = memory::reserve_aligned(len, HUGE_BYTES, prot).map_err(|_| libc::ENOMEM)?;
        // SAFETY: a new range of ours. A forked child has no use for it.
        let _ = unsafe { memory::advise(range, libc::MADV_DONTFORK) };
        self.uffd.register(range, false).inspect_err(|_| {
            // SAFETY: a new range that nothing refers to.
            unsafe { memory::unmap(range) }
        })?;
        Ok(range)
    }

    /// Gives a scratch range back, whose first `used` bytes may hold pages.
    pub fn give_scratch(&self, range: Range, used: usize) {
        self.remove(&[Range { start: range.start, len: used }]);
        let mut kept = self.scratch.lock();
        if range.len == SCRATCH && kept.len() < KEPT_MAX {
            kept.push(range);
        } else {
            // SAFETY: a range of ours that nothing refers to.
            unsafe { memory::unmap(range) }
        }
    }

    /// Moves pages from `src` to `dst`, all or none.
    pub fn move_pages(&self, dst: usize, src: Range) -> Result<(), i32> {
        // SAFETY: `src` is owned by the caller (EVICTING) or scratch, `dst` the other and empty.
        let (moved, refused) = unsafe { self.uffd.move_pages(dst, src) };
        let Some(errno) = refused else { return Ok(()) };
        if moved > 0 {
            // SAFETY: the way back of what was just moved; its source is empty still, as the
            // page's owner lets nobody fill it, and `dst` is plain memory of ours.
            unsafe {
                let (back, _) = self.uffd.move_pages(src.start, Range { start: dst, len: moved });
                let rest = std::slice::from_raw_parts((dst + back) as *const u8, moved - back);
                self.uffd.copy(src.start + back, rest, false)?;
            }
        }
        Err(errno)
    }

    /// Closes the descriptors in the child of a fork.
    pub fn forget_in_child(&self) {
        process::close_inherited(self.uffd.as_raw_fd());
        if let Some(pagemap) = &self.pagemap {
            process::close_inherited(pagemap.as_raw_fd());
        }
    }
}

impl AsRawFd for Frames {
    fn as_raw_fd(&self) -> RawFd {
        self.uffd.as_raw_fd()
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        for range in self.scratch.lock().drain(..) {
            // SAFETY: ranges of ours that nothing refers to.
            unsafe { memory::unmap(range) }
        }
    }
}
