//! What was stored to a file and could not be written back.
//!
//! The kernel takes a page that it could not write for clean, says so once to each description of the file,
//! and forgets the page when it wants the memory. So a failure is kept, here, until a sync has succeeded:
//! meanwhile quire takes nothing out of the page cache, and has the kernel write all again that is there of
//! the mapping (`Backing::store_again`). The first sync after a failure raises in any case, as what the
//! kernel took in between is not known.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};

use super::{Region, Wishes};
use crate::errors::{FaultCode, MapError, StoreError};
use crate::interrupt::PageError;
use crate::sys::backing::Backing;
use crate::sys::memory::{Range, page_bytes};
use crate::sys::mmap;
use crate::units::ByteOffset;

/// The last failure to write back that no sync has mended.
#[derive(Debug, Default)]
pub struct Unwritten {
    /// 0 for none.
    errno: AtomicI32,
    offset: AtomicU64,
    /// A sync has raised it.
    told: AtomicBool,
}

impl Unwritten {
    /// Whether there is one.
    pub fn is_there(&self) -> bool {
        self.errno.load(Ordering::Acquire) != 0
    }

    /// Keeps one, which was met at a byte of the file.
    fn keep(&self, errno: i32, offset: u64, told: bool) {
        self.offset.store(offset, Ordering::Relaxed);
        self.told.store(told, Ordering::Relaxed);
        self.errno.store(errno, Ordering::Release);
    }

    /// Forgets it.
    pub fn forget(&self) {
        self.errno.store(0, Ordering::Release);
    }

    /// The same for the other part of a mapping that is split.
    pub fn copy_of(&self) -> Unwritten {
        let copy = Unwritten::default();
        let at = self.offset.load(Ordering::Relaxed);
        copy.keep(self.errno.load(Ordering::Acquire), at, self.told.load(Ordering::Relaxed));
        copy
    }

    fn error(&self) -> Option<StoreError> {
        let errno = self.errno.load(Ordering::Acquire);
        (errno != 0).then(|| error_of(errno, self.offset.load(Ordering::Relaxed)))
    }
}

fn error_of(errno: i32, offset: u64) -> StoreError {
    let said = crate::sys::errno_message(errno);
    let message = if errno == libc::EBUSY {
        format!("pages of the mapping are locked, so they cannot be invalidated: unlock() first ({said})")
    } else {
        format!(
            "what was stored could not all be written back: {said}; it is kept in memory: mend what is in the way \
             (a full or failing disk), and sync again until that succeeds"
        )
    };
    StoreError {
        code: FaultCode::WriteBack,
        offset: ByteOffset(offset),
        errno: Some(errno),
        message,
        part: None,
    }
}

/// What is written back of a region, while it is in use.
pub struct Stored {
    range: Range,
    /// Byte of the file at the start of the range.
    offset: u64,
    backing: Option<Arc<Backing>>,
    /// It is shared.
    writes: bool,
    wishes: Arc<Wishes>,
}

impl Stored {
    /// Of a region.
    pub fn of(region: &Region) -> Stored {
        Stored {
            range: region.range,
            offset: region.offset,
            backing: region.backing.clone(),
            writes: !region.is_private(),
            wishes: Arc::clone(&region.wishes),
        }
    }

    /// msync(2) of some of its pages; of all of them after a failure.
    ///
    /// # Errors
    /// A failure, with the byte of the file at which it was met: by this sync, or since the last one.
    pub fn sync(&self, part: Range, flags: i32) -> Result<(), StoreError> {
        let unwritten = &self.wishes.unwritten;
        if unwritten.is_there() {
            return self.sync_again(flags);
        }
        let at = self.offset + (part.start - self.range.start) as u64;
        mmap::sync(part, flags).map_err(|errno| {
            self.refused(errno, at, true);
            error_of(errno, at)
        })
    }

    /// The same of the whole file by a descriptor, wherever its pages are mapped just now.
    ///
    /// # Errors
    /// As [`Stored::sync`].
    pub fn sync_file(&self, flags: i32) -> Result<(), StoreError> {
        let Some(backing) = self.backing.as_ref().filter(|_| flags & libc::MS_SYNC != 0) else {
            return Ok(());
        };
        backing.with_file(std::fs::File::sync_data).map_err(|error| {
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            self.refused(errno, self.offset, true);
            error_of(errno, self.offset)
        })
    }

    fn sync_again(&self, flags: i32) -> Result<(), StoreError> {
        let unwritten = &self.wishes.unwritten;
        if flags & libc::MS_SYNC == 0 {
            return unwritten.error().map_or(Ok(()), Err);
        }
        self.store_again();
        if let Err(errno) = mmap::sync(self.range, flags) {
            self.refused(errno, self.offset, true);
            return Err(error_of(errno, self.offset));
        }
        if !unwritten.told.swap(true, Ordering::AcqRel) {
            return unwritten.error().map_or(Ok(()), Err);
        }
        unwritten.forget();
        if self.wishes.is_leashed() {
            self.drop_all(); // what was kept meanwhile
        }
        Ok(())
    }

    /// Has the page cache drop a part of the file that is no longer mapped, what was stored being written
    /// first; a failure is kept.
    pub fn drop_cached(&self, offset: u64, len: u64) {
        if self.wishes.unwritten.is_there() {
            return; // more of the same would be lost
        }
        let Some(backing) = &self.backing else { return };
        if let Err(errno) = backing.drop_cached(offset, len, self.is_writable()) {
            self.refused(errno, offset, false);
        }
    }

    /// As [`Stored::drop_cached`], of all of it.
    pub fn drop_all(&self) {
        // SAFETY: pages of a region that is in use, none of its own; the advice takes nothing from a file.
        let _ = unsafe { mmap::advise(self.range, libc::MADV_DONTNEED) };
        self.drop_cached(self.offset, self.range.len as u64);
    }

    fn is_writable(&self) -> bool {
        self.writes && self.backing.as_ref().is_some_and(|file| file.is_writable())
    }

    /// Keeps a failure, and what was not written.
    fn refused(&self, errno: i32, offset: u64, told: bool) {
        // Of locked pages and holes the kernel says so, and has written the rest.
        if self.is_writable() && !matches!(errno, libc::EBUSY | libc::ENOMEM | libc::EINVAL) {
            self.wishes.unwritten.keep(errno, offset, told);
            self.store_again();
        }
    }

    fn store_again(&self) {
        if let Some(backing) = self.backing.as_ref().filter(|_| self.is_writable()) {
            // Refused where nothing can be written any more: what is in memory stays as it is.
            let _ = backing.store_again(self.offset, self.range.len);
        }
    }
}

impl Region {
    /// Whether pages of it can be taken from memory at any time.
    ///
    /// # Errors
    /// Why not, for a person.
    pub fn can_be_bounded(&self) -> Result<(), &'static str> {
        let Some(file) = &self.backing else {
            return Err(
                "the kernel keeps no budget for anonymous memory, which has no other home than memory",
            );
        };
        if !file.is_cached() {
            return Err("the kernel keeps no budget for this device: its memory is not the page cache's");
        }
        if !file.is_on_disk() || self.page != page_bytes() {
            return Err(
                "the kernel keeps no budget for a file in memory, whose pages have no other home than memory",
            );
        }
        if self.is_private() && self.was_writable {
            return Err(
                "the kernel keeps no budget for a private mapping that is or was writable: pages that were \
                        stored to have no other home than memory",
            );
        }
        Ok(())
    }

    /// Refuses a protection by which pages would come that a budget must not take.
    pub(super) fn require_unbounded(&self, prot: i32) -> Result<(), MapError> {
        if self.is_private() && prot & libc::PROT_WRITE != 0 && self.wishes.is_bounded() {
            return Err(MapError::Invalid(
                "a private mapping with a budget cannot be made writable, as pages that are stored to have no other \
                 home than memory: end the budget first, with set_budget(None)"
                    .into(),
            ));
        }
        Ok(())
    }

    /// What could not be written back.
    pub fn unwritten(&self) -> Option<PageError> {
        let error = self.wishes.unwritten.error()?;
        let page = error.offset.0.saturating_sub(self.offset) / self.page as u64;
        Some(PageError { error, source: self.source.as_ref().into(), page, mapping: self.id })
    }
}
