//! `guard`: SIGSEGV and guard pages (MADV_GUARD_INSTALL; Linux 6.15 for memory files), for places
//! where userfaultfd is forbidden. The faulting thread resolves its own fault in a signal handler.
//! System calls that touch a page which is not there fail with EFAULT.
//!
//! A page is hidden by marks in the page table, which cost no map entry. The marks are made chunk by
//! chunk, at the first page of each, as they take page tables (0.2 % of what they hide): a chunk
//! that was never touched is inaccessible as a whole. In a writable mapping a page that is absent
//! or clean is read-only and one that is dirty is not, so that dirty granules take map entries.

#![cfg_attr(test, allow(unsafe_code))]

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::alias::{Alias, Granules, OPEN, READ, joined};
use super::{Kind, Pmap, RunningPmap, Tracking};
use crate::sys::lock::Mutex;
use crate::sys::memory::{self, Range};

/// Bytes of a chunk at least, and chunks at most.
const CHUNK: usize = 2 << 20;
const CHUNKS_MAX: usize = 1 << 17;
/// After so many marks twice as many chunks are marked at once: each mark in the midst of others that
/// have none takes two map entries.
const MARKS: usize = 512;

/// The pmap of one mapping.
pub struct GuardPmap {
    alias: Alias,
    chunks: OnceLock<Chunks>,
    /// Granules that are open to writes.
    open: Granules,
}

/// Which chunks have their marks.
struct Chunks {
    bytes: usize,
    marked: Vec<AtomicBool>,
    /// How often chunks were marked. Held meanwhile: marking one twice would hide what was shown
    /// since.
    marks: Mutex<usize>,
}

impl GuardPmap {
    /// For one mapping.
    ///
    /// # Errors
    /// The errno.
    pub fn start() -> Result<Self, i32> {
        Ok(GuardPmap { alias: Alias::new()?, chunks: OnceLock::new(), open: Granules::default() })
    }

    /// Makes the chunks of a range, and some around them, ready for pages to be shown one by one.
    fn mark(&self, range: Range) -> Result<(), i32> {
        let chunks = self.chunks.get().ok_or(libc::EINVAL)?;
        let whole = self.alias.entered().range;
        let marked = |index: &usize| chunks.marked[*index].load(Ordering::Acquire);
        let first = (range.start - whole.start) / chunks.bytes;
        let end = (range.start + range.len - whole.start).div_ceil(chunks.bytes);
        if (first..end).all(|index| marked(&index)) {
            return Ok(());
        }
        let mut marks = chunks.marks.lock();
        let at_once = 1 << (*marks / MARKS).min(16);
        let last = end.next_multiple_of(at_once).min(chunks.marked.len());
        let mut at = first / at_once * at_once;
        while let Some(start) = (at..last).find(|index| !marked(index)) {
            at = (start..last).find(marked).unwrap_or(last);
            let (from, to) = (start * chunks.bytes, (at * chunks.bytes).min(whole.len));
            let part = Range { start: whole.start + from, len: to - from };
            memory::hide(part)?;
            self.alias.protect(part, READ)?;
            chunks.marked[start..at].iter().for_each(|mark| mark.store(true, Ordering::Release));
            *marks += 1;
        }
        Ok(())
    }

    /// Makes a granule of a writable mapping open to writes, or read-only.
    fn set_open(&self, range: Range, open: bool) -> Result<(), i32> {
        if open {
            self.open.take(range.start)?;
            self.alias.protect(range, OPEN).inspect_err(|_| {
                self.open.give(range);
            })
        } else if self.open.any_in(range) {
            self.alias.protect(range, READ)?;
            self.open.give(range);
            Ok(())
        } else {
            Ok(())
        }
    }
}

impl Pmap for GuardPmap {
    fn kind(&self) -> Kind {
        Kind::Guard
    }

    fn enter(&self, range: Range, writable: bool) -> Result<(), i32> {
        self.alias.enter(range, writable)?;
        let bytes = CHUNK.max((range.len / CHUNKS_MAX).next_power_of_two());
        let marked = (0..range.len.div_ceil(bytes)).map(|_| AtomicBool::new(false)).collect();
        self.chunks.set(Chunks { bytes, marked, marks: Mutex::new(0) }).map_err(|_| libc::EEXIST)
    }

    fn leave(&self, range: Range) {
        self.open.give(range);
    }

    fn install(&self, start: usize, bytes: &[u8], protected: bool) -> Result<(), i32> {
        let range = Range { start, len: bytes.len() };
        self.mark(range)?;
        self.alias.fill(start, bytes)?;
        if self.alias.entered().writable {
            self.set_open(range, !protected)?;
        }
        memory::show(range)
    }

    fn remove(&self, ranges: &[Range]) {
        for range in joined(ranges) {
            // Refused where the program has locked its memory (mlockall): the page stays as it is,
            // and shows what its backing holds.
            if memory::hide(range).is_ok() {
                // Without a map entry to spare a granule stays open, and known to be, until it is
                // installed again.
                let _ = self.set_open(range, false);
                self.alias.free(range);
            }
        }
    }

    fn protect(&self, range: Range, on: bool) -> Result<(), i32> {
        self.set_open(range, !on)
    }

    fn tracking(&self) -> Tracking {
        Tracking::Mprotect
    }

    fn faults_are_signals(&self) -> bool {
        true
    }

    fn absent_is_segv(&self) -> bool {
        true
    }
}

impl RunningPmap for GuardPmap {
    fn forget_in_child(&self) {
        self.alias.forget_in_child();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marking_a_chunk_hides_nothing_that_was_shown() {
        let works = |rung: &super::super::Rung| rung.kind == Kind::Guard && rung.works;
        if !super::super::probe().iter().any(works) {
            return; // the ladder's own test says whether it should
        }
        let (page, stride) = (memory::page_bytes(), 2 * CHUNK);
        let count = MARKS + 100;
        let range = memory::reserve(count * stride, libc::PROT_NONE).unwrap();
        let pmap = GuardPmap::start().unwrap();
        pmap.enter(range, false).unwrap();
        // From the end, so that what is marked at once later lies before what is shown.
        for index in (0..count).rev() {
            pmap.install(range.start + index * stride, &vec![1; page], false).unwrap();
        }
        for index in 0..count {
            assert!(memory::is_readable(range.start + index * stride), "{index}");
            assert!(!memory::is_readable(range.start + index * stride + page), "{index}");
            assert!(!memory::is_readable(range.start + index * stride + CHUNK), "{index}");
        }
        assert!(*pmap.chunks.get().unwrap().marks.lock() > MARKS);
        pmap.leave(range);
        // SAFETY: reserved above; nothing refers to it.
        unsafe { memory::unmap(range) };
    }
}
