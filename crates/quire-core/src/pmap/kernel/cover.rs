//! What the pages of a region show that cannot be touched, for as long as an exception takes, and how they
//! come back.
//!
//! ```text
//!   a thread's 1st cover: 1 page, its 2nd: 2 pages, 3rd: 4 ... until its exception is delivered
//! ```
//!
//! A run of pages is covered at once, and only such as cannot be touched either: so one long call of C code
//! over any number of bad pages takes few map entries and little time, and one short touch hides no more than
//! its own page from other threads. Filler of a long run is one piece of memory at many addresses.
//!
//! Filler for a thread that reads is read-only: another that stores there faults, and its store goes to the page
//! if that can be had by now.
#![allow(unsafe_code)]

use super::arena::hold_free;
use super::mend::Fault;
use super::{Region, hold};
use crate::sys::memory::{self, Range, Touch};
use crate::sys::mmap::{self, Request};
use crate::sys::thread;

const FILLER: u8 = 0xFF;
/// A run whose content is kept readable is copied, hence bounded.
const COPIED_PAGES: usize = 1024;
/// Covers of a region, each of which takes three map entries.
const COVERS_MOST: usize = 1024;
/// Filler memory of a run: this part of it, if that is more than the least piece.
const PIECE_SHARE: usize = 512;
const PIECE_LEAST: usize = 1 << 20;

/// Pages that show something else than what is mapped there.
pub struct Cover {
    range: Range,
    under: Under,
    /// Who met the pages, and the signal by which.
    thread: u64,
    signal: i32,
}

/// What is under a cover.
enum Under {
    /// The pages, which wait at another address.
    Moved(usize),
    /// Addresses that are held.
    Held,
    /// Nothing was mapped there, as in the child of a fork after advice "dontfork".
    Nothing,
}

impl Region {
    /// Whether a cover lies over any of these addresses.
    pub fn is_covered(&self, range: Range) -> bool {
        let last = self.covered.range(..range.end()).next_back();
        last.is_some_and(|(_, cover)| cover.range.end() > range.start)
    }

    fn cover_of(&self, page: usize) -> Option<&Cover> {
        let (_, cover) = self.covered.range(..=page).next_back()?;
        cover.range.contains(page).then_some(cover)
    }

    /// The signal by which what covers a page was met.
    pub(super) fn covered_by(&self, page: usize) -> Option<i32> {
        self.cover_of(page).map(|cover| cover.signal)
    }

    /// Lets what covers a page be stored to, which is in vain: who does so is told.
    pub(super) fn let_write(&self, page: usize) {
        if let Some(cover) = self.cover_of(page) {
            // SAFETY: filler, which nobody's bytes are in.
            let _ = unsafe { mmap::protect(cover.range, libc::PROT_READ | libc::PROT_WRITE) };
        }
    }

    /// How many pages this thread has covered at once from here on.
    pub(super) fn run_pages(&self) -> usize {
        let this = thread::key();
        let before = self.covered.values().filter(|cover| cover.thread == this).take(40).count();
        1 << before
    }

    /// Cuts what another cover shows off a range around a page.
    pub(super) fn between_covers(&self, around: Range, page: usize) -> Range {
        let below = self.covered.range(..page).next_back().map(|(_, cover)| cover.range);
        let above = self.covered.range(page..).next().map(|(_, cover)| cover.range);
        [below, above].into_iter().flatten().fold(around, |around, cover| cut(around, cover, page))
    }

    /// Puts filler, or what can still be read of them, in place of the page and those of the run around it, or
    /// fewer. Where there are many covers, or the process has no map entry left, the covers there are go first:
    /// a thread that comes back to their pages is told again.
    pub(super) fn cover(&mut self, page: usize, run: Range, fault: &Fault) -> bool {
        if self.covered.len() >= COVERS_MOST {
            self.uncover(); // while there are map entries left to do it with
        }
        if self.cover_most(page, run, fault) {
            return true;
        }
        let before = self.covered.len();
        self.uncover();
        self.covered.len() < before && self.cover_most(page, Range { start: page, len: self.page }, fault)
    }

    fn cover_most(&mut self, page: usize, mut run: Range, fault: &Fault) -> bool {
        loop {
            if self.cover_run(page, run, fault) {
                return true;
            }
            if run.len == self.page {
                return false;
            }
            let half = (run.len / 2).next_multiple_of(self.page).min(run.len - self.page);
            let upper = Range { start: run.start + half, len: run.len - half };
            run = if upper.contains(page) { upper } else { Range { start: run.start, len: half } };
        }
    }

    fn cover_run(&mut self, page: usize, run: Range, fault: &Fault) -> bool {
        let nothing = memory::is_present(run.start).is_none();
        if nothing && !hold_free(run) {
            return false; // held before anything else comes there, what is made next for one
        }
        let readable = mmap::peek(page, &mut [0]) == 1;
        let made = if readable { self.copy_of(run) } else { filler_for(run, self.page, fault.touch) };
        let under = if nothing { Some(Under::Nothing) } else { made.and_then(|_| self.take_away(run)) };
        let shown = made.is_some_and(|made| under.is_some() && show(made, run));
        match under {
            Some(under) if shown => {
                let (thread, signal) = (thread::key(), fault.signal);
                self.covered.insert(run.start, Cover { range: run, under, thread, signal });
            }
            Some(under) => _ = self.put_back(run, &under),
            None => {}
        }
        if let Some(made) = made.filter(|_| !shown) {
            // SAFETY: nothing refers to it.
            unsafe { memory::unmap(made) }
        }
        shown
    }

    /// A copy of a run, all of which can be read, or of one page as far as it can.
    fn copy_of(&self, run: Range) -> Option<Range> {
        if run.len > COPIED_PAGES.max(self.page / memory::page_bytes()) * memory::page_bytes() {
            return None;
        }
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let copy = memory::reserve_aligned(run.len, self.page, access).ok()?;
        // SAFETY: fresh memory of this function's, read-write, of that length.
        let bytes = unsafe { std::slice::from_raw_parts_mut(copy.start as *mut u8, copy.len) };
        let got = mmap::peek(run.start, bytes);
        if got < run.len && run.len > self.page {
            // SAFETY: nothing refers to it.
            unsafe { memory::unmap(copy) };
            return None;
        }
        bytes[got..].fill(FILLER);
        Some(copy)
    }

    /// Moves a run out of the way, if more than its addresses are there.
    fn take_away(&self, run: Range) -> Option<Under> {
        if self.is_held(run) {
            return Some(Under::Held);
        }
        let aside = memory::reserve_aligned(run.len, self.page, libc::PROT_NONE).ok()?;
        self.loosen(run);
        // SAFETY: fresh memory of this function's is replaced by a run of the region.
        if unsafe { mmap::move_away(run, aside.start) }.is_err() {
            // SAFETY: nothing refers to it.
            unsafe { memory::unmap(aside) };
            self.fasten(run);
            return None;
        }
        Some(Under::Moved(aside.start))
    }

    /// Whether a run is of addresses that are only held.
    fn is_held(&self, run: Range) -> bool {
        self.is_arena()
            || run.start >= self.range.end()
            || self.holes.iter().any(|hole| hole.contains(run.start))
    }

    /// Puts back every page that was covered; one that cannot be (no map entry is left) the next time.
    pub fn uncover(&mut self) {
        let mut covered = std::mem::take(&mut self.covered);
        covered.retain(|_, cover| !self.put_back(cover.range, &cover.under));
        self.covered = covered;
    }

    fn put_back(&self, range: Range, under: &Under) -> bool {
        // SAFETY: the region's own pages, and their own place, which filler has taken.
        let done = unsafe {
            match *under {
                Under::Moved(aside) => {
                    mmap::move_over(Range { start: aside, len: range.len }, range.start).is_ok()
                }
                Under::Held => hold(range).is_ok(),
                Under::Nothing => mmap::unmap(range).is_ok(),
            }
        };
        if let (true, Under::Moved(_)) = (done, under) {
            self.fasten(range);
            if let Some(advice) = self.wishes.advice() {
                // What was given meanwhile for all of the region: it becomes one map entry again.
                // SAFETY: pages of the region; the advice takes nothing.
                let _ = unsafe { mmap::advise(range, advice) };
            }
        }
        done
    }

    /// Ends what covers any page of some bytes of an arena, which something else takes.
    pub(super) fn clear(&mut self, range: Range) {
        self.uncover();
        let touches = |cover: &Cover| cover.range.start < range.end() && range.start < cover.range.end();
        let (stuck, kept): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.covered).into_values().partition(touches);
        self.covered = kept.into_iter().map(|cover| (cover.range.start, cover)).collect();
        for cover in stuck {
            let (start, end) = (cover.range.start, cover.range.end());
            for (start, end) in [(start, range.start), (range.end(), end)] {
                if start < end {
                    let rest = Range { start, len: end - start };
                    self.covered.insert(start, Cover { range: rest, under: Under::Held, ..cover });
                }
            }
        }
    }

    /// Ends all covers of a region that is unmapped.
    pub(super) fn drop_covers(&mut self) {
        for cover in std::mem::take(&mut self.covered).into_values() {
            if let Under::Moved(aside) = cover.under {
                // SAFETY: the region's own pages, which nothing refers to.
                unsafe { memory::unmap(Range { start: aside, len: cover.range.len }) }
            }
        }
    }
}

/// A range around a page, less another that does not hold the page, or what both share.
pub(super) fn cut(around: Range, other: Range, page: usize) -> Range {
    let (start, end) = if other.contains(page) {
        (around.start.max(other.start), around.end().min(other.end()))
    } else if other.start > page {
        (around.start, around.end().min(other.start))
    } else {
        (around.start.max(other.end()), around.end())
    };
    Range { start, len: end - start }
}

/// Filler for a run, or for a piece of it.
fn filler_for(run: Range, page: usize, touch: Touch) -> Option<Range> {
    let len = run.len.min(PIECE_LEAST.max(run.len / PIECE_SHARE).next_multiple_of(page));
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: new memory anywhere.
    let piece = unsafe { mmap::map(&Request { address: 0, len, prot, flags, fd: -1, offset: 0 }) }.ok()?;
    // SAFETY: fresh memory of this function's, read-write, of that length.
    unsafe { std::slice::from_raw_parts_mut(piece.start as *mut u8, piece.len) }.fill(FILLER);
    if touch == Touch::Read {
        // SAFETY: as above. Refused for want of a map entry it stays writable.
        let _ = unsafe { mmap::protect(piece, libc::PROT_READ) };
    }
    Some(piece)
}

/// Shows memory that is nobody else's in place of a run that was moved away, as often as it takes.
fn show(made: Range, run: Range) -> bool {
    let mut again = (run.start + made.len..run.end()).step_by(made.len);
    // SAFETY: in place of pages of the region, which were moved aside.
    unsafe {
        again.all(|at| mmap::duplicate(made, made.len.min(run.end() - at), at).is_ok())
            && mmap::move_over(made, run.start).is_ok()
    }
}
