//! `MappingBase`: a mapped store with the buffer protocol. `quire.Mapping` derives from it.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use quire_core::errors::{MapError, words_of};
use quire_core::mapping::{Mapping, Mode, Options, Swapping};
use quire_core::readahead::Advice;
use quire_core::residency::PinError;
use quire_core::swap::Compression;
use quire_core::sys::memory::page_bytes;
use quire_core::units::ByteCount;

use crate::mapped::{Mapped, Paged};
use crate::store::PyStore;
use crate::{courier, errors, exports, module};

fn compression_of(name: &str) -> PyResult<Compression> {
    match name {
        "none" => Ok(Compression::None),
        "lz4" => Ok(Compression::Lz4),
        "zstd" => Ok(Compression::Zstd),
        other => {
            Err(PyValueError::new_err(format!("no compression {other:?}: there are none, lz4 and zstd")))
        }
    }
}

/// Bytes that `read_bytes` and `write_bytes` copy at once.
const COPY_BYTES: usize = 256 << 10;

/// Something mapped: by the constructor a store. Thread-safe.
#[pyclass(subclass, module = "quire._core", frozen)]
pub struct MappingBase {
    mapping: Arc<dyn Mapped>,
    exports: AtomicUsize,
    pins: AtomicUsize,
    unmapped: AtomicBool,
    /// The last view to go unmaps.
    leaving: AtomicBool,
    /// The process in which a thread changes its addresses, without the interpreter lock: who wants a view there
    /// waits. Children that it forks meanwhile have no such thread. 0 for none.
    changing: AtomicU32,
    /// Its arrays are watched for system calls (`exports`).
    watched: AtomicBool,
}

#[pymethods]
impl MappingBase {
    #[new]
    #[pyo3(signature = (store, budget_bytes=None, granule_bytes=None, pmap=None, retries=2, mode="r", policy=None,
        swap_folder=None, swap_limit_bytes=None, swap_compression="none", swap_encrypt=false))]
    #[allow(clippy::too_many_arguments, reason = "keyword arguments of the Python face")]
    fn new(
        py: Python<'_>,
        store: &PyStore,
        budget_bytes: Option<u64>,
        granule_bytes: Option<u64>,
        pmap: Option<String>,
        retries: u32,
        mode: &str,
        policy: Option<String>,
        swap_folder: Option<PathBuf>,
        swap_limit_bytes: Option<u64>,
        swap_compression: &str,
        swap_encrypt: bool,
    ) -> PyResult<Self> {
        let mode = match mode {
            "r" => Mode::ReadOnly,
            "r+" => Mode::Shared,
            "c" => Mode::Private,
            other => return Err(PyValueError::new_err(format!("no mode {other:?}"))),
        };
        courier::learn_main_thread();
        module::set_default_budget();
        let options = Options {
            mode,
            budget: budget_bytes.map(ByteCount),
            granule: granule_bytes.map(ByteCount),
            pmap,
            retries,
            policy,
            swap: Swapping {
                folder: swap_folder,
                limit: swap_limit_bytes.map(ByteCount),
                compression: compression_of(swap_compression)?,
                encrypt: swap_encrypt,
            },
        };
        let store = store.store();
        let below = Arc::clone(&store);
        courier::enter().map_err(|error| {
            let errno = error.raw_os_error().unwrap_or(libc::EAGAIN);
            let refused = MapError::Sys { call: "a thread", errno, message: words_of(&error) };
            errors::from_map(py, Some(store.label()), &refused)
        })?;
        let opened = py.detach(|| Mapping::open(below, &options).inspect_err(|_| courier::leave()));
        let mapping = opened.map_err(|error| errors::from_map(py, Some(store.label()), &error))?;
        Ok(MappingBase::over(Arc::new(Paged { mapping, store })))
    }

    #[getter]
    fn address(&self) -> usize {
        self.mapping.address()
    }

    #[getter]
    fn size_bytes(&self) -> u64 {
        self.mapping.size()
    }

    #[getter]
    fn granule_bytes(&self) -> u64 {
        self.mapping.granule()
    }

    #[getter]
    fn page_bytes(&self) -> usize {
        page_bytes()
    }

    #[getter]
    fn pmap(&self) -> &'static str {
        self.mapping.pmap()
    }

    /// How writes are noticed; None for a read-only mapping.
    #[getter]
    fn dirty_tracking(&self) -> Option<&'static str> {
        self.mapping.tracking()
    }

    /// Whether the addresses may be touched.
    #[getter]
    fn has_pointer(&self) -> bool {
        self.mapping.has_pointer()
    }

    #[getter]
    fn writable(&self) -> bool {
        self.mapping.writable()
    }

    #[getter]
    fn closed(&self) -> bool {
        self.unmapped.load(Ordering::Acquire)
    }

    #[getter]
    fn exports(&self) -> usize {
        self.exports.load(Ordering::Acquire)
    }

    /// Unmaps; BufferError while buffers are exported. With `discard` nothing is written any more.
    #[pyo3(signature = (discard=false))]
    fn unmap(&self, py: Python<'_>, discard: bool) -> PyResult<()> {
        let exports = self.exports.load(Ordering::Acquire);
        let pins = self.pins.load(Ordering::Acquire);
        if exports > 0 {
            return Err(PyBufferError::new_err(if pins > 0 {
                format!("cannot close: {pins} pin(s) are held; release them, then delete what views are left")
            } else {
                format!("cannot close: {exports} view(s) of the mapping are alive; delete them first")
            }));
        }
        if !discard {
            return self.end(py);
        }
        self.mapping.discard();
        let _ = self.end(py); // says that there was something to write
        Ok(())
    }

    /// Writes back the dirty pages of these bytes and makes them durable.
    #[pyo3(signature = (offset=0, length=None))]
    fn sync(&self, py: Python<'_>, offset: u64, length: Option<u64>) -> PyResult<()> {
        let end = length.map_or(u64::MAX, |length| offset.saturating_add(length));
        py.detach(|| self.mapping.sync(offset..end))
            .map_err(|error| errors::from_store(py, self.mapping.label(), &error))
    }

    /// Has the pages of these bytes resident.
    fn populate(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<()> {
        py.detach(|| self.mapping.populate(offset..offset.saturating_add(length)))
            .map_err(|error| errors::from_store(py, self.mapping.label(), &error))
    }

    /// Copies bytes of the mapping into a buffer of the caller's, which must lie in other memory.
    fn read_bytes(&self, py: Python<'_>, offset: u64, buffer: PyBuffer<u8>) -> PyResult<()> {
        let part = self.require_inside(offset, buffer.len_bytes())?;
        if buffer.readonly() || !buffer.is_c_contiguous() {
            return Err(PyBufferError::new_err("a buffer to read into is writable and contiguous"));
        }
        // SAFETY: the buffer is held, writable and contiguous; its owner may use it meanwhile, as with
        // every `readinto`.
        let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.buf_ptr().cast(), part) };
        // By way of a buffer of our own: the caller's may be another mapping, whose pages must not be
        // waited for while a page of this one is held.
        let copied = py.detach(|| {
            let mut between = vec![0; part.min(COPY_BYTES)];
            (offset..).step_by(COPY_BYTES).zip(bytes.chunks_mut(COPY_BYTES)).try_for_each(|(at, chunk)| {
                let got = &mut between[..chunk.len()];
                self.mapping.read(at, got)?;
                chunk.copy_from_slice(got);
                Ok(())
            })
        });
        copied.map_err(|error| errors::from_store(py, self.mapping.label(), &error))
    }

    /// A copy of bytes of the mapping.
    fn copy_bytes<'py>(&self, py: Python<'py>, offset: u64, length: usize) -> PyResult<Bound<'py, PyBytes>> {
        let length = self.require_inside(offset, length)?;
        PyBytes::new_with(py, length, |bytes| {
            let mut chunks = (offset..).step_by(COPY_BYTES).zip(bytes.chunks_mut(COPY_BYTES));
            py.detach(|| chunks.try_for_each(|(at, chunk)| self.mapping.read(at, chunk)))
                .map_err(|error| errors::from_store(py, self.mapping.label(), &error))
        })
    }

    /// Copies a buffer of the caller's into the mapping.
    fn write_bytes(&self, py: Python<'_>, offset: u64, buffer: PyBuffer<u8>) -> PyResult<()> {
        let part = self.require_inside(offset, buffer.len_bytes())?;
        if !buffer.is_c_contiguous() {
            return Err(PyBufferError::new_err("a buffer to write is contiguous"));
        }
        // SAFETY: the buffer is held and contiguous; its owner may use it meanwhile, as with every
        // `write`.
        let bytes = unsafe { std::slice::from_raw_parts(buffer.buf_ptr().cast(), part) };
        let copied = py.detach(|| {
            let mut chunks = (offset..).step_by(COPY_BYTES).zip(bytes.chunks(COPY_BYTES));
            chunks.try_for_each(|(at, chunk)| {
                let between = chunk.to_vec();
                self.mapping.write(at, &between)
            })
        });
        copied.map_err(|error| errors::from_store(py, self.mapping.label(), &error))
    }

    /// How the mapping is going to be touched: "normal", "sequential" or "random".
    fn advise_pattern(&self, advice: &str) -> PyResult<()> {
        let advice = match advice {
            "normal" => Advice::Normal,
            "sequential" => Advice::Sequential,
            "random" => Advice::Random,
            other => return Err(PyValueError::new_err(format!("no pattern {other:?}"))),
        };
        self.mapping.advise(advice);
        Ok(())
    }

    /// Starts to fill the pages of these bytes and does not wait.
    fn will_need(&self, py: Python<'_>, offset: u64, length: u64) {
        py.detach(|| self.mapping.will_need(offset..offset.saturating_add(length)));
    }

    /// Keeps the pages of these bytes resident.
    fn pin_bytes(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<()> {
        let pinned = py.detach(|| self.mapping.pin(offset..offset.saturating_add(length)));
        pinned.map_err(|error| match error {
            PinError::Map(error) => errors::from_map(py, Some(self.mapping.label()), &error),
            PinError::Page(error) => errors::from_store(py, self.mapping.label(), &error),
        })?;
        self.pins.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// Ends one `pin_bytes` of the same bytes.
    fn unpin_bytes(&self, py: Python<'_>, offset: u64, length: u64) {
        py.detach(|| self.mapping.unpin(offset..offset.saturating_add(length)));
        self.pins.fetch_sub(1, Ordering::AcqRel);
    }

    /// Evicts the pages of these bytes; returns the bytes freed.
    fn evict_bytes(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<u64> {
        py.detach(|| self.mapping.evict(offset..offset.saturating_add(length)))
            .map(|freed| freed.0)
            .map_err(|error| errors::from_store(py, self.mapping.label(), &error))
    }

    /// Unmaps now, or when the last of the buffers exported goes. No Python code runs then: an
    /// asynchronous page error would be raised, and lost, in a callback of the interpreter.
    fn unmap_when_idle(&self, py: Python<'_>) {
        self.leaving.store(true, Ordering::Release);
        if self.exports.load(Ordering::Acquire) == 0 {
            self.end_or_report(py);
        }
    }

    /// Counters, accounts and latencies.
    fn statistics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.mapping.statistics(py)
    }

    /// Why the mapping has failed; None when it has not.
    fn failure<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        self.mapping.failure().map(|failure| errors::page_error_dict(py, &failure)).transpose()
    }

    /// One byte per granule: 1 resident, 0 not.
    fn residency<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.mapping.resident())
    }

    /// Changes the mapping's budget; None is the process-wide budget alone.
    fn set_budget(&self, py: Python<'_>, budget_bytes: Option<u64>) -> PyResult<()> {
        let budget = ByteCount(budget_bytes.unwrap_or(u64::MAX));
        py.detach(|| self.mapping.set_budget(budget))
            .map_err(|error| errors::from_map(py, Some(self.mapping.label()), &error))
    }

    /// # Safety
    /// Called by the interpreter with a valid view to fill.
    unsafe fn __getbuffer__(slf: PyRef<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let refuse = |message: &str| {
            // SAFETY: the interpreter passes a view; its owner is null where the export fails.
            unsafe { (*view).obj = std::ptr::null_mut() };
            Err(PyBufferError::new_err(message.to_owned()))
        };
        while slf.is_changing() {
            slf.py().check_signals()?;
            slf.py().detach(std::thread::yield_now); // system calls of another thread's, which end
        }
        if slf.closed() {
            return refuse("the mapping is closed");
        }
        if !slf.has_pointer() {
            return refuse("pmap \"soft\" gives no pointer: use read, readinto and write");
        }
        let writable = slf.writable();
        if flags & ffi::PyBUF_WRITABLE == ffi::PyBUF_WRITABLE && !writable {
            return refuse("a writable view of a mapping that was opened with mode \"r\" (read-only)");
        }
        let len = isize::try_from(slf.mapping.size()).expect("mapped sizes fit the address space");
        let start = slf.mapping.address() as *mut _;
        let readonly = c_int::from(!writable);
        // SAFETY: the range stays mapped while the view holds a reference to `slf`: `unmap` refuses
        // while exports are counted, and a drop needs the last reference.
        let filled = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), start, len, readonly, flags) };
        if filled != 0 {
            return Err(PyErr::fetch(slf.py()));
        }
        slf.exports.fetch_add(1, Ordering::AcqRel);
        if let Some(range) = slf.mapping.unfilled()
            && !slf.watched.swap(true, Ordering::AcqRel)
        {
            exports::watch(slf.py(), range);
        }
        // SAFETY: just filled; released on error.
        unsafe { exports::hold(slf.py(), view, flags) }
    }

    /// # Safety
    /// Called by the interpreter with a view that `__getbuffer__` filled.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        if self.exports.fetch_sub(1, Ordering::AcqRel) == 1 && self.leaving.load(Ordering::Acquire) {
            Python::attach(|py| self.end_or_report(py));
        }
    }
}

impl MappingBase {
    /// The Python face of something mapped.
    pub fn over(mapping: Arc<dyn Mapped>) -> Self {
        MappingBase {
            mapping,
            exports: AtomicUsize::new(0),
            pins: AtomicUsize::new(0),
            unmapped: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            changing: AtomicU32::new(0),
            watched: AtomicBool::new(false),
        }
    }

    /// Whether anything refers to the addresses.
    pub fn has_views(&self) -> bool {
        self.exports.load(Ordering::Acquire) > 0
    }

    /// Changes where it lies, without the interpreter lock; told whether there are views, of which none comes
    /// meanwhile. `None` when another thread is at it.
    pub fn change<T: Send>(&self, py: Python<'_>, change: impl FnOnce(bool) -> T + Send) -> Option<T> {
        let views = self.has_views();
        let own = std::process::id();
        if self.changing.swap(own, Ordering::AcqRel) == own {
            return None;
        }
        let changed = py.detach(|| change(views));
        self.changing.store(0, Ordering::Release);
        Some(changed)
    }

    fn is_changing(&self) -> bool {
        let changer = self.changing.load(Ordering::Acquire);
        changer != 0 && changer == std::process::id()
    }

    /// `len`, if so many bytes from `offset` on lie in the mapping.
    fn require_inside(&self, offset: u64, len: usize) -> PyResult<usize> {
        let size = self.mapping.size();
        if offset.checked_add(len as u64).is_none_or(|end| end > size) {
            return Err(PyValueError::new_err(format!(
                "{len} bytes from byte {offset} on do not lie in a mapping of {size}"
            )));
        }
        Ok(len)
    }

    /// Unmaps once, without the interpreter lock: it waits for threads that may want the lock.
    fn end(&self, py: Python<'_>) -> PyResult<()> {
        if self.unmapped.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        if self.watched.swap(false, Ordering::AcqRel) {
            exports::unwatch(py);
        }
        py.detach(|| self.mapping.unmap())
            .map_err(|error| errors::from_store(py, self.mapping.label(), &error))
    }

    /// As `end`, where nobody can be told but `sys.unraisablehook`.
    fn end_or_report(&self, py: Python<'_>) {
        if let Err(error) = self.end(py) {
            error.write_unraisable(py, None);
        }
    }
}

impl Drop for MappingBase {
    fn drop(&mut self) {
        Python::attach(|py| self.end_or_report(py));
    }
}
