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

/// Bytes of a scratch range that is kept for the next use, how many are, and how many of them with a
/// huge page.
const SCRATCH: usize = HUGE_BYTES;
const KEPT_MAX: usize = 4;
const KEPT_FULL_MAX: usize = 2;

/// A userfaultfd and what goes with it.
pub struct Frames {
    /// The descriptor.
    pub uffd: Userfaultfd,
    tracking: Tracking,
    pagemap: Option<Pagemap>,
    scratch: Mutex<Vec<Scratch>>,
}

/// Memory of ours that pages are moved to and from, by [`Frames`]: aligned to huge pages, and made of
/// them where it is filled while it is empty.
pub struct Scratch {
    range: Range,
    /// Holds a huge page with the bytes of another time.
    full: bool,
}

impl Scratch {
    /// Where it is.
    pub fn start(&self) -> usize {
        self.range.start
    }

    /// The first `len` bytes.
    pub fn slice_mut(&mut self, len: usize) -> &mut [u8] {
        assert!(len <= self.range.len, "a slice of a scratch range lies inside it");
        // SAFETY: mapped read-write while `self` lives; exclusive by `&mut self`; in bounds.
        unsafe { std::slice::from_raw_parts_mut(self.range.start as *mut u8, len) }
    }

    fn empty(&mut self, used: usize) {
        // SAFETY: memory of ours whose content is not needed any more.
        unsafe { memory::discard(&[Range { start: self.range.start, len: used }]) }
        self.full = false;
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: a range of ours; no borrow outlives `self`.
        unsafe { memory::unmap(self.range) }
    }
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

    /// As [`Frames::take_written`], but protects nothing.
    pub fn look_at_written(&self, range: Range, found: &mut dyn FnMut(Range)) -> Result<(), i32> {
        self.pagemap.as_ref().ok_or(libc::ENOTSUP)?.look_at_written(range, found)
    }

    /// An empty scratch range of at least `len` bytes, which pages can be moved to.
    pub fn take_scratch(&self, len: usize) -> Result<Scratch, i32> {
        let mut scratch = self.take(len, false)?;
        if scratch.full {
            scratch.empty(SCRATCH);
        }
        Ok(scratch)
    }

    /// A scratch range of at least `len` bytes that pages are to be filled in, and moved from: best one
    /// that has a page from before, which saves the kernel the zeros of a new one.
    pub fn take_staging(&self, len: usize) -> Result<Scratch, i32> {
        self.take(len, true)
    }

    fn take(&self, len: usize, full: bool) -> Result<Scratch, i32> {
        let mut kept = self.scratch.lock();
        let fits = |scratch: &Scratch| scratch.range.len >= len;
        let best = kept.iter().position(|scratch| fits(scratch) && scratch.full == full);
        if let Some(index) = best.or_else(|| kept.iter().position(fits)) {
            return Ok(kept.swap_remove(index));
        }
        drop(kept);
        let len = len.next_multiple_of(SCRATCH);
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let range = memory::reserve_aligned(len, HUGE_BYTES, prot).map_err(|_| libc::ENOMEM)?;
        let scratch = Scratch { range, full: false };
        // SAFETY: a new range of ours. A forked child has no use for it; a kernel without huge pages
        // refuses the advice, and needs it not.
        unsafe {
            let _ = memory::advise(range, libc::MADV_DONTFORK);
            let _ = memory::advise(range, libc::MADV_HUGEPAGE);
        }
        self.uffd.register_scratch(range)?;
        Ok(scratch)
    }

    /// Gives a scratch range back, whose first `used` bytes may hold pages.
    pub fn give_scratch(&self, mut scratch: Scratch, used: usize) {
        scratch.empty(used);
        self.keep(scratch);
    }

    fn keep(&self, scratch: Scratch) {
        let mut kept = self.scratch.lock();
        if scratch.range.len == SCRATCH && kept.len() < KEPT_MAX {
            kept.push(scratch);
        }
    }

    /// Whether pages can be moved into mappings, as huge ones.
    pub fn moves_huge_pages(&self) -> bool {
        self.tracking == Tracking::WpAsync && memory::has_huge_pages()
    }

    /// Moves the first `len` bytes of a scratch range to `start`, absent pages of a read-only mapping, and
    /// wakes who waits there. Returns how many bytes were moved, from the start on.
    ///
    /// The kernel moves pages between writable memory only, and leaves them open to writes: so the range is
    /// writable for these few microseconds. A thread that waits for it is woken afterwards.
    pub fn move_in(&self, start: usize, scratch: &mut Scratch, len: usize) -> usize {
        let to = Range { start, len };
        // A page table that faults or small pages have left there would have the huge page split.
        self.remove(&[to]);
        let moved = Self::while_writable(to, || {
            // SAFETY: scratch of ours; absent pages of an entered range, which the caller owns (LOADING).
            unsafe { self.uffd.move_pages(start, Range { start: scratch.range.start, len }).0 }
        });
        scratch.full &= moved == 0;
        let _ = self.uffd.wake(to); // fails only for an invalid range
        moved
    }

    /// Takes the huge page at `range`, of a read-only mapping, for the next [`Frames::take_staging`]; false
    /// when there are enough, or the kernel does not give it.
    pub fn recycle(&self, range: Range) -> bool {
        if self.scratch.lock().iter().filter(|scratch| scratch.full).count() >= KEPT_FULL_MAX {
            return false;
        }
        let Ok(mut scratch) = self.take_scratch(range.len) else { return false };
        let moved = Self::while_writable(range, || {
            // SAFETY: pages that the caller owns (EVICTING); scratch of ours, which is empty.
            unsafe { self.uffd.move_pages(scratch.range.start, range).0 }
        });
        if moved < range.len {
            scratch.empty(moved); // what is left in its place goes with the caller's removal
        }
        scratch.full = moved == range.len;
        self.keep(scratch);
        moved == range.len
    }

    /// Calls `work` while a range of a read-only mapping is writable; 0 when it cannot be.
    fn while_writable(range: Range, work: impl FnOnce() -> usize) -> usize {
        let writable = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a range of an entered mapping whose pages the caller owns. The way back joins map
        // entries; were it refused, only a stray write would go unnoticed.
        unsafe {
            if memory::protect(range, writable).is_err() {
                return 0; // no map entry left
            }
            let done = work();
            let _ = memory::protect(range, libc::PROT_READ);
            done
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
