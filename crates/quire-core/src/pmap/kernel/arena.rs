//! Arenas: addresses that are reserved, and what is placed in them.
//!
//! ```text
//!   |guard|<- placed ->|  reserved  |<- placed ->|<- placed ->|  reserved  |
//!         0            a            b            c            d        size
//! ```
//!
//! An arena is a region of inaccessible memory (PROT_NONE, MAP_NORESERVE), in whose range other regions lie; the
//! space's own map is the list of them. All is done under the space's lock, so that two threads cannot take the
//! same addresses, and in the kernel a range goes from reserved to placed and back in one system call, so that no
//! other mmap(2) of the process ever sees a hole. The guard lets a region that is placed at 0 begin elsewhere
//! than its arena.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::Arc;

use super::cover::cut;
use super::{HOLD, Locks, Region, Wishes, rounded};
use crate::errors::{FaultCode, MapError, StoreError};
use crate::interrupt;
use crate::sys::memory::{self, HUGE_BYTES, Range, page_bytes};
use crate::sys::mmap::{self, Request};
use crate::units::ByteOffset;

/// All regions by start address.
pub type Regions = BTreeMap<usize, Region>;

/// Whose the addresses of a region are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Its own.
    Own,
    /// Its own, and other regions are placed there; `leaving`: it goes with the last of them.
    Arena {
        /// Nobody holds it any more.
        leaving: bool,
    },
    /// Those of the arena that begins there.
    In(usize),
}

impl Region {
    /// Reserves addresses in which regions can be placed; `prot` is what views of it are for.
    ///
    /// # Errors
    /// `Sys`, `Invalid`.
    pub fn reserve(size: u64, prot: i32, source: Arc<str>) -> Result<Region, MapError> {
        let page = page_bytes();
        let too_large = || MapError::Invalid(format!("{size} bytes of addresses cannot be reserved"));
        let len = rounded(size.max(1), page).ok_or_else(too_large)?;
        // Huge pages lie well in large ones.
        let guard = if len < HUGE_BYTES { page } else { HUGE_BYTES };
        let range = memory::reserve_aligned(len + guard, guard, libc::PROT_NONE)?;
        Ok(Region {
            id: interrupt::new_mapping_id(),
            range,
            slack: guard,
            size,
            reserved: range.len,
            page,
            offset: 0,
            prot,
            flags: HOLD,
            source,
            backing: None,
            errors: Arc::default(),
            users: Arc::default(),
            wishes: Arc::<Wishes>::default(),
            parts: Vec::new(),
            holes: Vec::new(),
            joins: Vec::new(),
            covered: BTreeMap::new(),
            locks: Locks::default(),
            failure: None,
            holds: true,
            was_writable: false,
            sealed: false,
            place: Place::Arena { leaving: false },
        })
    }

    /// Whether other regions are placed in it.
    pub fn is_arena(&self) -> bool {
        matches!(self.place, Place::Arena { .. })
    }

    /// Where the arena begins that it is placed in.
    pub fn home(&self) -> Option<usize> {
        if let Place::In(arena) = self.place { Some(arena) } else { None }
    }

    pub(super) fn require_own(&self, what: &str, instead: &str) -> Result<(), MapError> {
        if self.home().is_none() {
            return Ok(());
        }
        Err(MapError::Invalid(format!("a mapping that is placed in an arena cannot be {what}: {instead}")))
    }

    pub(super) fn nothing_placed(&self, address: usize) -> StoreError {
        let at = address.saturating_sub(self.range.start + self.slack) as u64;
        let message = "a touch of a part of an arena where nothing is placed: place a mapping there first";
        StoreError::new(FaultCode::Closed, ByteOffset(at), message)
    }

    /// Which bytes of its arena it takes, what it holds for growth included.
    pub fn span_in(&self, arena: &Region) -> std::ops::Range<usize> {
        let start = self.range.start - arena.range.start - arena.slack;
        start..start + self.reserved
    }
}

/// The region an address is of, placed ones before the arena around them.
pub fn region_at(regions: &mut Regions, address: usize) -> Option<&mut Region> {
    let (start, last) = regions.range(..=address).next_back()?;
    let start = if last.contains(address) { *start } else { last.home().unwrap_or(*start) };
    regions.get_mut(&start).filter(|region| region.contains(address))
}

/// Which addresses around one are of nobody but the region that it is of: all of its own, or what lies between
/// the regions placed there.
pub fn gap_at(regions: &Regions, region: usize, address: usize) -> Range {
    let Some(around) = regions.get(&region) else { return Range { start: address, len: 0 } };
    let whole = Range { start: around.range.start, len: around.reserved };
    let below = regions.range(region + 1..=address.max(region + 1)).next_back();
    let above = regions.range(address + 1..whole.end().max(address + 1)).next();
    let placed = [below, above].into_iter().flatten().filter(|_| around.is_arena());
    placed.fold(whole, |gap, (_, other)| {
        cut(gap, Range { start: other.range.start, len: other.reserved }, address)
    })
}

/// Moves a region that was mapped elsewhere, and nobody has seen, into the arena that begins at `arena`: its
/// first byte that was asked for to byte `at`; `reserve` bytes from there on are its own.
///
/// # Errors
/// `Invalid` where it does not fit, is not aligned, or would overlap another one; `Sys`. The region stays
/// where it was.
pub fn place(
    regions: &mut Regions,
    arena: usize,
    region: &mut Region,
    at: u64,
    reserve: u64,
) -> Result<(), MapError> {
    let closed = || MapError::Invalid("the arena is closed".into());
    let around = regions.get(&arena).ok_or_else(closed)?;
    let (target, reserved) = target_of(around, region, at, reserve)?;
    let end = target + reserved;
    if let Some((_, other)) = regions.range(arena + 1..end).next_back()
        && other.range.start + other.reserved > target
    {
        let theirs = other.span_in(around);
        let first = target - around.range.start - around.slack;
        return Err(MapError::Invalid(format!(
            "{} would take bytes {first} to {} of the arena, and {} has bytes {} to {}: unmap that first, or choose \
             another place",
            region.source,
            first + reserved,
            other.source,
            theirs.start,
            theirs.end
        )));
    }
    let around = regions.get_mut(&arena).ok_or_else(closed)?;
    around.clear(Range { start: target, len: reserved });
    // SAFETY: the region's own addresses, and some that are reserved: nothing is placed there.
    if let Err(errno) = unsafe { mmap::move_over(region.range, target) } {
        // Nearly all refusals come before the kernel takes away what was there; after the others the
        // addresses are reserved again, and EEXIST says that they have been all the time.
        hold_free(Range { start: target, len: region.range.len });
        return Err(MapError::sys("mremap", errno));
    }
    region.range.start = target;
    (region.reserved, region.holds, region.place) = (reserved, true, Place::In(arena));
    Ok(())
}

/// Where the pages of a region go, and how many bytes it takes there.
fn target_of(arena: &Region, region: &Region, at: u64, reserve: u64) -> Result<(usize, usize), MapError> {
    let page = region.page;
    let taken =
        rounded(reserve.saturating_add(region.slack as u64), page).map(|held| held.max(region.range.len));
    let first = usize::try_from(at).ok().and_then(|at| at.checked_sub(region.slack));
    let fits = first.zip(taken).filter(|(first, taken)| {
        first.checked_add(*taken).is_some_and(|end| end <= arena.reserved - arena.slack)
    });
    let (first, taken) = fits.ok_or_else(|| {
        MapError::Invalid(format!(
            "{} bytes at byte {at} do not lie in an arena of {} (whole pages of {page} bytes do)",
            region.size.max(reserve),
            arena.size
        ))
    })?;
    let target = arena.range.start + arena.slack + first;
    if !target.is_multiple_of(page) {
        return Err(MapError::Invalid(format!(
            "byte {at} of the arena is no place for a mapping from byte {} of its source on: divided by the page \
             size, {page}, both must leave the same rest",
            region.offset + region.slack as u64
        )));
    }
    Ok((target, taken))
}

/// Maps inaccessible memory where nothing is mapped.
pub(super) fn hold_free(range: Range) -> bool {
    let flags = HOLD | libc::MAP_FIXED_NOREPLACE;
    let request =
        Request { address: range.start, len: range.len, prot: libc::PROT_NONE, flags, fd: -1, offset: 0 };
    // SAFETY: replaces nothing.
    unsafe { mmap::map(&request) }.is_ok()
}

/// Takes a region out, and unmaps it if it is placed in an arena. What is returned is to be unmapped: itself,
/// or an arena that has nothing in it any more; an arena that has stays until then.
pub fn take(regions: &mut Regions, start: usize) -> Option<Region> {
    let region = regions.get_mut(&start)?;
    let arena = match &mut region.place {
        Place::Own => return regions.remove(&start),
        Place::Arena { leaving } => {
            *leaving = true;
            start
        }
        Place::In(arena) => {
            let arena = *arena;
            // Under the lock: nobody is placed here before it is done.
            regions.remove(&start)?.unmap();
            arena
        }
    };
    let around = regions.get(&arena).filter(|around| around.place == Place::Arena { leaving: true })?;
    let end = around.range.start + around.reserved;
    let empty = regions.range(arena + 1..end).next().is_none();
    if empty { regions.remove(&arena) } else { None }
}
