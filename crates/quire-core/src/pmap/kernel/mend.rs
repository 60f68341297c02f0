//! Faults of a region that the kernel answers with a signal: what is behind one, what the page shows for
//! as long as the exception takes, and how it comes back.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::sync::atomic::{Ordering, compiler_fence};

use super::{Cover, Region};
use crate::counters::count;
use crate::errors::{FaultCode, StoreError};
use crate::interrupt::{self, PageError};
use crate::sys::backing::Cause;
use crate::sys::memory::{self, Range, Touch};
use crate::sys::mmap;
use crate::units::ByteOffset;

const FILLER: u8 = 0xFF;

/// What has become of a fault.
pub enum Mended {
    /// Nothing can be done: the signal goes on to whoever comes next.
    No,
    /// The instruction can run again, and would succeed.
    Again,
    /// As `Again`, with filler, and this is to be told.
    Told(PageError),
}

impl Region {
    /// Takes a fault at `address`, which is of this region; one that came time and again without a
    /// reason (`insists`) is an I/O error.
    pub fn mend(&mut self, signal: i32, address: usize, touch: Touch, insists: bool) -> Mended {
        let page = (address - self.range.start) / self.page * self.page + self.range.start;
        if self.covered.iter().any(|(covered, _)| *covered == page) {
            // Another thread met it first; this one is told as well.
            return self.failure.as_ref().map_or(Mended::Again, |(error, _)| Mended::Told(error.clone()));
        }
        let unknown = || {
            let offset = ByteOffset(self.offset + (address - self.range.start) as u64);
            self.error_of(Cause::Refused(libc::EIO), offset)
        };
        let reason = self.judge(signal, address, page, touch);
        let Some(error) = reason.or_else(|| insists.then(unknown).flatten()) else { return Mended::Again };
        let refused = error.code == FaultCode::Protection && !self.allows(address, touch);
        let covered = if refused && self.is_private() { self.open(page) } else { self.cover(page) };
        if !covered {
            return Mended::No;
        }
        count(&self.errors);
        let index = (page - self.range.start) / self.page;
        let error =
            PageError { error, source: self.source.as_ref().into(), page: index as u64, mapping: self.id };
        self.failure = Some((error.clone(), touch));
        Mended::Told(error)
    }

    /// Why the page cannot be touched so; `None` when it can by now.
    fn judge(&self, signal: i32, address: usize, page: usize, touch: Touch) -> Option<StoreError> {
        let offset = ByteOffset(self.offset + (address - self.range.start) as u64);
        let error = |code, message: &str| Some(StoreError::new(code, offset, message));
        if self.is_arena() {
            return Some(self.nothing_placed(address));
        }
        if address - self.range.start >= self.range.len {
            return error(
                FaultCode::Closed,
                "a touch beyond the mapping, of addresses held for its growth: resize it",
            );
        }
        if self.holes.iter().any(|hole| hole.contains(address)) {
            return error(FaultCode::Closed, "a touch of a part of the mapping that was unmapped");
        }
        if memory::is_present(page).is_none() {
            return error(
                FaultCode::Closed,
                "a touch of a mapping that the child of a fork has not inherited",
            );
        }
        if signal == libc::SIGSEGV {
            let message = match (self.allows(address, touch), touch) {
                // Made ready meanwhile, or covered by another thread just now.
                (true, _) if mmap::peek(address, &mut [0]) == 1 => return None,
                (true, _) => "a touch of a guard page; see advise(\"guard_remove\")",
                (false, Touch::Read) => "a read of memory whose protection allows none; see protect()",
                (false, _) => "a write to memory that is protected as read-only; see protect()",
            };
            return error(FaultCode::Protection, message);
        }
        let at = self.offset + (page - self.range.start) as u64;
        let writes = touch != Touch::Read && !self.is_private();
        let cause = match &self.backing {
            Some(backing) => backing.cause(at, self.page as u64, writes),
            None => Cause::Refused(libc::ENOMEM), // huge pages, or memory that has gone bad
        };
        self.error_of(cause, offset)
    }

    /// Whether the protection allows a touch.
    fn allows(&self, address: usize, touch: Touch) -> bool {
        let needed = if touch == Touch::Read { libc::PROT_READ } else { libc::PROT_WRITE };
        // Where writes are allowed the processor reads too.
        self.prot_of(address) & (needed | libc::PROT_WRITE) != 0
    }

    fn error_of(&self, cause: Cause, offset: ByteOffset) -> Option<StoreError> {
        let (code, errno, message) = match cause {
            Cause::Gone => return None,
            Cause::Truncated(len) => {
                let message = format!(
                    "the file ends after {len} bytes: it was truncated, or is shorter than its mapping; once it is \
                     long enough again the mapping is whole"
                );
                (FaultCode::Truncated, None, message)
            }
            Cause::Refused(errno @ (libc::ENOSPC | libc::EDQUOT)) => {
                let message = "there is no room for this page of a sparse file: free some space on the disk (or raise \
                               the quota) and write again";
                (FaultCode::Io, Some(errno), message.into())
            }
            Cause::Refused(libc::ENOMEM) if self.backing.is_none() => {
                let message =
                    "the kernel has no (huge) page for this memory: enlarge the pool (vm.nr_hugepages)";
                (FaultCode::Io, Some(libc::ENOMEM), message.into())
            }
            Cause::Refused(errno) => {
                let said = crate::sys::errno_message(errno);
                (FaultCode::Io, Some(errno), format!("the page cannot be had of the file or device: {said}"))
            }
        };
        Some(StoreError { code, offset, errno, message, part: None })
    }

    /// Puts filler, or what can still be read of it, in place of a page; false when that is refused.
    fn cover(&mut self, page: usize) -> bool {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let Ok(filler) = memory::reserve_aligned(self.page, self.page, access) else { return false };
        // SAFETY: fresh memory of this function's, read-write, of that length.
        let bytes = unsafe { std::slice::from_raw_parts_mut(filler.start as *mut u8, filler.len) };
        let got = mmap::peek(page, bytes);
        bytes[got..].fill(FILLER);
        let aside = self.move_aside(page);
        // SAFETY: memory of this function's goes to a page of the region, which was moved aside.
        let covered = aside.is_some() && unsafe { mmap::move_over(filler, page) }.is_ok();
        match aside {
            Some(cover) if covered => self.covered.push((page, cover)),
            Some(cover) => _ = self.put_back(page, &cover),
            None => {}
        }
        if !covered {
            // SAFETY: nothing refers to it.
            unsafe { memory::unmap(filler) }
        }
        covered
    }

    /// Moves a page out of the way, if anything is mapped there.
    fn move_aside(&self, page: usize) -> Option<Cover> {
        let range = Range { start: page, len: self.page };
        if memory::is_present(page).is_none() {
            return Some(Cover::Nothing);
        }
        let aside = memory::reserve_aligned(self.page, self.page, libc::PROT_NONE).ok()?;
        // SAFETY: fresh memory of this function's is replaced by a page of the region.
        if unsafe { mmap::move_away(range, aside.start) }.is_err() {
            // SAFETY: nothing refers to it.
            unsafe { memory::unmap(aside) };
            return None;
        }
        Some(Cover::Moved(aside.start))
    }

    fn put_back(&self, page: usize, cover: &Cover) -> bool {
        let range = Range { start: page, len: self.page };
        // SAFETY: the region's own page, and its own place, which filler has taken.
        unsafe {
            match *cover {
                Cover::Moved(aside) => mmap::move_over(Range { start: aside, len: self.page }, page).is_ok(),
                Cover::Opened(prot) => mmap::protect(range, prot).is_ok(),
                Cover::Nothing => mmap::unmap(range).is_ok(),
            }
        }
    }

    /// Lets an access to a private page happen: nobody else sees it.
    fn open(&mut self, page: usize) -> bool {
        let range = Range { start: page, len: self.page };
        let before = self.prot_of(page);
        // SAFETY: a page of the region; what is stored there stays in this mapping.
        let opened = unsafe { mmap::protect(range, before | libc::PROT_READ | libc::PROT_WRITE) };
        if opened.is_ok() {
            self.covered.push((page, Cover::Opened(before)));
        }
        opened.is_ok()
    }

    /// Puts back every page that was covered; one that cannot be (no map entry is left) the next time.
    pub fn uncover(&mut self) {
        let covered = std::mem::take(&mut self.covered);
        self.covered = covered.into_iter().filter(|(page, cover)| !self.put_back(*page, cover)).collect();
    }

    /// The error has reached its thread.
    pub fn delivered(&mut self) {
        self.uncover();
        if self.is_arena() {
            self.failure = None; // something may be placed there by now
        } else if self.backing.is_none() {
            self.failure = self.failure.take().filter(|(error, _)| error.error.code != FaultCode::Io);
        }
    }

    /// The last error that was met.
    pub fn last_failure(&self) -> Option<PageError> {
        self.failure.as_ref().map(|(error, _)| error.clone())
    }

    /// What is wrong now; what has healed is forgotten.
    pub fn failure(&mut self) -> Option<PageError> {
        let (error, touch) = self.failure.as_ref()?;
        let disk = matches!(error.error.code, FaultCode::Truncated | FaultCode::Io);
        if disk && let Some(backing) = &self.backing {
            let page = error.error.offset.0 / self.page as u64 * self.page as u64;
            let writes = *touch != Touch::Read && !self.is_private();
            if backing.cause(page, self.page as u64, writes) == Cause::Gone {
                self.uncover();
                self.failure = None;
            }
        }
        self.last_failure()
    }
}

/// What [`COPYING`] holds where this thread does not touch memory in a way that returns errors.
const IDLE: u64 = 0;
/// ... while it does, and no page was wanting; another number is the id of the mapping of one that was.
const WHOLE: u64 = u64::MAX;

thread_local! {
    static COPYING: Cell<u64> = const { Cell::new(IDLE) };
}

/// Tells the thread that touched; a [`touch`] of ours returns the error itself.
pub fn tell(error: &PageError) {
    match COPYING.get() {
        IDLE => interrupt::raise_here(error),
        _ => COPYING.set(error.mapping),
    }
}

/// Does something with memory that may be a mapping's. Where a page of it cannot be had, it has met filler,
/// and what it returns is not to be believed.
///
/// # Errors
/// The id of the mapping of which a page could not be had.
#[inline]
pub fn touch<T>(touching: impl FnOnce() -> T) -> Result<T, u64> {
    COPYING.with(|mark| {
        let before = mark.replace(WHOLE);
        compiler_fence(Ordering::SeqCst);
        let found = touching(); // a fault in it ends in `tell`
        compiler_fence(Ordering::SeqCst);
        match mark.replace(before) {
            WHOLE => Ok(found),
            id => Err(id),
        }
    })
}

/// Copies memory, one side of which may be a mapping.
///
/// # Safety
/// Both sides are mapped for as long as it takes, and writable where it writes.
///
/// # Errors
/// The id of the mapping of which a page could not be had.
pub unsafe fn copy(from: *const u8, to: *mut u8, len: usize) -> Result<(), u64> {
    // SAFETY: the caller's (contract).
    touch(|| unsafe { std::ptr::copy(from, to, len) })
}
