//! How a region grows and shrinks: in place, into addresses held for it, or to another place.
//!
//! A file, and private memory, grow in their one map entry (mremap(2)). Shared memory of no file is an
//! object of the size it was born with: it grows by further ones, and so has several map entries, which
//! move by being shown at the new place before they go from the old.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use super::{HOLD, Region, hold, map_free, rounded, sys_io};
use crate::errors::MapError;
use crate::sys::backing::Backing;
use crate::sys::memory::{self, Range};
use crate::sys::mmap::{self, Request};

impl Region {
    /// Changes how many bytes are mapped. With `views` on it, it stays where it is and does not
    /// shrink; `false` says that this could not be.
    ///
    /// # Errors
    /// `Invalid`, `Sys`.
    pub fn resize(&mut self, size: u64, views: bool) -> Result<bool, MapError> {
        let too_large = || MapError::Invalid(format!("{size} bytes cannot be mapped"));
        let len = rounded(self.slack as u64 + size, self.page).ok_or_else(too_large)?;
        if views && size < self.size {
            return Ok(false);
        }
        self.uncover();
        if self.wishes.is_leashed() {
            // The leashes of walks have split it: mremap(2) takes one map entry.
            // SAFETY: pages of the region; the advice takes nothing.
            let _ = unsafe { mmap::advise(self.range, libc::MADV_RANDOM) };
        }
        let before = self.range.len;
        if self.size == 0 && size > 0 {
            self.map_more(self.range.start, before)?; // nothing of the file was, see `map`
        }
        if len < before {
            self.shrink(len)?;
        } else if len > before && !self.grow(len, views)? {
            return Ok(false);
        }
        if let Err(refused) = self.extend_file(size) {
            if len > before {
                self.shrink(before)?;
            }
            return Err(refused);
        }
        self.size = size;
        Ok(true)
    }

    /// Makes a file that is stored to as long as a mapping of `size` bytes of it.
    fn extend_file(&self, size: u64) -> Result<(), MapError> {
        let writes = self.is_shared_writable();
        let Some(backing) = self.backing.as_ref().filter(|file| writes && file.is_regular()) else {
            return Ok(());
        };
        let end = self.offset + self.slack as u64 + size;
        backing.extend(end).map_err(|error| sys_io("ftruncate", &error))
    }

    fn shrink(&mut self, len: usize) -> Result<(), MapError> {
        let tail = Range { start: self.range.start + len, len: self.range.len - len };
        if self.holds {
            hold(tail)?;
        } else {
            // SAFETY: the end of the region; nothing refers to it (no views, see `resize`).
            unsafe { mmap::unmap(tail) }.map_err(|errno| MapError::sys("munmap", errno))?;
            self.reserved = len;
        }
        self.range.len = len;
        let end = self.range.end();
        let cut = |part: &Range| Range { start: part.start, len: part.end().min(end) - part.start };
        self.holes = self.holes.iter().filter(|hole| hole.start < end).map(cut).collect();
        self.parts.retain(|(part, _)| part.start < end);
        self.parts.iter_mut().for_each(|(part, _)| *part = cut(part));
        self.joins.retain(|join| *join < len);
        Ok(())
    }

    fn grow(&mut self, len: usize, views: bool) -> Result<bool, MapError> {
        let old = self.range;
        let joins = self.grows_by_objects();
        if len > self.reserved {
            if self.home().is_some() {
                return Ok(false); // what follows is the arena's
            }
            let stays = views || self.holds;
            let has_room = if joins { self.hold_more(len, stays)? } else { self.remap(len, stays)? };
            if !has_room || !joins {
                return Ok(has_room);
            }
        }
        self.map_more(self.range.start + old.len, len - old.len)?;
        self.range.len = len;
        if joins {
            self.joins.push(old.len);
        }
        Ok(true)
    }

    /// Whether it is shared memory of no file: anonymous, or of /dev/zero.
    fn grows_by_objects(&self) -> bool {
        const ZERO: (u32, u32) = (1, 5); // Documentation/admin-guide/devices.txt of Linux
        let is_zero = |file: &File| {
            let device = file.metadata()?.rdev();
            Ok((libc::major(device), libc::minor(device)) == ZERO)
        };
        let of_memory =
            |backing: &Backing| !backing.is_regular() && backing.with_file(is_zero).unwrap_or(false);
        !self.is_private() && self.backing.as_deref().is_none_or(of_memory)
    }

    /// Makes it longer in one map entry, with mremap(2); `false` where it may not move and has no room.
    fn remap(&mut self, len: usize, stays: bool) -> Result<bool, MapError> {
        let old = self.range;
        let whole = || Range { start: old.start, len: old.len };
        // SAFETY: in place no address goes; moving is for a region that nothing refers to.
        let moved = unsafe {
            match mmap::resize(whole(), len, false) {
                // No room behind it, or (EFAULT) several map entries.
                Err(libc::ENOMEM | libc::EFAULT) if stays => return Ok(false),
                Err(libc::ENOMEM) => mmap::resize(whole(), len, true),
                done => done,
            }
        };
        self.range = moved.map_err(|errno| MapError::sys("mremap", errno))?;
        self.reserved = len;
        self.carry_parts(old.start);
        Ok(true)
    }

    /// Holds addresses behind shared memory of no file, or shows it anew where there are enough.
    fn hold_more(&mut self, len: usize, stays: bool) -> Result<bool, MapError> {
        let old = self.range;
        let behind = Request {
            address: old.end(),
            len: len - old.len,
            prot: libc::PROT_NONE,
            flags: HOLD | libc::MAP_FIXED_NOREPLACE,
            fd: -1,
            offset: 0,
        };
        if map_free(&behind).is_ok() {
            self.reserved = len;
            return Ok(true);
        }
        if stays {
            return Ok(false);
        }
        let place = memory::reserve_aligned(len, self.page, libc::PROT_NONE)?;
        if let Err(refused) = self.show_at(place.start) {
            // SAFETY: just held; nothing refers to it.
            unsafe { memory::unmap(place) };
            return Err(refused);
        }
        // SAFETY: nothing refers to the old addresses, and all of it is shown at the new ones.
        unsafe { memory::unmap(old) };
        (self.range, self.reserved) = (Range { start: place.start, len: old.len }, len);
        self.carry_parts(old.start);
        Ok(true)
    }

    /// Shows all of its objects at another address as well, parts as they are.
    fn show_at(&self, start: usize) -> Result<(), MapError> {
        let there = |range: &Range| Range { start: range.start - self.range.start + start, len: range.len };
        let ends = self.joins.iter().copied().chain([self.range.len]);
        for (from, to) in std::iter::once(0).chain(self.joins.iter().copied()).zip(ends) {
            let piece = Range { start: start + from, len: to - from };
            // SAFETY: addresses of the caller's; the region is shared memory.
            unsafe { mmap::show_again(self.range.start + from, piece) }
                .map_err(|errno| MapError::sys("mremap", errno))?;
        }
        let whole = (Range { start: self.range.start, len: self.range.len }, self.prot);
        for (part, prot) in std::iter::once(&whole).chain(&self.parts) {
            // SAFETY: as above.
            unsafe { mmap::protect(there(part), *prot) }.map_err(|errno| MapError::sys("mprotect", errno))?;
        }
        self.holes.iter().try_for_each(|hole| hold(there(hole)))
    }

    /// Has parts and holes of it be where it is now.
    fn carry_parts(&mut self, old_start: usize) {
        let start = self.range.start;
        let here = |part: &mut Range| part.start = part.start - old_start + start;
        self.holes.iter_mut().for_each(here);
        self.parts.iter_mut().for_each(|(part, _)| here(part));
    }

    /// Maps what follows, over addresses of the region's own.
    fn map_more(&self, start: usize, len: usize) -> Result<(), MapError> {
        let at = self.offset + (start - self.range.start) as u64;
        let offset = if self.grows_by_objects() { 0 } else { at.cast_signed() };
        let flags = (self.flags & !libc::MAP_FIXED_NOREPLACE) | libc::MAP_FIXED;
        let map = |fd| {
            let request = Request { address: start, len, prot: self.prot, flags, fd, offset };
            // SAFETY: addresses that are held for the region, or just came to it.
            unsafe { mmap::map(&request) }.map_err(|errno| MapError::sys("mmap", errno))
        };
        match &self.backing {
            None => map(-1)?,
            Some(backing) => backing
                .with_file(|file| Ok(map(file.as_raw_fd())))
                .map_err(|error| sys_io("open", &error))??,
        };
        Ok(())
    }
}
