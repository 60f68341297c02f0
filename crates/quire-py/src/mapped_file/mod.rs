//! `MappedFile`: a mapping as a file and as a bytearray of fixed length, in the thin layer because a Python class
//! over a memoryview takes several times as long for an index as the standard library's `mmap`.
//!
//! It holds an export of its mapping, so the addresses stay; what it touches itself raises at once where a page
//! cannot be had. Copies and searches of [`LONG`] bytes and more are done without the interpreter lock.
//!
//! ```text
//!   OPEN ──── close, resize: no views ───> CHANGING ── nobody works without the lock ──> CLOSED, or OPEN again
//! ```
//!
//! In CHANGING and CLOSED `address` is 0: whoever meets that goes the slow way, which waits or raises. Every field is
//! changed with the interpreter lock held; they are atomic for the threads that work without it. A child forked while
//! a thread of its parent is CHANGING has no such thread: it opens again what the mapping is in it.
#![allow(unsafe_code)]

mod items;
mod methods;
mod search;
mod slots;
mod view;

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use pyo3::exceptions::{PyBufferError, PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use quire_core::kernel_mapping::take_failure;
use quire_core::pmap::kernel;
use quire_core::sys::futex;
use quire_core::sys::lock::Mutex;

use crate::errors;
use crate::kernel_mapping::KernelMappingBase;

pub use slots::add_class;
use view::View;

/// From so many bytes on the interpreter lock is released.
const LONG: usize = 256 << 10;

const OPEN: u32 = 0;
const CHANGING: u32 = 1;
const CLOSED: u32 = 2;
/// How often who waits looks whether its process has been forked away from what it waits for.
const LOOK: Duration = Duration::from_millis(20);

/// A mapping as a file. `MappedFile` adds the slots that are hot.
#[pyclass(subclass, weakref, frozen, module = "quire._core")]
pub struct MappedFileBase {
    mapping: Py<KernelMappingBase>,
    view: Mutex<Option<View>>,
    /// Where the bytes are; 0 unless it is open.
    address: AtomicUsize,
    size: AtomicUsize,
    position: AtomicUsize,
    exports: AtomicUsize,
    stage: AtomicU32,
    /// The process whose thread is CHANGING.
    changer_pid: AtomicU32,
    /// Threads that work on it without the interpreter lock, of process `workers_pid`.
    workers: AtomicU32,
    workers_pid: AtomicU32,
    writable: bool,
}

/// What is open: an address and how many bytes are there.
#[derive(Clone, Copy)]
struct Span {
    address: usize,
    size: usize,
}

impl Span {
    /// The address of a byte, of the span or just behind it.
    fn at(self, index: usize) -> usize {
        debug_assert!(index <= self.size);
        self.address + index
    }

    /// Bytes from an index on.
    fn rest(self, index: usize) -> usize {
        self.size.saturating_sub(index)
    }
}

impl MappedFileBase {
    /// What is open; `None` when that is being changed, or is gone.
    #[inline]
    fn quick(&self) -> Option<Span> {
        let address = self.address.load(Ordering::Relaxed);
        (address != 0).then(|| Span { address, size: self.size.load(Ordering::Relaxed) })
    }

    /// What is open, after a change by another thread; `ValueError` when it is closed.
    #[inline]
    fn span(&self, py: Python<'_>) -> PyResult<Span> {
        self.quick().map_or_else(|| self.span_again(py), Ok)
    }

    #[cold]
    fn span_again(&self, py: Python<'_>) -> PyResult<Span> {
        loop {
            if let Some(span) = self.quick() {
                return Ok(span);
            }
            match self.stage.load(Ordering::Acquire) {
                CLOSED => return Err(PyValueError::new_err("mmap closed or invalid")),
                CHANGING if self.changer_pid.load(Ordering::Acquire) != std::process::id() => {
                    self.inherit(py);
                }
                stage => py.detach(|| futex::wait(&self.stage, stage, LOOK)),
            }
        }
    }

    fn require_writable(&self) -> PyResult<()> {
        let refused = || PyTypeError::new_err("mmap can't modify a readonly memory map.");
        self.writable.then_some(()).ok_or_else(refused)
    }

    fn position(&self) -> usize {
        self.position.load(Ordering::Relaxed)
    }

    fn move_to(&self, position: usize) {
        self.position.store(position, Ordering::Relaxed);
    }

    /// Takes so many bytes at the position for a piece of work that may give up the interpreter lock: threads that
    /// read and write meanwhile go on behind them. Work that fails gives them back, unless somebody has gone on.
    #[inline]
    fn claim<T>(&self, len: usize, work: impl FnOnce() -> PyResult<T>) -> PyResult<T> {
        let before = self.position();
        self.move_to(before + len);
        work().inspect_err(|_| {
            if self.position() == before + len {
                self.move_to(before);
            }
        })
    }

    /// The error of a touch of this mapping, or of one that was copied from or to.
    #[cold]
    fn failed(&self, id: u64, offset: usize) -> PyErr {
        let error = take_failure(id, offset as u64);
        Python::attach(|py| errors::from_store(py, self.mapping.get().label(), &error))
    }

    /// Touches memory, `bytes` of it; without the interpreter lock if those are many.
    #[inline]
    fn touch<T: Send>(
        &self,
        py: Python<'_>,
        bytes: usize,
        offset: usize,
        touching: impl FnOnce() -> T + Send,
    ) -> PyResult<T> {
        self.long(py, bytes, || kernel::touch(touching)).map_err(|id| self.failed(id, offset))
    }

    /// Works on `bytes` of it, without the interpreter lock if those are many. A span holds for one such piece of
    /// work: after it, another thread may have closed or resized.
    #[inline]
    fn long<T: Send>(&self, py: Python<'_>, bytes: usize, work: impl FnOnce() -> T + Send) -> T {
        if bytes < LONG { work() } else { self.released(py, work) }
    }

    /// Works without the interpreter lock; nothing is unmapped or moved meanwhile.
    fn released<T: Send>(&self, py: Python<'_>, work: impl FnOnce() -> T + Send) -> T {
        let own = std::process::id();
        if self.workers_pid.swap(own, Ordering::AcqRel) != own {
            self.workers.store(0, Ordering::Release); // the parent's, before a fork
        }
        self.workers.fetch_add(1, Ordering::AcqRel);
        py.detach(|| {
            let done = work();
            if self.workers.fetch_sub(1, Ordering::AcqRel) == 1
                && self.stage.load(Ordering::Acquire) == CHANGING
            {
                futex::wake_all(&self.workers);
            }
            done
        })
    }

    /// Waits until nobody works without the interpreter lock.
    fn wait_idle(&self, py: Python<'_>) {
        loop {
            let workers = self.workers.load(Ordering::Acquire);
            if workers == 0 || self.workers_pid.load(Ordering::Acquire) != std::process::id() {
                return;
            }
            py.detach(|| futex::wait(&self.workers, workers, LOOK));
        }
    }

    /// Begins to close or resize it: from here on everyone else waits. False when it is closed already.
    fn begin_change(&self, py: Python<'_>, refusal: &'static str) -> PyResult<bool> {
        if self.span(py).is_err() {
            return Ok(false);
        }
        if self.exports.load(Ordering::Acquire) > 0 {
            return Err(PyBufferError::new_err(refusal));
        }
        self.address.store(0, Ordering::Release);
        self.changer_pid.store(std::process::id(), Ordering::Release);
        self.stage.store(CHANGING, Ordering::Release);
        self.wait_idle(py);
        drop(self.view.lock().take());
        Ok(true)
    }

    /// Ends what `begin_change` began.
    fn end_change(&self, stage: u32) {
        self.stage.store(stage, Ordering::Release);
        futex::wake_all(&self.stage);
    }

    /// Ends what a thread of the parent began that this child of a fork has not: with the mapping as it is here.
    #[cold]
    fn inherit(&self, py: Python<'_>) {
        self.changer_pid.store(std::process::id(), Ordering::Release);
        self.end_change(if self.open(py).is_ok() { OPEN } else { CLOSED });
    }

    /// Holds an export of the mapping; it is open from here on.
    fn open(&self, py: Python<'_>) -> PyResult<()> {
        let flags = if self.writable { ffi::PyBUF_WRITABLE } else { ffi::PyBUF_SIMPLE };
        let view = View::of(self.mapping.bind(py), flags)?;
        self.size.store(view.len(), Ordering::Relaxed);
        self.address.store(view.address(), Ordering::Release);
        *self.view.lock() = Some(view);
        Ok(())
    }

    /// Fills a view of the interpreter's.
    ///
    /// # Safety
    /// Called by the interpreter with a valid view to fill, for the object that this is of.
    unsafe fn export(
        &self,
        py: Python<'_>,
        object: *mut ffi::PyObject,
        view: *mut ffi::Py_buffer,
        flags: std::ffi::c_int,
    ) -> PyResult<()> {
        let span = self.span(py)?;
        let readonly = std::ffi::c_int::from(!self.writable);
        let len = span.size.cast_signed();
        // SAFETY: the range stays mapped and in place while exports are counted (`begin_change`), and the view
        // holds a reference to the object.
        let filled =
            unsafe { ffi::PyBuffer_FillInfo(view, object, span.address as *mut _, len, readonly, flags) };
        if filled != 0 {
            return Err(PyErr::fetch(py));
        }
        self.exports.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }
}
