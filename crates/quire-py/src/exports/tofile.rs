//! `ndarray.tofile`, and so `np.save`, of an array over a mapping that is watched.
//!
//! numpy calls fwrite(3) with the array's pointer, which ends in write(2). Here the bytes are copied a piece at
//! a time to memory of our own, without a touch that could fault, and numpy's own function writes each piece: it
//! works at any size, and an error is raised where it happens. Every other array goes straight to numpy, and so do
//! those that fwrite gets an element at a time: text, and arrays with gaps.

use std::ffi::c_char;
use std::ptr;

use pyo3::buffer::PyBuffer;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PySlice, PyString, PyTuple};
use quire_core::residency;

use super::numpy::{original_getbuffer, original_tofile};
use super::{Found, find, near, watches};
use crate::errors;

/// Bytes that are copied at once.
const PIECE: u64 = 1 << 20;
/// Bytes that are brought in at once, by the fill threads; a part of the budget where that is less.
const WINDOW: u64 = 16 << 20;
const WINDOW_SHARE: u64 = 4;

/// In place of numpy's `array_tofile`.
///
/// # Safety
/// As every method with keywords: called by the interpreter, its lock held; `array` is a numpy array.
pub unsafe extern "C" fn tofile(
    array: *mut ffi::PyObject,
    arguments: *mut ffi::PyObject,
    keywords: *mut ffi::PyObject,
) -> *mut ffi::PyObject {
    // SAFETY: the lock is held (contract).
    let py = unsafe { Python::assume_attached() };
    // SAFETY: `array` is one (contract).
    let view = unsafe { View::of_watched(array) };
    // SAFETY: the interpreter's own tuple and dict, or null (contract).
    let file = view.as_ref().and_then(|_| unsafe { binary_file(py, arguments, keywords) });
    let (Some(file), Some(view)) = (file, view) else {
        // SAFETY: what this function was called with.
        return unsafe { original_tofile()(array, arguments, keywords) };
    };
    match find(py, view.0.buf as usize, view.0.len as usize) {
        // SAFETY: what this function was called with.
        Ok(None) => unsafe { original_tofile()(array, arguments, keywords) },
        Ok(Some(found)) => match write(py, &found, &file) {
            Ok(()) => py.None().into_ptr(),
            Err(error) => {
                error.restore(py);
                ptr::null_mut()
            }
        },
        Err(error) => {
            error.restore(py);
            ptr::null_mut()
        }
    }
}

/// The file among the arguments of `tofile(file, sep="", format="%s")`; None for text, and for what numpy
/// is going to refuse.
///
/// # Safety
/// A tuple and a dict, or null.
unsafe fn binary_file<'py>(
    py: Python<'py>,
    arguments: *mut ffi::PyObject,
    keywords: *mut ffi::PyObject,
) -> Option<Bound<'py, PyAny>> {
    const NAMES: [&str; 3] = ["file", "sep", "format"];
    // SAFETY: as this function (contract).
    let (given, named) = unsafe {
        (Bound::from_borrowed_ptr_or_opt(py, arguments), Bound::from_borrowed_ptr_or_opt(py, keywords))
    };
    let given = given.and_then(|given| given.cast_into::<PyTuple>().ok())?;
    let named = named.and_then(|named| named.cast_into::<PyDict>().ok());
    let argument = |index: usize| match &named {
        _ if index < given.len() => given.get_item(index).ok(),
        Some(named) => named.get_item(NAMES[index]).ok().flatten(),
        None => None,
    };
    let asked = given.len() + named.as_ref().map_or(0, |named| named.len());
    let known = (0..NAMES.len()).filter_map(argument).count();
    let text = |value: Bound<'py, PyAny>| value.cast_into::<PyString>().ok();
    let no_separator = |sep| text(sep).is_some_and(|sep| sep.len().is_ok_and(|length| length == 0));
    let binary =
        argument(1).is_none_or(no_separator) && argument(2).is_none_or(|format| text(format).is_some());
    (asked == known && binary).then(|| argument(0)).flatten()
}

/// A view of an array's bytes, which keeps the array.
struct View(ffi::Py_buffer);

impl View {
    /// Of an array that may be watched and whose bytes lie side by side.
    ///
    /// # Safety
    /// `array` is a numpy array; the interpreter lock is held.
    unsafe fn of_watched(array: *mut ffi::PyObject) -> Option<View> {
        if !watches() {
            return None;
        }
        let mut view = View(ffi::Py_buffer::new());
        // SAFETY: numpy's own function (contract), an empty view, and flags that any array has.
        if unsafe { original_getbuffer()(array, &raw mut view.0, ffi::PyBUF_STRIDES) } != 0 {
            // SAFETY: the lock is held (contract). numpy is going to say it.
            unsafe { ffi::PyErr_Clear() };
            return None;
        }
        let inside = view.0.len > 0 && near(view.0.buf as usize);
        // SAFETY: filled just now.
        (inside && unsafe { ffi::PyBuffer_IsContiguous(&raw const view.0, b'C' as c_char) } != 0)
            .then_some(view)
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: filled by its exporter or empty; the lock is held wherever a view is.
        unsafe { ffi::PyBuffer_Release(&raw mut self.0) };
    }
}

/// Writes the bytes to a file, or to the file of a path.
fn write(py: Python<'_>, found: &Found, file: &Bound<'_, PyAny>) -> PyResult<()> {
    let is_path = file.is_instance_of::<PyString>() || file.is_instance_of::<PyBytes>();
    if !is_path && !file.hasattr("__fspath__")? {
        return write_pieces(py, found, file);
    }
    let opened = py.import("io")?.call_method1("open", (file, "wb"))?;
    let written = write_pieces(py, found, &opened);
    let closed = opened.call_method0("close").map(drop);
    written.and(closed)
}

fn write_pieces(py: Python<'_>, found: &Found, file: &Bound<'_, PyAny>) -> PyResult<()> {
    let object = &found.entry.object;
    let refused = |error| errors::from_store(py, object.pager.store().label(), &error);
    let (start, end) = (found.span.start, found.span.end);
    let between = py.import("numpy")?.call_method1("empty", (PIECE.min(end - start), "u1"))?;
    let bytes = PyBuffer::<u8>::get(&between)?;
    let window = (object.budget().0 / WINDOW_SHARE).clamp(object.granule.0, WINDOW);
    let mut ready = start;
    let mut at = start;
    while at < end {
        let stop = end.min(at + PIECE);
        let next = if at >= ready { end.min((at + window).max(stop)) } else { ready };
        // SAFETY: the array is held, nobody else has it, and it has `PIECE` bytes or all.
        let piece = unsafe { std::slice::from_raw_parts_mut(bytes.buf_ptr().cast(), (stop - at) as usize) };
        py.detach(|| {
            if next > ready {
                residency::populate(&found.entry, at..next)?;
            }
            residency::read(&found.entry, at, piece)
        })
        .map_err(refused)?;
        ready = next;
        let part = between.get_item(PySlice::new(py, 0, (stop - at) as isize, 1))?;
        let arguments = PyTuple::new(py, [file])?;
        // SAFETY: an array, a tuple and no keywords.
        let done = unsafe { original_tofile()(part.as_ptr(), arguments.as_ptr(), ptr::null_mut()) };
        // SAFETY: a new reference or null, with an exception set.
        unsafe { Bound::from_owned_ptr_or_err(py, done) }?;
        at = stop;
    }
    Ok(())
}
