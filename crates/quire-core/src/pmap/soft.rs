//! `soft`: no translations at all. Pages lie in plain memory, and only calls (`read`, `write`) look at
//! them, each of which makes sure that they are there. For a system that has no way to tell of a
//! fault, and to compare the others with.
#![allow(unsafe_code)]

use super::{Kind, Pmap, RunningPmap, Tracking};
use crate::sys::memory::{self, Range};

/// The pmap.
pub struct SoftPmap;

impl Pmap for SoftPmap {
    fn kind(&self) -> Kind {
        Kind::Soft
    }

    fn enter(&self, range: Range, _writable: bool) -> Result<(), i32> {
        // Nobody but the calls, which know what is there, may look.
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a reserved range of ours.
        unsafe { memory::protect(range, prot) }.map_err(|_| crate::sys::errno())
    }

    fn leave(&self, _range: Range) {}

    fn install(&self, start: usize, bytes: &[u8], _protected: bool) -> Result<(), i32> {
        // SAFETY: a page of an entered range that the caller owns (LOADING): nobody looks at it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), start as *mut u8, bytes.len()) };
        Ok(())
    }

    fn remove(&self, ranges: &[Range]) {
        // SAFETY: ranges of entered mappings whose pages the caller owns (EVICTING, LOADING).
        unsafe { memory::discard(ranges) }
    }

    fn protect(&self, _range: Range, _on: bool) -> Result<(), i32> {
        Ok(()) // a write is a call, which says so
    }

    fn tracking(&self) -> Tracking {
        Tracking::Calls
    }

    fn faults_are_signals(&self) -> bool {
        true
    }

    fn absent_is_segv(&self) -> bool {
        true // none is raised; but the range's protection is not for others to change
    }
}

impl RunningPmap for SoftPmap {
    fn forget_in_child(&self) {}
}
