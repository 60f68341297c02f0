//! Pmap `kernel`: the operating system's own mapping. The kernel loads, writes back and evicts; quire
//! hides alignment, holds addresses for growth, and stands behind every page that cannot be had.
//!
//! ```text
//!   range.start                                     range.end       start + reserved
//!   |slack|<------------ size --------------->|rest of page|  held, inaccessible  |
//!   page of the file that holds `offset`
//! ```
//!
//! A page whose touch is a signal is *covered* (`cover.rs`): it is moved aside as it is, with mremap(2), and
//! filler takes its address, so that the instruction can go on to the exception. When the exception has
//! been delivered the page is moved back (`uncover`), and the next touch meets whatever is true by then:
//! a file that was extended again has healed.
#![allow(unsafe_code)]

pub mod arena;
mod cover;
mod locks;
mod mend;
mod resize;
pub mod write_back;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};

use crate::errors::MapError;
use crate::interrupt;
use crate::sys::backing::{Backing, Opened, huge_page_of};
use crate::sys::fork::ForkMutex;
use crate::sys::memory::{self, Range, page_bytes};
use crate::sys::mmap::{self, Request};

pub use mend::{Answer, Fault, Mended, Question, copy, tell, touch};

use arena::Place;
use cover::Cover;
use locks::Locks;
use mend::Met;
use write_back::Unwritten;

const HOLD: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
/// What a huge page is asked for by, in mmap(2)'s flags: its size as a power of two.
const HUGE_SHIFT: i32 = libc::MAP_HUGE_SHIFT;
const HUGE_MASK: i32 = libc::MAP_HUGE_MASK;

/// What is to be mapped.
pub struct Ask {
    /// Bytes.
    pub size: u64,
    /// The byte of the file at which they begin; any.
    pub offset: u64,
    /// PROT_ bits.
    pub prot: i32,
    /// MAP_ bits, the type of sharing among them.
    pub flags: i32,
    /// Where; a hint unless the flags say more.
    pub address: usize,
    /// Bytes of addresses to hold, for growth.
    pub reserve: u64,
    /// The file; none for anonymous memory.
    pub opened: Option<Opened>,
    /// Its name, for errors.
    pub source: Arc<str>,
}

/// No MADV_ number.
pub const NOT_ADVISED: i32 = -1;

/// What a mapping wishes of who watches it.
pub struct Wishes {
    /// Its addresses were given to somebody, or there is a budget: from then on the daemon looks at it.
    pub exposed: AtomicBool,
    /// The daemon has seen it.
    pub seen: AtomicBool,
    /// The program's own advice about reading ahead, [`NOT_ADVISED`] where it has given none.
    pub advised: AtomicI32,
    /// The daemon has turned the kernel's reading ahead off.
    pub hushed: AtomicBool,
    /// Bytes that may be resident.
    pub budget: AtomicU64,
    /// What goes also goes from the page cache.
    pub drops: AtomicBool,
    /// The most that was ever seen resident.
    pub peak: AtomicU64,
    /// Bytes taken to keep the budget.
    pub trimmed: AtomicU64,
    /// What was stored and could not be written back.
    pub unwritten: Unwritten,
    /// Bytes that were pinned; held over mlock(2).
    pub pins: ForkMutex<Vec<std::ops::Range<u64>>>,
}

impl Default for Wishes {
    fn default() -> Self {
        Wishes {
            exposed: AtomicBool::new(false),
            seen: AtomicBool::new(false),
            advised: AtomicI32::new(NOT_ADVISED),
            hushed: AtomicBool::new(false),
            budget: AtomicU64::new(u64::MAX),
            drops: AtomicBool::new(false),
            peak: AtomicU64::new(0),
            trimmed: AtomicU64::new(0),
            unwritten: Unwritten::default(),
            pins: ForkMutex::default(),
        }
    }
}

impl Wishes {
    /// Whether there is a budget.
    pub fn is_bounded(&self) -> bool {
        self.budget.load(Ordering::Relaxed) != u64::MAX
    }

    /// The same for the other part of a mapping that is split.
    fn copy_of(&self) -> Wishes {
        Wishes {
            exposed: AtomicBool::new(self.exposed.load(Ordering::Relaxed)),
            advised: AtomicI32::new(self.advised.load(Ordering::Relaxed)),
            hushed: AtomicBool::new(self.hushed.load(Ordering::Relaxed)),
            budget: AtomicU64::new(self.budget.load(Ordering::Relaxed)),
            drops: AtomicBool::new(self.drops.load(Ordering::Relaxed)),
            unwritten: self.unwritten.copy_of(),
            ..Wishes::default()
        }
    }

    /// The advice about reading ahead that is quire's own to give; `None` where the program has given some.
    fn advice(&self) -> Option<i32> {
        let hushed = self.hushed.load(Ordering::Relaxed);
        let own = if hushed { libc::MADV_RANDOM } else { libc::MADV_NORMAL };
        (self.advised.load(Ordering::Relaxed) == NOT_ADVISED).then_some(own)
    }

    /// In the child of a fork: no lock of memory is inherited.
    ///
    /// # Safety
    /// As of [`ForkMutex::replace_in_child`].
    unsafe fn reset_in_child(&self) {
        // SAFETY: the caller's (contract).
        unsafe { self.pins.replace_in_child(Vec::new()) }
    }

    /// Whether what is read ahead must be within the budget too.
    pub fn is_leashed(&self) -> bool {
        self.is_bounded() && self.drops.load(Ordering::Relaxed)
    }
}

/// A range that the kernel pages.
pub struct Region {
    /// Unique in the process.
    pub id: u64,
    /// What is mapped, whole pages.
    pub range: Range,
    /// Bytes before the first one that was asked for.
    pub slack: usize,
    /// Bytes that were asked for.
    pub size: u64,
    /// Bytes of addresses held from the start on.
    pub reserved: usize,
    /// Bytes of a page.
    pub page: usize,
    /// Byte of the file at the start of the range.
    pub offset: u64,
    /// PROT_ bits of all of it, but for what `parts` says.
    pub prot: i32,
    /// MAP_ bits.
    pub flags: i32,
    /// Name of what is mapped.
    pub source: Arc<str>,
    /// The file.
    pub backing: Option<Arc<Backing>>,
    /// Pages that could not be had.
    pub errors: Arc<AtomicU64>,
    /// What it wishes of the daemon.
    pub wishes: Arc<Wishes>,
    /// Calls that use the range now and change none of it.
    pub users: Arc<AtomicU32>,
    /// Parts with a protection of their own, the latest last.
    parts: Vec<(Range, i32)>,
    /// Parts that were unmapped: their addresses are held.
    holes: Vec<Range>,
    /// Bytes from the start at which another object begins: shared memory of no file has the size that
    /// it was born with, and grows by further ones.
    joins: Vec<usize>,
    /// By their first address.
    covered: BTreeMap<usize, Cover>,
    locks: Locks,
    failure: Option<Met>,
    /// Addresses are held for growth.
    holds: bool,
    /// A part of it is or was writable.
    was_writable: bool,
    sealed: bool,
    place: Place,
}

/// As [`MapError::sys`], of a failure of the standard library's.
pub fn sys_io(call: &'static str, error: &io::Error) -> MapError {
    MapError::sys(call, error.raw_os_error().unwrap_or(libc::EIO))
}

fn page_of(ask: &Ask) -> usize {
    let named = (ask.flags >> HUGE_SHIFT) & HUGE_MASK;
    if ask.flags & libc::MAP_HUGETLB != 0 {
        return if named == 0 { memory::HUGE_BYTES } else { 1 << named };
    }
    let own = ask.opened.as_ref().and_then(huge_page_of);
    own.unwrap_or_else(page_bytes)
}

/// The pages of what is asked for, in bytes.
pub struct Extent {
    page: usize,
    slack: usize,
    len: usize,
    /// Addresses that it takes.
    pub held: usize,
}

impl Region {
    /// What it will take.
    ///
    /// # Errors
    /// `Invalid` for what no address space holds.
    pub fn extent_of(ask: &Ask) -> Result<Extent, MapError> {
        let page = page_of(ask);
        let slack = (ask.offset % page as u64) as usize;
        let too_large = || MapError::Invalid(format!("{} bytes cannot be mapped", ask.size));
        let with_slack = |bytes: u64| rounded(bytes.saturating_add(slack as u64), page).ok_or_else(too_large);
        let len = with_slack(ask.size.max(1))?;
        let held = with_slack(ask.reserve)?.max(len);
        Ok(Extent { page, slack, len, held })
    }

    /// Maps.
    ///
    /// # Errors
    /// `Invalid` for what no address space holds, `Sys` when the kernel refuses.
    pub fn map(ask: Ask) -> Result<Region, MapError> {
        let Extent { page, slack, len, held } = Self::extent_of(&ask)?;
        let too_large = || MapError::Invalid(format!("{} bytes cannot be mapped", ask.size));
        let offset = i64::try_from(ask.offset - slack as u64).map_err(|_| too_large())?;
        let fd = ask.opened.as_ref().map_or(-1, |opened| opened.file.as_raw_fd());
        let empty = ask.size == 0; // nothing of the file can be mapped: a page that reads as zeros
        let (fd, flags) = if empty { (-1, HOLD) } else { (fd, ask.flags) };
        let (prot, offset) = if empty { (libc::PROT_READ, 0) } else { (ask.prot, offset) };
        let request = Request { address: ask.address, len, prot, flags, fd, offset };
        let range = if held > len { map_in_hold(&request, held, page)? } else { map_free(&request)? };
        Ok(Region {
            id: interrupt::new_mapping_id(),
            range,
            slack,
            size: ask.size,
            reserved: held,
            page,
            offset: ask.offset - slack as u64,
            prot: ask.prot,
            flags: ask.flags,
            source: ask.source,
            backing: ask.opened.map(|opened| Arc::new(opened.into_backing())),
            errors: Arc::default(),
            users: Arc::default(),
            wishes: Arc::default(),
            parts: Vec::new(),
            holes: Vec::new(),
            joins: Vec::new(),
            covered: BTreeMap::new(),
            locks: Locks::of_all(if ask.flags & libc::MAP_LOCKED == 0 { 0 } else { len }),
            failure: None,
            holds: held > len,
            was_writable: ask.prot & libc::PROT_WRITE != 0,
            sealed: false,
            place: Place::Own,
        })
    }

    /// In the child of a fork, where the threads are gone that used it, and those that are to be told of what
    /// covers its pages.
    ///
    /// # Safety
    /// Only in the child of a fork while it has one thread.
    pub unsafe fn reset_in_child(&mut self) {
        self.users.store(0, Ordering::Release);
        // SAFETY: the caller's (contract).
        unsafe { self.wishes.reset_in_child() }
        self.locks = Locks::default(); // which the child has not inherited
        self.uncover();
    }

    /// Whether an address is of this region: mapped, or held for it.
    pub fn contains(&self, address: usize) -> bool {
        Range { start: self.range.start, len: self.reserved }.contains(address)
    }

    /// The pages that hold any of these bytes.
    pub fn around(&self, offset: u64, len: u64) -> Range {
        let start = (self.slack + offset as usize) / self.page * self.page;
        let end = (self.slack + (offset + len) as usize).next_multiple_of(self.page).min(self.range.len);
        Range { start: self.range.start + start, len: end.saturating_sub(start) }
    }

    /// The pages that hold nothing but these bytes, or slack.
    pub fn inside(&self, offset: u64, len: u64) -> Range {
        let first = if offset == 0 { 0 } else { self.slack + offset as usize };
        let last =
            if offset + len >= self.size { self.range.len } else { self.slack + (offset + len) as usize };
        let (start, end) = (first.next_multiple_of(self.page), last / self.page * self.page);
        Range { start: self.range.start + start, len: end.saturating_sub(start) }
    }

    fn prot_of(&self, address: usize) -> i32 {
        let part = self.parts.iter().rev().find(|(range, _)| range.contains(address));
        part.map_or(self.prot, |(_, prot)| *prot)
    }

    /// Whether stores go to a file.
    pub fn is_shared_writable(&self) -> bool {
        !self.is_private() && self.prot & libc::PROT_WRITE != 0
    }

    fn is_private(&self) -> bool {
        self.flags & libc::MAP_TYPE == libc::MAP_PRIVATE
    }

    /// The pieces of a range that are mapped: not the holes in it.
    fn mapped_in(&self, range: Range) -> Vec<Range> {
        let mut holes: Vec<Range> = self
            .holes
            .iter()
            .filter(|hole| hole.start < range.end() && range.start < hole.end())
            .copied()
            .collect();
        holes.sort_by_key(|hole| hole.start);
        holes.push(Range { start: range.end(), len: 0 });
        let (mut pieces, mut at) = (Vec::new(), range.start);
        for hole in holes {
            if at < hole.start {
                pieces.push(Range { start: at, len: hole.start - at });
            }
            at = at.max(hole.end());
        }
        pieces
    }

    /// Changes the protection of the pages around some bytes; those that were unmapped stay so.
    ///
    /// # Errors
    /// `Sys`.
    pub fn protect(&mut self, offset: u64, len: u64, prot: i32) -> Result<(), MapError> {
        self.require_unbounded(prot)?;
        self.uncover();
        let range = self.around(offset, len);
        for piece in self.mapped_in(range) {
            // SAFETY: pages of the region.
            unsafe { mmap::protect(piece, prot) }.map_err(|errno| MapError::sys("mprotect", errno))?;
        }
        if range == self.range {
            (self.prot, self.parts) = (prot, Vec::new());
        } else {
            self.parts.retain(|(part, _)| !(range.contains(part.start) && part.end() <= range.end()));
            self.parts.push((range, prot));
        }
        self.was_writable |= prot & libc::PROT_WRITE != 0;
        Ok(())
    }

    /// Unmaps the pages of some bytes; their addresses are held, so that nothing else comes there.
    ///
    /// # Errors
    /// `Invalid` when they are not whole pages; `Sys`.
    pub fn unmap_part(&mut self, offset: u64, len: u64) -> Result<(), MapError> {
        let range = self.around(offset, len);
        if range != self.inside(offset, len) {
            return Err(MapError::Invalid(format!(
                "bytes {offset} to {} are no whole pages of {} bytes: only such can be unmapped",
                offset + len,
                self.page
            )));
        }
        self.uncover();
        hold(range)?;
        self.holes.push(range);
        Ok(())
    }

    /// Splits it at a byte: the region keeps what comes before.
    ///
    /// # Errors
    /// `Invalid` when a page holds bytes of both sides.
    pub fn split(&mut self, at: u64) -> Result<Region, MapError> {
        self.require_own("split", "place two mappings instead")?;
        let cut = self.slack as u64 + at;
        if at == 0 || at >= self.size || !cut.is_multiple_of(self.page as u64) {
            return Err(MapError::Invalid(format!(
                "byte {at} is no boundary between pages of {} bytes inside the mapping (offset in its page: {})",
                self.page,
                cut % self.page as u64
            )));
        }
        self.uncover();
        let cut = cut as usize;
        let range = Range { start: self.range.start + cut, len: self.range.len - cut };
        let upper = |part: &Range| part.end() > range.start;
        let tail = Region {
            id: interrupt::new_mapping_id(),
            range,
            slack: 0,
            size: self.size - at,
            reserved: self.reserved - cut,
            offset: self.offset + cut as u64,
            source: Arc::clone(&self.source),
            backing: self.backing.clone(),
            errors: Arc::default(),
            users: Arc::default(),
            wishes: Arc::new(self.wishes.copy_of()),
            parts: self.parts.iter().filter(|(part, _)| upper(part)).copied().collect(),
            holes: self.holes.iter().filter(|hole| upper(hole)).copied().collect(),
            joins: self
                .joins
                .iter()
                .filter_map(|join| join.checked_sub(cut))
                .filter(|join| *join > 0)
                .collect(),
            covered: BTreeMap::new(),
            locks: self.locks.split_off(cut),
            failure: None,
            ..*self
        };
        (self.size, self.reserved, self.range.len) = (at, cut, cut);
        self.joins.retain(|join| *join < cut);
        Ok(tail)
    }

    /// Fixes it for ever: its addresses will never be given back.
    ///
    /// # Errors
    /// `Invalid` where a page might have to be covered one day; `Sys`.
    pub fn seal(&mut self) -> Result<(), MapError> {
        self.require_own("sealed", "map it elsewhere")?;
        if self.backing.as_ref().is_some_and(|backing| !backing.cannot_shrink()) {
            return Err(MapError::Invalid(
                "a sealed mapping of a file that can be truncated could not be saved from SIGBUS: seal anonymous \
                 memory, or a memory file with F_SEAL_SHRINK"
                    .into(),
            ));
        }
        self.uncover();
        mmap::seal(self.range).map_err(|errno| MapError::sys("mseal", errno))?;
        self.sealed = true;
        Ok(())
    }

    /// Whether it is fixed for ever.
    pub fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// Unmaps all of it. The caller has taken it out of the space.
    pub fn unmap(mut self) {
        self.drop_covers();
        let start = if self.flags & libc::MAP_GROWSDOWN != 0 {
            memory::start_of_entry(self.range.start).unwrap_or(self.range.start)
        } else {
            self.range.start
        };
        let end = self.range.start + self.reserved;
        if self.home().is_some() {
            // Refused only for want of kernel memory; then what is placed here next takes its place.
            let _ = hold(Range { start, len: end - start });
        } else if !self.sealed {
            // SAFETY: the region's own addresses, which nothing refers to.
            unsafe { memory::unmap(Range { start, len: end - start }) }
        }
    }
}

fn rounded(bytes: u64, page: usize) -> Option<usize> {
    let bytes = bytes.checked_next_multiple_of(page as u64).filter(|bytes| *bytes < 1 << 56)?;
    usize::try_from(bytes).ok()
}

/// Maps inaccessible memory over addresses of the caller's own.
fn hold(range: Range) -> Result<(), MapError> {
    let flags = HOLD | libc::MAP_FIXED;
    let request =
        Request { address: range.start, len: range.len, prot: libc::PROT_NONE, flags, fd: -1, offset: 0 };
    // SAFETY: addresses of the region, whose content is given up.
    unsafe { mmap::map(&request) }.map(|_| ()).map_err(|errno| MapError::sys("mmap", errno))
}

fn map_free(request: &Request) -> Result<Range, MapError> {
    // SAFETY: MAP_FIXED is the caller's own word for addresses that it answers for.
    let range = unsafe { mmap::map(request) }.map_err(|errno| MapError::sys("mmap", errno))?;
    if request.flags & libc::MAP_FIXED_NOREPLACE == libc::MAP_FIXED_NOREPLACE
        && range.start != request.address
    {
        // SAFETY: just made. A kernel before 4.17 does not know the flag.
        unsafe { memory::unmap(range) };
        return Err(MapError::sys("mmap", libc::EEXIST));
    }
    Ok(range)
}

/// Holds addresses and maps at their start.
fn map_in_hold(request: &Request, held: usize, page: usize) -> Result<Range, MapError> {
    let asked = libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE | mmap::MAP_32BIT;
    let place = if request.address != 0 || request.flags & asked != 0 {
        let flags = HOLD | (request.flags & asked);
        let address = request.address;
        map_free(&Request { address, len: held, prot: libc::PROT_NONE, flags, fd: -1, offset: 0 })?
    } else {
        memory::reserve_aligned(held, page, libc::PROT_NONE)?
    };
    let flags = (request.flags & !asked) | libc::MAP_FIXED;
    // SAFETY: the start of what was just held.
    let mapped = unsafe { mmap::map(&Request { address: place.start, flags, ..*request }) };
    mapped.map_err(|errno| {
        // SAFETY: as above; nothing refers to it.
        unsafe { memory::unmap(place) };
        MapError::sys("mmap", errno)
    })
}
