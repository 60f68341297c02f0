//! System calls on cold pages, with the pmaps whose faults are signals.
//!
//! There the kernel cannot have a page brought in: write(2) from an absent page, or read(2) into a page
//! whose writes are to be noticed, is EFAULT. Arrays must be exact `numpy.ndarray`s, so what they export is
//! watched instead (`numpy.rs` puts [`getbuffer`] into numpy's own table):
//!
//! - Who is going to make a system call asks for *plain bytes*: `y*` and `w*` of the argument parser, without
//!   shape or strides (`file.write`, `os.write`, `socket.send`, `readinto`, `recv_into`). Such an export of
//!   ours is pinned until it is released, and open to writes if that was asked. The view then belongs to an
//!   [`Export`], which holds the view of the array (re-export, PEP 3118): numpy has no `bf_releasebuffer`, and
//!   must not get one, as the argument parser refuses `y#` and `s#` of what has.
//! - Bounded: at most [`PLAIN_MAX`], and half of what is left for pins. `struct.unpack_from` and `np.frombuffer`
//!   ask in the same way and look at a few bytes. What is larger is exported as it is; if a system call then
//!   fails, its "Bad address" is put into words when the export is released.
//! - Exports with shape and strides (`memoryview`, whatever is made of one) may live for ever: never pinned.
//! - `ndarray.tofile`, and so `np.save`, goes by the pointer: see `tofile.rs`.
//!
//! Hazards: the hook runs at every export of every array, so what is not ours must leave by [`near`]; it may not
//! assume that the exporter is an array of any kind; and pages come in without the interpreter lock.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::ops::Range as Span;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use pyo3::exceptions::PyOSError;
use pyo3::ffi;
use pyo3::prelude::*;
use quire_core::errors::{FaultCode, StoreError};
use quire_core::memory_object::{InFlight, MemoryObject};
use quire_core::page_cache::PAGE_CACHE;
use quire_core::residency::{self, PinError};
use quire_core::runtime;
use quire_core::space::{MapEntry, SPACE};
use quire_core::sys::memory::{Range, Touch};
use quire_core::units::{ByteCount, ByteOffset};

use crate::errors;

mod numpy;
mod tofile;

pub use numpy::watch_exports;

/// Bytes of one export that are pinned at most.
const PLAIN_MAX: u64 = 64 << 20;

/// Number of mappings that are watched; changed with the interpreter lock held.
static WATCHED: AtomicUsize = AtomicUsize::new(0);
/// Where the mappings lie that are watched: no address of theirs is below or from here on.
static LOW: AtomicUsize = AtomicUsize::new(usize::MAX);
static HIGH: AtomicUsize = AtomicUsize::new(0);
/// Bytes of pages that exports keep pinned now.
static EXPORTED: AtomicU64 = AtomicU64::new(0);

/// An array over this range, of a pmap whose faults are signals, is about to be handed out. Where
/// numpy cannot be watched nothing is changed; `quire doctor` says why.
pub fn watch(py: Python<'_>, range: Range) {
    numpy::install(py);
    WATCHED.fetch_add(1, Ordering::AcqRel);
    LOW.fetch_min(range.start, Ordering::AcqRel);
    HIGH.fetch_max(range.start + range.len, Ordering::AcqRel);
}

/// Ends one [`watch`]: nothing refers to the range any more.
pub fn unwatch(_py: Python<'_>) {
    if WATCHED.fetch_sub(1, Ordering::AcqRel) == 1 {
        LOW.store(usize::MAX, Ordering::Release);
        HIGH.store(0, Ordering::Release);
    }
}

/// Whether memory may be of a watched mapping; false for nearly all other memory, and without a lock.
fn near(start: usize) -> bool {
    start >= LOW.load(Ordering::Relaxed) && start < HIGH.load(Ordering::Relaxed)
}

/// Whether any mapping is watched.
fn watches() -> bool {
    LOW.load(Ordering::Relaxed) != usize::MAX
}

/// Bytes of a mapping that is watched.
struct Found {
    entry: Arc<MapEntry>,
    span: Span<u64>,
    _in_flight: InFlight,
}

/// The mapping that all of these bytes lie in, if the kernel cannot have its pages brought in.
fn find(py: Python<'_>, start: usize, len: usize) -> PyResult<Option<Found>> {
    if len == 0 || !near(start) {
        return Ok(None);
    }
    let Some((entry, in_flight)) = SPACE.find(start) else { return Ok(None) };
    let offset = start - entry.range.start;
    if !entry.pmap.get().faults_are_signals() || len > entry.range.len - offset {
        return Ok(None);
    }
    let armed = || entry.armed.load(Ordering::Acquire);
    if !armed() && (entry.writable || py.detach(runtime::rearm).is_err() || !armed()) {
        let message = "the mapping belongs to the parent of this process: open it again";
        let error = StoreError::new(FaultCode::Closed, ByteOffset(offset as u64), message);
        return Err(errors::from_store(py, entry.object.pager.store().label(), &error));
    }
    let span = offset as u64..(offset + len) as u64;
    Ok(Some(Found { entry, span, _in_flight: in_flight }))
}

/// Pages that are pinned for an export.
struct Pinned {
    entry: Arc<MapEntry>,
    span: Span<u64>,
    bytes: u64,
}

impl Pinned {
    /// Pins them, if they fit.
    fn new(py: Python<'_>, found: &Found, touch: Touch) -> PyResult<Option<Pinned>> {
        let object = &found.entry.object;
        let pages = residency::pages_of(object, found.span.clone());
        let bytes = (pages.end - pages.start) * object.granule.0;
        if bytes > limit(object).0 {
            return Ok(None);
        }
        EXPORTED.fetch_add(bytes, Ordering::AcqRel);
        let (entry, span) = (Arc::clone(&found.entry), found.span.clone());
        match py.detach(|| residency::pin(&entry, span.clone(), touch)) {
            Ok(()) => Ok(Some(Pinned { entry, span, bytes })),
            Err(error) => {
                EXPORTED.fetch_sub(bytes, Ordering::AcqRel);
                match error {
                    PinError::Map(_) => Ok(None), // others were quicker to pin
                    PinError::Page(error) => {
                        Err(errors::from_store(py, object.pager.store().label(), &error))
                    }
                }
            }
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        residency::unpin(&self.entry, self.span.clone());
        EXPORTED.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

/// Bytes that one export may pin now: others find as much again.
fn limit(object: &MemoryObject) -> ByteCount {
    let process = PAGE_CACHE.account.budget().0 / 2;
    let unpinned = process.saturating_sub(EXPORTED.load(Ordering::Acquire));
    ByteCount((residency::room_for_pins(object).0.min(unpinned) / 2).min(PLAIN_MAX))
}

/// Owns a view of plain bytes, in place of their exporter.
#[pyclass(frozen, module = "quire._core")]
struct Export {
    /// The exporter's own view; released with this object.
    view: ffi::Py_buffer,
    pinned: Option<Pinned>,
    /// Gone before the view is: the last view of a mapping ends it.
    entry: Option<Arc<MapEntry>>,
}

// SAFETY: the view's pointers are used only in `drop`, where the interpreter lock is held.
unsafe impl Send for Export {}
// SAFETY: as above.
unsafe impl Sync for Export {}

impl Drop for Export {
    /// Runs when the caller releases its view, which a function does after it has set its exception.
    fn drop(&mut self) {
        Python::attach(|py| {
            let raised = PyErr::take(py);
            let missing = self.pinned.take().is_none();
            if let (true, Some(error), Some(entry)) = (missing, &raised, self.entry.take()) {
                explain(py, error, &entry, self.view.len);
            }
            self.entry = None;
            // SAFETY: a view that the exporter filled, released once.
            unsafe { ffi::PyBuffer_Release(&raw mut self.view) };
            if let Some(error) = raised {
                error.restore(py);
            }
        });
    }
}

/// Puts into words why a system call had a bad address.
fn explain(py: Python<'_>, error: &PyErr, entry: &MapEntry, len: isize) {
    let value = error.value(py);
    let errno = || value.getattr("errno").and_then(|errno| errno.extract::<i32>());
    if !error.is_instance_of::<PyOSError>(py) || errno().is_ok_and(|errno| errno != libc::EFAULT) {
        return;
    }
    let words = format!(
        "Bad address: {len} bytes of {:?} are not all resident, and too many to be brought in for a system call \
         with pmap {:?}: pass slices of at most {} bytes, or pin what is passed (quire.Mapping.pin), or pass a \
         copy (quire.Mapping.read)",
        entry.object.pager.store().label(),
        entry.pmap.get().kind().name(),
        limit(&entry.object)
    );
    // It fails for no OSError; the exception is then told as it is.
    let _ = value.setattr("strerror", words);
}

/// Makes a view, just exported, ready for a system call if it is one of plain bytes of a mapping that is
/// watched.
///
/// # Errors
/// A page could not be had; the view is released.
///
/// # Safety
/// `view` was filled by an exporter that was asked with `flags`, and is the caller's.
pub unsafe fn hold(py: Python<'_>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
    if !is_plain(flags) {
        return Ok(());
    }
    // SAFETY: filled (contract).
    let (start, len) = unsafe { ((*view).buf as usize, (*view).len) };
    let touch = if flags & ffi::PyBUF_WRITABLE == 0 { Touch::Read } else { Touch::Write };
    let held = find(py, start, usize::try_from(len).unwrap_or(0)).and_then(|found| {
        let Some(found) = found else { return Ok(None) };
        Ok(Some((Pinned::new(py, &found, touch)?, found.entry)))
    });
    let (pinned, entry) = match held {
        Ok(None) => return Ok(()),
        Ok(Some(held)) => held,
        Err(error) => {
            // SAFETY: filled (contract), and the caller takes it as released.
            unsafe { ffi::PyBuffer_Release(view) };
            return Err(error);
        }
    };
    // SAFETY: the view moves, with its reference to the exporter, into the export, which releases it also
    // where no object can be made of it; what stays refers to nothing until it is given the new owner.
    unsafe {
        let inner = std::ptr::read(view);
        (*view).obj = std::ptr::null_mut();
        (*view).obj = Py::new(py, Export { view: inner, pinned, entry: Some(entry) })?.into_ptr();
    }
    Ok(())
}

/// Whether an export asked for so is of plain bytes.
fn is_plain(flags: c_int) -> bool {
    flags & !(ffi::PyBUF_WRITABLE | ffi::PyBUF_FORMAT) == 0
}

/// In place of numpy's `array_getbuffer`.
///
/// # Safety
/// As every `getbufferproc`: called by the interpreter, its lock held.
unsafe extern "C" fn getbuffer(
    exporter: *mut ffi::PyObject,
    view: *mut ffi::Py_buffer,
    flags: c_int,
) -> c_int {
    // SAFETY: as this function (contract).
    let exported = unsafe { numpy::original_getbuffer()(exporter, view, flags) };
    // SAFETY: filled where the export succeeded.
    if exported != 0 || !is_plain(flags) || !near(unsafe { (*view).buf } as usize) {
        return exported;
    }
    // SAFETY: the lock is held (contract).
    let py = unsafe { Python::assume_attached() };
    // SAFETY: just filled.
    match unsafe { hold(py, view, flags) } {
        Ok(()) => 0,
        Err(error) => {
            error.restore(py);
            -1
        }
    }
}
