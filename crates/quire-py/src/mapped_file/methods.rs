//! The methods of `MappedFile`: what they do, and all but the hottest as the interpreter calls them.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use pyo3::exceptions::{PyOSError, PyOverflowError, PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use quire_core::errors::{FaultCode, StoreError};
use quire_core::pmap::kernel;
use quire_core::sys::lock::Mutex;
use quire_core::sys::memory::{self, page_bytes};
use quire_core::sys::mmap;
use quire_core::units::ByteOffset;

use super::items::Items;
use super::view::Given;
use super::{CLOSED, LONG, MappedFileBase, OPEN, Span, search};
use crate::errors;
use crate::kernel_mapping::KernelMappingBase;

/// Bytes as slices: of a span that is open.
///
/// # Safety
/// The bytes stay mapped while the slice lives. What others store there meanwhile is seen or not, as in all memory
/// that is shared; nobody here draws conclusions from seeing the same byte twice.
unsafe fn slice<'a>(span: Span, from: usize, to: usize) -> &'a [u8] {
    // SAFETY: the caller's (contract).
    unsafe { std::slice::from_raw_parts(span.at(from) as *const u8, to - from) }
}

/// An index as slices count: from the end where it is negative, and never outside.
fn clipped(index: Option<isize>, otherwise: usize, size: usize) -> usize {
    match index {
        None => otherwise.min(size),
        Some(index) if index < 0 => size.saturating_sub(index.unsigned_abs()),
        Some(index) => index.unsigned_abs().min(size),
    }
}

/// A new bytes object, and the address of its bytes, which the caller fills before anyone sees it.
pub(super) fn new_bytes(py: Python<'_>, len: usize) -> PyResult<(Bound<'_, PyBytes>, usize)> {
    // SAFETY: asks for uninitialised bytes: a new reference, or null with an exception set; the bytes of a bytes
    // object are where it says.
    unsafe {
        let made = ffi::PyBytes_FromStringAndSize(std::ptr::null(), len.cast_signed());
        let made = Bound::from_owned_ptr_or_err(py, made)?.cast_into_unchecked::<PyBytes>();
        let to = ffi::PyBytes_AsString(made.as_ptr()) as usize;
        Ok((made, to))
    }
}

/// A bytes object of memory that may be a mapping's; where it holds filler, who touches drops it.
///
/// # Safety
/// So many bytes are there.
#[inline]
unsafe fn bytes_of(py: Python<'_>, at: usize, len: usize) -> PyResult<Bound<'_, PyBytes>> {
    // SAFETY: the caller's (contract); a new reference to a bytes object, or null with an exception set.
    unsafe {
        let made = ffi::PyBytes_FromStringAndSize(at as *const _, len.cast_signed());
        Ok(Bound::from_owned_ptr_or_err(py, made)?.cast_into_unchecked())
    }
}

/// Touches each page of some bytes, which the caller holds.
fn look_at(start: usize, len: usize) {
    for at in (0..len).step_by(page_bytes()).chain(len.checked_sub(1)) {
        // SAFETY: a byte of them.
        unsafe { std::ptr::read_volatile((start + at) as *const u8) };
    }
}

impl MappedFileBase {
    /// A new bytes object of a part.
    #[inline]
    pub(super) fn copy_out<'py>(
        &self,
        py: Python<'py>,
        span: Span,
        from: usize,
        len: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let at = span.at(from);
        if len < LONG {
            // SAFETY: the part is open (`Span`) while the lock is held.
            let make = || unsafe { bytes_of(py, at, len) };
            return kernel::touch(make).map_err(|id| self.failed(id, from))?;
        }
        let (made, to) = new_bytes(py, len)?;
        // SAFETY: the part is open and stays so while `released` counts; `to` is ours.
        self.touch(py, len, from, || unsafe {
            std::ptr::copy_nonoverlapping(at as *const u8, to as *mut u8, len);
        })?;
        Ok(made)
    }

    /// Copies bytes that are no mapping's into a part.
    #[inline]
    pub(super) fn copy_in(&self, py: Python<'_>, span: Span, to: usize, from: &[u8]) -> PyResult<()> {
        let at = span.at(to);
        // SAFETY: as in `copy_out`; it is writable, or the fault says so.
        self.touch(py, from.len(), to, || unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr(), at as *mut u8, from.len());
        })
    }

    /// As `copy_in`, of bytes that may be a mapping's. A piece that cannot be had is not copied: what stands in its
    /// place is not to get into a file.
    pub(super) fn copy_over(&self, py: Python<'_>, span: Span, to: usize, from: &[u8]) -> PyResult<()> {
        let (at, start, len) = (span.at(to), from.as_ptr() as usize, from.len());
        let pieces = len.div_ceil(LONG);
        let backwards = at > start; // they may overlap
        let copy = || {
            (0..pieces).try_for_each(|number| {
                let offset = if backwards { pieces - 1 - number } else { number } * LONG;
                let piece = LONG.min(len - offset);
                kernel::touch(|| look_at(start + offset, piece))?;
                // SAFETY: the caller's slice, and a part of the span, which stays open; it is writable, or the fault
                // says so.
                let copy = || unsafe {
                    std::ptr::copy((start + offset) as *const u8, (at + offset) as *mut u8, piece);
                };
                kernel::touch(copy)
            })
        };
        self.long(py, len, copy).map_err(|id| self.failed(id, to))
    }

    /// `find`, or `rfind` if `from_end`.
    pub(super) fn search(
        &self,
        py: Python<'_>,
        sub: &Bound<'_, PyAny>,
        bounds: [Option<isize>; 2],
        from_end: bool,
    ) -> PyResult<isize> {
        let needle = Given::of(sub)?;
        let span = self.span(py)?;
        let start = clipped(bounds[0], self.position(), span.size);
        let end = clipped(bounds[1], span.size, span.size);
        if start > end {
            return Ok(-1);
        }
        let needle = needle.bytes();
        let found = if from_end {
            self.last_of(py, span, start..end, needle)
        } else {
            self.first_of(py, span, start..end, needle)
        };
        Ok(found?.map_or(-1, usize::cast_signed))
    }

    /// Where bytes are first in a part. A little is searched with the interpreter lock, the rest without.
    fn first_of(
        &self,
        py: Python<'_>,
        span: Span,
        part: Range<usize>,
        needle: &[u8],
    ) -> PyResult<Option<usize>> {
        let search = |from: usize, to: usize| {
            // SAFETY: within the span, which stays open (`touch`).
            search::first(unsafe { slice(span, from, to) }, needle).map(|at| from + at)
        };
        let near = part.end.min(part.start + LONG - 1);
        let found = self.touch(py, near - part.start, part.start, || search(part.start, near))?;
        if found.is_some() || near == part.end {
            return Ok(found);
        }
        let next = (near + 1).saturating_sub(needle.len()).max(part.start); // what lies across is not lost
        self.touch(py, LONG.max(part.end - next), next, || search(next, part.end))
    }

    /// As `first_of`, the last place.
    fn last_of(
        &self,
        py: Python<'_>,
        span: Span,
        part: Range<usize>,
        needle: &[u8],
    ) -> PyResult<Option<usize>> {
        let search = |from: usize, to: usize| {
            // SAFETY: within the span, which stays open (`touch`).
            search::last(unsafe { slice(span, from, to) }, needle).map(|at| from + at)
        };
        let near = part.start.max((part.end + 1).saturating_sub(LONG));
        let found = self.touch(py, part.end - near, near, || search(near, part.end))?;
        if found.is_some() || near == part.start {
            return Ok(found);
        }
        let next = part.end.min((near + needle.len()).saturating_sub(1));
        self.touch(py, LONG.max(next - part.start), part.start, || search(part.start, next))
    }

    /// Reads to the end of the line, or to the end.
    #[inline]
    pub(super) fn line<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        loop {
            if let Some(line) = self.short_line(py)? {
                return Ok(line);
            }
            if let Some(line) = self.long_line(py)? {
                return Ok(line);
            }
        }
    }

    /// The line at the position, if it is searched and copied with the interpreter lock.
    #[inline]
    fn short_line<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let span = self.span(py)?;
        let from = self.position().min(span.size);
        let near = span.size.min(from + LONG - 1);
        let search = || {
            // SAFETY: within the span, which is open while the lock is held.
            let bytes = unsafe { slice(span, from, near) };
            let end = search::first_byte(bytes, b'\n').map(|at| at + 1);
            let len = end.or((near == span.size).then_some(bytes.len()))?;
            // SAFETY: as above.
            Some(unsafe { bytes_of(py, bytes.as_ptr() as usize, len) }.map(|line| (line, len)))
        };
        let found = kernel::touch(search).map_err(|id| self.failed(id, from))?;
        let Some((line, len)) = found.transpose()? else { return Ok(None) };
        self.move_to(self.position() + len); // which may lie beyond the end
        Ok(Some(line))
    }

    /// The line at the position, of [`LONG`] bytes at least; `None` when another thread has moved the position
    /// while it was searched.
    fn long_line<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let span = self.span(py)?;
        let position = self.position();
        let from = position.min(span.size);
        let near = span.size.min(from + LONG - 1);
        let end = self.first_of(py, span, near..span.size, b"\n")?;
        let to = end.map_or(span.size, |at| at + 1);
        let span = self.span(py)?; // the lock may have been released
        if self.position() != position {
            return Ok(None);
        }
        let len = to.min(span.size).saturating_sub(from);
        self.claim(len, || self.copy_out(py, span, from.min(span.size), len)).map(Some)
    }

    /// Reads one byte, as a number.
    pub(super) fn next_byte(&self, py: Python<'_>) -> PyResult<u8> {
        let span = self.span(py)?;
        let at = self.position();
        if at >= span.size {
            return Err(PyValueError::new_err("read byte out of range"));
        }
        let byte = self.byte(span, at)?;
        self.move_to(at + 1);
        Ok(byte)
    }
}

#[pymethods]
impl MappedFileBase {
    #[new]
    fn new(py: Python<'_>, mapping: Bound<'_, KernelMappingBase>) -> PyResult<Self> {
        let writable = mapping.getattr("writable")?.extract()?;
        let made = MappedFileBase {
            mapping: mapping.unbind(),
            view: Mutex::new(None),
            address: AtomicUsize::new(0),
            size: AtomicUsize::new(0),
            position: AtomicUsize::new(0),
            exports: AtomicUsize::new(0),
            stage: AtomicU32::new(OPEN),
            changer_pid: AtomicU32::new(0),
            workers: AtomicU32::new(0),
            workers_pid: AtomicU32::new(0),
            writable,
        };
        made.open(py)?;
        Ok(made)
    }

    /// The mapping whose bytes these are. It cannot be closed or resized but by this object.
    #[getter]
    fn mapping(&self, py: Python<'_>) -> Py<KernelMappingBase> {
        self.mapping.clone_ref(py)
    }

    /// Views that are alive.
    #[getter]
    fn exports(&self) -> usize {
        self.exports.load(Ordering::Acquire)
    }

    #[getter]
    fn closed(&self) -> bool {
        self.stage.load(Ordering::Acquire) == CLOSED
    }

    /// Closes it and its mapping; BufferError while views are alive.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        if !self.begin_change(py, "cannot close exported pointers exist")? {
            return Ok(());
        }
        self.end_change(CLOSED);
        self.mapping.call_method0(py, "close").map(|_| ())
    }

    /// Changes how many bytes there are, as the mapping's own `resize`; BufferError while views are alive. What is
    /// to be done with the file is called while all others wait: before private memory is changed, or after shared.
    #[pyo3(signature = (size, /, *, with_file=None))]
    fn resize(&self, py: Python<'_>, size: usize, with_file: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        self.span(py)?;
        self.begin_change(py, "mmap can't resize with extant pointers exported.")?;
        let mapping = || self.mapping.call_method1(py, "resize", (size,)).map(drop);
        let file = || with_file.map_or(Ok(()), |call| call.call0().map(drop));
        let resized =
            if self.is_private() { file().and_then(|()| mapping()) } else { mapping().and_then(|()| file()) };
        let opened = self.open(py);
        self.end_change(if opened.is_ok() { OPEN } else { CLOSED });
        resized.and(opened)
    }

    /// Reads from the position on: all, or so many bytes.
    #[pyo3(signature = (n=None, /))]
    fn read<'py>(&self, py: Python<'py>, n: Option<&Bound<'py, PyAny>>) -> PyResult<Bound<'py, PyBytes>> {
        let wanted = match n {
            None => None,
            Some(n) if n.is_none() => None,
            // SAFETY: the object is alive.
            Some(n) if unsafe { ffi::PyIndex_Check(n.as_ptr()) } == 0 => {
                let kind = n.get_type().name()?;
                return Err(PyTypeError::new_err(format!(
                    "argument should be integer or None, not '{kind}'"
                )));
            }
            Some(n) => Some(n.extract::<isize>()?),
        };
        let span = self.span(py)?;
        let rest = span.rest(self.position());
        let len =
            wanted.and_then(|wanted| usize::try_from(wanted).ok()).map_or(rest, |wanted| wanted.min(rest));
        let from = self.position().min(span.size);
        self.claim(len, || self.copy_out(py, span, from, len))
    }

    /// Writes at the position; returns how many bytes.
    #[pyo3(signature = (data, /))]
    fn write(&self, py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<usize> {
        let given = Given::of(data)?;
        let from = given.bytes();
        let span = self.span(py)?;
        self.require_writable()?;
        let at = self.position();
        if at > span.size || span.rest(at) < from.len() {
            return Err(PyValueError::new_err("data out of range"));
        }
        self.claim(from.len(), || match given {
            Given::Plain(from) => self.copy_in(py, span, at, from),
            Given::Held(_) => self.copy_over(py, span, at, from),
        })?;
        Ok(from.len())
    }

    /// Writes one byte at the position.
    #[pyo3(signature = (byte, /))]
    fn write_byte(&self, py: Python<'_>, byte: &Bound<'_, PyAny>) -> PyResult<()> {
        let byte = u8::try_from(byte.extract::<i64>()?)
            .map_err(|_| PyOverflowError::new_err("an unsigned byte is an integer from 0 to 255"))?;
        let span = self.span(py)?;
        self.require_writable()?;
        let at = self.position();
        if at >= span.size {
            return Err(PyValueError::new_err("write byte out of range"));
        }
        self.set_byte(span, at, byte)?;
        self.move_to(at + 1);
        Ok(())
    }

    /// Copies a part of it to another place in it.
    #[pyo3(name = "move", signature = (dest, src, count, /))]
    fn move_part(&self, py: Python<'_>, dest: isize, src: isize, count: isize) -> PyResult<()> {
        let span = self.span(py)?;
        self.require_writable()?;
        let inside = |at: isize| {
            let (at, count) = (usize::try_from(at).ok()?, usize::try_from(count).ok()?);
            (at <= span.size && count <= span.size - at).then_some((at, count))
        };
        let (Some((to, count)), Some((from, _))) = (inside(dest), inside(src)) else {
            return Err(PyValueError::new_err("source, destination, or count out of range"));
        };
        // SAFETY: within the span, which stays open.
        self.copy_over(py, span, to, unsafe { slice(span, from, from + count) })
    }

    /// Sets the position, and returns it.
    #[pyo3(signature = (pos, whence=0, /))]
    fn seek(&self, py: Python<'_>, pos: isize, whence: i32) -> PyResult<usize> {
        let span = self.span(py)?;
        let from = match whence {
            0 => 0,
            1 => self.position(),
            2 => span.size,
            _ => return Err(PyValueError::new_err("unknown seek type")),
        };
        let to = from.checked_add_signed(pos).filter(|to| *to <= span.size);
        let to = to.ok_or_else(|| PyValueError::new_err("seek out of range"))?;
        self.move_to(to);
        Ok(to)
    }

    /// Whether there is a position: yes.
    fn seekable(&self) -> bool {
        true
    }

    /// Writes back what is dirty and makes it durable (msync(2)).
    #[pyo3(
        signature = (offset=0, size=-1, /, *, flags=libc::MS_SYNC),
        text_signature = "($self, offset=0, size=-1, /, *, flags=4)"
    )]
    fn flush(&self, py: Python<'_>, offset: isize, size: isize, flags: i32) -> PyResult<()> {
        let span = self.span(py)?;
        let out = || PyValueError::new_err("flush values out of range");
        let offset = usize::try_from(offset).ok().filter(|at| *at <= span.size).ok_or_else(out)?;
        let rest = span.rest(offset);
        let size = if size == -1 { rest } else { usize::try_from(size).map_err(|_| out())? };
        if size > rest {
            return Err(out());
        }
        if !self.writable || self.is_private() {
            return Ok(()); // there is nothing that a file would get
        }
        if !span.at(offset).is_multiple_of(page_bytes()) && offset != 0 {
            let page = page_bytes();
            let (first, len) = (offset / page * page, size + offset % page);
            return Err(PyOSError::new_err((
                libc::EINVAL,
                format!(
                    "flush begins at a page of {page} bytes, and offset {offset} is none: flush({first}, {len}) \
                     writes the pages that hold these bytes"
                ),
            )));
        }
        self.sync(py, span, offset, size, flags)
    }

    /// Gives advice to the pages from `start` on (madvise(2)).
    #[pyo3(signature = (option, start=0, length=None, /))]
    fn madvise(&self, py: Python<'_>, option: i32, start: isize, length: Option<isize>) -> PyResult<()> {
        let span = self.span(py)?;
        let Some(start) = usize::try_from(start).ok().filter(|at| *at < span.size) else {
            return Err(PyValueError::new_err("madvise start out of bounds"));
        };
        let length = match length.map(usize::try_from) {
            None => span.size,
            Some(Ok(length)) => length,
            Some(Err(_)) => return Err(PyValueError::new_err("madvise length invalid")),
        };
        if start + length > isize::MAX.cast_unsigned() {
            return Err(PyOverflowError::new_err("madvise length too large"));
        }
        // What comes before an offset inside a page is in that page, and not to be removed with it.
        let slack = if start == 0 && option != libc::MADV_REMOVE { span.at(0) % page_bytes() } else { 0 };
        let len = match length.min(span.rest(start)) {
            0 => 0,
            len => len + slack,
        };
        let range = memory::Range { start: span.at(start) - slack, len };
        // SAFETY: pages of the mapping, which stays while `released` counts; what the advice does is meant.
        self.released(py, || unsafe { mmap::advise(range, option) })
            .map_err(|errno| PyOSError::new_err((errno, quire_core::sys::errno_message(errno))))
    }

    /// Each byte, as bytes of length 1.
    fn __iter__(slf: Bound<'_, Self>) -> Items {
        Items::forwards(slf.unbind())
    }

    /// As `iter`, from the end.
    fn __reversed__(slf: Bound<'_, Self>, py: Python<'_>) -> PyResult<Items> {
        let size = slf.get().span(py)?.size;
        Ok(Items::backwards(slf.unbind(), size))
    }

    /// Whether one of the bytes, as bytes of length 1, is equal to an object.
    fn __contains__(slf: Bound<'_, Self>, object: &Bound<'_, PyAny>) -> PyResult<bool> {
        Items::contain(slf, object)
    }

    /// # Safety
    /// Called by the interpreter with a valid view to fill.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        // SAFETY: the interpreter's (contract); the object is this one's.
        let exported = unsafe { slf.get().export(slf.py(), slf.as_ptr(), view, flags) };
        if exported.is_err() {
            // SAFETY: the interpreter passes a view; its owner is null where the export fails.
            unsafe { (*view).obj = std::ptr::null_mut() };
        }
        exported
    }

    /// # Safety
    /// Called by the interpreter with a view that `__getbuffer__` filled.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.exports.fetch_sub(1, Ordering::AcqRel);
    }
}

impl MappedFileBase {
    fn is_private(&self) -> bool {
        self.mapping.get().map_flags() & libc::MAP_TYPE == libc::MAP_PRIVATE
    }

    fn sync(&self, py: Python<'_>, span: Span, offset: usize, size: usize, flags: i32) -> PyResult<()> {
        let slack = span.at(offset) % page_bytes();
        let range = memory::Range { start: span.at(offset) - slack, len: size + slack };
        self.released(py, || mmap::sync(range, flags)).map_err(|errno| {
            if let libc::EINVAL | libc::EBUSY = errno {
                let why =
                    format!("{}: {}", quire_core::sys::errno_message(errno), refused_sync(errno, flags));
                return PyOSError::new_err((errno, why));
            }
            let mapping = self.mapping.get();
            let error = StoreError {
                code: FaultCode::WriteBack,
                offset: ByteOffset(mapping.offset() + offset as u64),
                errno: Some(errno),
                message: format!(
                    "{size} bytes could not all be written back: {}; flush again when it is mended",
                    quire_core::sys::errno_message(errno)
                ),
                part: None,
            };
            errors::from_store(py, mapping.label(), &error)
        })
    }
}

/// What is wrong with a call of msync(2) that says nothing of what was written.
fn refused_sync(errno: i32, flags: i32) -> String {
    let either = libc::MS_SYNC | libc::MS_ASYNC;
    if errno == libc::EBUSY {
        "pages are locked in memory, and MS_INVALIDATE cannot drop them: flush without it".into()
    } else if flags & !(either | libc::MS_INVALIDATE) != 0 || flags & either == either {
        format!("there is no flush of flags {flags:#x}: give MS_SYNC or MS_ASYNC, and MS_INVALIDATE or not")
    } else {
        "what is mapped is no file that is written back: a device, for instance".into()
    }
}
