//! Faults of a region that the kernel answers with a signal: what is behind one, and whether it still is.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{Ordering, compiler_fence};

use super::Region;
use super::cover::cut;
use crate::counters::count;
use crate::errors::{FaultCode, StoreError};
use crate::interrupt::{self, PageError};
use crate::sys::backing::{Backing, Cause};
use crate::sys::memory::{self, Range, Touch};
use crate::sys::mmap;
use crate::units::ByteOffset;

/// What has become of a fault.
pub enum Mended {
    /// Nothing can be done: the signal goes on to whoever comes next.
    No,
    /// The instruction can run again, and would succeed.
    Again,
    /// As `Again`, with filler, and this is to be told.
    Told(PageError),
    /// The same, where filler was before.
    ToldAgain(PageError),
}

/// A fault.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// SIGBUS or SIGSEGV.
    pub signal: i32,
    /// What was touched.
    pub address: usize,
    /// How.
    pub touch: Touch,
    /// It came time and again without a reason: an I/O error.
    pub insists: bool,
}

/// The last error of a region.
pub struct Met {
    error: PageError,
    fault: Fault,
}

/// What a file is asked about a page, and those around it. Asked without any lock: a disk or a server that
/// hangs stops who touches it, and nobody else.
pub struct Question {
    region: u64,
    page: usize,
    around: Range,
    most: usize,
    backing: Arc<Backing>,
    /// Byte of the file at address 0 of an imagined mapping of all of it.
    origin: u64,
    bytes: usize,
    writes: bool,
    /// It is not enough that nothing is wrong.
    insists: bool,
}

/// What the file said.
pub struct Answer {
    region: u64,
    page: usize,
    origin: u64,
    cause: Cause,
    run: Range,
}

impl Question {
    fn cause(&self, page: usize) -> Cause {
        self.backing.cause(self.origin.wrapping_add(page as u64), self.bytes as u64, self.writes)
    }

    /// Asks the file.
    pub fn ask(self) -> Answer {
        let mut cause = self.cause(self.page);
        let run = match cause {
            Cause::Gone => Range { start: self.page, len: self.bytes },
            Cause::Truncated(len) if self.backing.is_regular() => {
                let end = len.next_multiple_of(self.bytes as u64).wrapping_sub(self.origin) as usize;
                let first = end.clamp(self.around.start, self.page);
                let beyond = Range { start: first, len: self.around.end() - first };
                spread(self.page, self.bytes, beyond, self.most, |_| true)
            }
            _ => {
                spread(self.page, self.bytes, self.around, self.most, |page| self.cause(page) != Cause::Gone)
            }
        };
        if cause == Cause::Gone && self.insists {
            cause = Cause::Refused(self.backing.unsaid(self.writes));
        }
        Answer { region: self.region, page: self.page, origin: self.origin, cause, run }
    }
}

/// The run of up to so many pages around one of which `bad` holds: what follows it, then what lies before.
fn spread(page: usize, bytes: usize, around: Range, most: usize, bad: impl Fn(usize) -> bool) -> Range {
    let (mut start, mut end) = (page, page + bytes);
    let full = |start: usize, end: usize| (end - start) / bytes >= most;
    while end < around.end() && !full(start, end) && bad(end) {
        end += bytes;
    }
    while start > around.start && !full(start, end) && bad(start - bytes) {
        start -= bytes;
    }
    Range { start, len: end - start }
}

/// Why a page cannot be touched, and which pages around it cannot either.
struct Reason {
    error: StoreError,
    run: Range,
}

impl Region {
    /// Takes a fault, which is of this region; where it is an arena's, `gap` is what lies between the regions
    /// that are placed there. The file's `answer` is needed where it must be asked.
    ///
    /// # Errors
    /// What to ask the file.
    pub fn mend(&mut self, fault: Fault, gap: Range, answer: Option<&Answer>) -> Result<Mended, Question> {
        let page = self.page_of(fault.address);
        if let Some(met_by) = self.covered_by(page) {
            let alone = Range { start: page, len: self.page };
            if fault.touch == Touch::Write {
                let again = Fault { signal: met_by, ..fault };
                if met_by == libc::SIGBUS && self.judge(again, alone, 1, answer)?.is_none() {
                    self.uncover();
                    return Ok(Mended::Again);
                }
                self.let_write(page);
            }
            // Another thread met it first; this one is told as well.
            let failure = self.failure.as_ref().map(|met| met.error.clone());
            return Ok(failure.map_or(Mended::Again, Mended::ToldAgain));
        }
        let around = self.around_page(page, gap);
        let unknown = || {
            let error = self.error_of(Cause::Refused(libc::EIO), self.offset_of(fault.address))?;
            Some(Reason { error, run: Range { start: page, len: self.page } })
        };
        let reason = self.judge(fault, around, self.run_pages(), answer)?;
        let Some(reason) = reason.or_else(|| fault.insists.then(unknown).flatten()) else {
            return Ok(Mended::Again);
        };
        if !self.cover(page, reason.run, &fault) {
            return Ok(Mended::No);
        }
        count(&self.errors);
        let error = PageError {
            error: reason.error,
            source: self.source.as_ref().into(),
            page: ((page - self.range.start) / self.page) as u64,
            mapping: self.id,
        };
        self.failure = Some(Met { error: error.clone(), fault: Fault { insists: false, ..fault } });
        Ok(Mended::Told(error))
    }

    fn page_of(&self, address: usize) -> usize {
        (address - self.range.start) / self.page * self.page + self.range.start
    }

    fn offset_of(&self, address: usize) -> ByteOffset {
        ByteOffset(self.offset + (address - self.range.start) as u64)
    }

    /// The pages around one that are like it, but for what the file says: under the same protection, of the
    /// same hole, or of none.
    fn around_page(&self, page: usize, gap: Range) -> Range {
        let beyond = Range { start: self.range.end(), len: self.reserved - self.range.len };
        let whole = if self.is_arena() { gap } else { cut(gap, beyond, page) };
        let edges = self.holes.iter().chain(self.parts.iter().map(|(part, _)| part));
        let alike = edges.fold(whole, |around, other| cut(around, *other, page));
        self.between_covers(alike, page)
    }

    /// Why the page cannot be touched so; `None` when it can by now.
    fn judge(
        &self,
        fault: Fault,
        around: Range,
        most: usize,
        answer: Option<&Answer>,
    ) -> Result<Option<Reason>, Question> {
        let Fault { signal, address, touch, .. } = fault;
        let (page, offset) = (self.page_of(address), self.offset_of(address));
        let reason = |error, bad: &dyn Fn(usize) -> bool| {
            Ok(Some(Reason { error, run: spread(page, self.page, around, most, bad) }))
        };
        let closed = |message: &str| StoreError::new(FaultCode::Closed, offset, message);
        if self.is_arena() {
            return reason(self.nothing_placed(address), &|_| true);
        }
        if address - self.range.start >= self.range.len {
            let message = "a touch beyond the mapping, of addresses held for its growth: resize it";
            return reason(closed(message), &|_| true);
        }
        if self.holes.iter().any(|hole| hole.contains(address)) {
            return reason(closed("a touch of a part of the mapping that was unmapped"), &|_| true);
        }
        if memory::is_present(page).is_none() {
            let message = "a touch of a mapping that the child of a fork has not inherited";
            return reason(closed(message), &|page| memory::is_present(page).is_none());
        }
        let unreadable = |page: usize| mmap::peek(page, &mut [0]) == 0;
        if signal == libc::SIGSEGV {
            let Some((message, all)) = self.refusal(address, touch) else { return Ok(None) };
            let error = StoreError::new(FaultCode::Protection, offset, message);
            return reason(error, &|page| all || unreadable(page));
        }
        if self.backing.is_some() {
            return self.judge_source(fault, around, most, answer);
        }
        // Huge pages, or memory that has gone bad.
        self.error_of(Cause::Refused(libc::ENOMEM), offset)
            .map_or(Ok(None), |error| reason(error, &unreadable))
    }

    /// Why the source does not give a page, by its `answer`.
    fn judge_source(
        &self,
        fault: Fault,
        around: Range,
        most: usize,
        answer: Option<&Answer>,
    ) -> Result<Option<Reason>, Question> {
        let Some(backing) = &self.backing else { return Ok(None) };
        let (page, offset) = (self.page_of(fault.address), self.offset_of(fault.address));
        let origin = self.offset.wrapping_sub(self.range.start as u64);
        let fits = |said: &&Answer| (said.region, said.page, said.origin) == (self.id, page, origin);
        match answer.filter(fits) {
            Some(said) => {
                let run = cut(said.run, around, page); // which may have changed meanwhile
                Ok(self.error_of(said.cause, offset).map(|error| Reason { error, run }))
            }
            None => Err(Question {
                region: self.id,
                page,
                around,
                most,
                backing: Arc::clone(backing),
                origin,
                bytes: self.page,
                writes: fault.touch != Touch::Read && !self.is_private(),
                insists: fault.insists,
            }),
        }
    }

    /// What forbids a touch, and whether that is the protection, which all pages around are under.
    fn refusal(&self, address: usize, touch: Touch) -> Option<(&'static str, bool)> {
        match (self.allows(address, touch), touch) {
            // Made ready meanwhile, or covered by another thread just now.
            (true, _) if mmap::peek(address, &mut [0]) == 1 => None,
            (true, _) => Some(("a touch of a guard page; see advise(\"guard_remove\")", false)),
            (false, Touch::Read) => {
                Some(("a read of memory whose protection allows none; see protect()", true))
            }
            (false, _) => Some(("a write to memory that is protected as read-only; see protect()", true)),
        }
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

    /// The error has reached its thread.
    pub fn delivered(&mut self) {
        self.uncover();
        // What the program took away itself, or has placed something at by now, is no failure of the mapping;
        // nor is memory that the kernel had none of.
        let passes = |code| code == FaultCode::Closed || (code == FaultCode::Io && self.backing.is_none());
        if self.failure.as_ref().is_some_and(|met| passes(met.error.error.code)) {
            self.failure = None;
        }
    }

    /// The last error that was met.
    pub fn last_failure(&self) -> Option<PageError> {
        self.failure.as_ref().map(|met| met.error.clone())
    }

    /// What is wrong now; what has healed is forgotten.
    ///
    /// # Errors
    /// What to ask the file first.
    pub fn failure(&mut self, answer: Option<&Answer>) -> Result<Option<PageError>, Question> {
        let Some(fault) = self.failure.as_ref().map(|met| met.fault) else { return Ok(None) };
        if self.is_arena() {
            return Ok(self.last_failure());
        }
        if !self.contains(fault.address) {
            self.failure = None; // it was moved, or cut off
            return Ok(None);
        }
        let page = self.page_of(fault.address);
        if fault.signal == libc::SIGSEGV {
            self.uncover(); // filler would look as if it had healed
        }
        let alone = Range { start: page, len: self.page };
        let holds = !self.is_covered(alone) || fault.signal == libc::SIGBUS;
        if holds && self.judge(fault, alone, 1, answer)?.is_none() {
            self.uncover();
            self.failure = None;
        }
        Ok(self.last_failure())
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
