//! The slots of `MappedFile` that a program calls millions of times: length, index, slice, and the shortest methods. They are functions of
//! the C interface, in a type of their own over [`MappedFileBase`], because what `#[pymethods]` do around
//! their work (noting the attached thread, checking the type again, catching panics) takes as long as an index.
//!
//! The order of checks is that of the standard library's `mmap`: closed, read-only, index, value.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_int, c_void};
use std::sync::atomic::{AtomicU8, Ordering};

use pyo3::exceptions::{PyIndexError, PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyTuple, PyType};
use quire_core::pmap::kernel;

use super::methods::new_bytes;
use super::view::Given;
use super::{LONG, MappedFileBase, Span};

const WRONG_INDEX: &str = "mmap index out of range";

/// The file behind an object.
///
/// # Safety
/// `object` is an instance of the type that `add_class` makes, alive while the reference is; the interpreter lock is
/// held.
unsafe fn file_of<'a>(object: *mut ffi::PyObject) -> &'a MappedFileBase {
    // SAFETY: the caller's (contract). The class is frozen, so its content is only ever borrowed.
    unsafe {
        let object = Borrowed::from_ptr(Python::assume_attached(), object);
        let file: *const MappedFileBase = object.cast_unchecked::<MappedFileBase>().get();
        &*file
    }
}

/// Calls, and sets the exception of what failed.
///
/// # Safety
/// The interpreter lock is held.
#[inline]
unsafe fn or_raise<T>(otherwise: T, call: impl FnOnce(Python<'_>) -> PyResult<T>) -> T {
    // SAFETY: the caller's (contract).
    let py = unsafe { Python::assume_attached() };
    call(py).unwrap_or_else(|error| {
        error.restore(py);
        otherwise
    })
}

impl MappedFileBase {
    /// The byte at an index of the span.
    #[inline]
    pub(super) fn byte(&self, span: Span, at: usize) -> PyResult<u8> {
        // SAFETY: a byte of the span, which is open while the lock is held.
        let byte = unsafe { AtomicU8::from_ptr(span.at(at) as *mut u8) };
        kernel::touch(|| byte.load(Ordering::Relaxed)).map_err(|id| self.failed(id, at))
    }

    /// Sets the byte at an index of the span.
    #[inline]
    pub(super) fn set_byte(&self, span: Span, at: usize, byte: u8) -> PyResult<()> {
        // SAFETY: as in `byte`; it is writable, or the fault says so.
        let place = unsafe { AtomicU8::from_ptr(span.at(at) as *mut u8) };
        kernel::touch(|| place.store(byte, Ordering::Relaxed)).map_err(|id| self.failed(id, at))
    }

    /// The index that an object means, counted from the end where it is negative.
    #[inline]
    fn index_of(
        &self,
        py: Python<'_>,
        item: *mut ffi::PyObject,
        refusal: &'static str,
    ) -> PyResult<(Span, usize)> {
        let index = number_of(py, item, || PyTypeError::new_err(refusal), ffi_index_error)?;
        let span = self.span(py)?; // what `__index__` does may have closed it
        let at = if index < 0 { span.size.checked_add_signed(index) } else { Some(index.cast_unsigned()) };
        let at = at.filter(|at| *at < span.size).ok_or_else(|| PyIndexError::new_err(WRONG_INDEX))?;
        Ok((span, at))
    }

    /// What a slice means: first index, number of bytes.
    #[inline]
    fn adjusted(
        &self,
        py: Python<'_>,
        mut start: isize,
        mut stop: isize,
        step: isize,
    ) -> PyResult<(Span, isize, usize)> {
        let span = self.span(py)?; // what `__index__` does may have closed it
        // SAFETY: numbers of this frame.
        let len = unsafe {
            ffi::PySlice_AdjustIndices(span.size.cast_signed(), &raw mut start, &raw mut stop, step)
        };
        Ok((span, start, len.cast_unsigned()))
    }

    #[inline]
    fn get(&self, py: Python<'_>, item: *mut ffi::PyObject) -> PyResult<*mut ffi::PyObject> {
        self.span(py)?;
        // SAFETY: the object is alive, the lock held.
        if unsafe { ffi::PySlice_Check(item) } == 0 {
            let (span, at) = self.index_of(py, item, "mmap indices must be integers")?;
            let byte = self.byte(span, at)?;
            // SAFETY: a new reference.
            return Ok(unsafe { ffi::PyLong_FromLong(byte.into()) });
        }
        let (start, stop, step) = bounds_of(py, item)?;
        self.part(py, start, stop, step)
    }

    /// The bytes of a slice.
    fn part(&self, py: Python<'_>, start: isize, stop: isize, step: isize) -> PyResult<*mut ffi::PyObject> {
        let (span, start, len) = self.adjusted(py, start, stop, step)?;
        if step == 1 || len == 0 {
            return Ok(self.copy_out(py, span, start.cast_unsigned(), len)?.into_ptr());
        }
        let (made, to) = new_bytes(py, len)?;
        self.touch(py, len, start.cast_unsigned(), || {
            for number in 0..len.cast_signed() {
                let at = span.at((start + number * step).cast_unsigned());
                // SAFETY: the slice lies in the span, which stays open (`touch`); `to` has `len` bytes.
                unsafe {
                    let byte = AtomicU8::from_ptr(at as *mut u8).load(Ordering::Relaxed);
                    *((to + number.cast_unsigned()) as *mut u8) = byte;
                }
            }
        })?;
        Ok(made.into_ptr())
    }

    #[inline]
    fn set(&self, py: Python<'_>, item: *mut ffi::PyObject, value: *mut ffi::PyObject) -> PyResult<()> {
        self.span(py)?;
        self.require_writable()?;
        // SAFETY: the object is alive, the lock held.
        if unsafe { ffi::PySlice_Check(item) } == 0 {
            let (_, at) = self.index_of(py, item, "mmap indices must be integer")?;
            let byte = byte_of(py, value)?;
            let span = self.span(py)?; // as in `index_of`
            if at >= span.size {
                return Err(PyIndexError::new_err(WRONG_INDEX));
            }
            return self.set_byte(span, at, byte);
        }
        if value.is_null() {
            return Err(PyTypeError::new_err("mmap object doesn't support slice deletion"));
        }
        // SAFETY: alive, as the caller holds it.
        let value = unsafe { Borrowed::from_ptr(py, value) };
        let given = Given::of(&value)?;
        let from = given.bytes();
        let (start, stop, step) = bounds_of(py, item)?;
        let (span, start, len) = self.adjusted(py, start, stop, step)?;
        if from.len() != len {
            return Err(PyIndexError::new_err("mmap slice assignment is wrong size"));
        }
        match given {
            _ if step != 1 && len > 0 => {}
            Given::Plain(_) => return self.copy_in(py, span, start.cast_unsigned(), from),
            Given::Held(_) => return self.copy_over(py, span, start.cast_unsigned(), from),
        }
        self.scatter(py, span, (start, step), from)
    }

    /// Sets every `step`-th byte from an index on, of the span.
    fn scatter(
        &self,
        py: Python<'_>,
        span: Span,
        (start, step): (isize, isize),
        from: &[u8],
    ) -> PyResult<()> {
        let set = || {
            let own = kernel::touch(|| from.to_vec())?; // it may be a mapping's, as in `copy_over`
            kernel::touch(|| {
                for (number, byte) in (0..).zip(&own) {
                    let at = span.at((start + number * step).cast_unsigned());
                    // SAFETY: the slice lies in the span, which stays open for the one piece of work (`long`).
                    unsafe { AtomicU8::from_ptr(at as *mut u8) }.store(*byte, Ordering::Relaxed);
                }
            })
        };
        self.long(py, from.len(), set).map_err(|id| self.failed(id, start.cast_unsigned()))
    }
}

/// Start, stop and step of a slice.
#[inline]
fn bounds_of(py: Python<'_>, item: *mut ffi::PyObject) -> PyResult<(isize, isize, isize)> {
    let (mut start, mut stop, mut step) = (0, 0, 0);
    // SAFETY: a slice, alive, the lock held.
    if unsafe { ffi::PySlice_Unpack(item, &raw mut start, &raw mut stop, &raw mut step) } < 0 {
        return Err(PyErr::fetch(py));
    }
    Ok((start, stop, step))
}

/// The byte that an item is set to.
#[inline]
fn byte_of(py: Python<'_>, value: *mut ffi::PyObject) -> PyResult<u8> {
    if value.is_null() {
        return Err(PyTypeError::new_err("mmap doesn't support item deletion"));
    }
    let refused = || PyTypeError::new_err("mmap item value must be an int");
    let byte = number_of(py, value, refused, ffi_type_error)?;
    u8::try_from(byte).map_err(|_| PyValueError::new_err("mmap item value must be in range(0, 256)"))
}

/// What is raised for an index that no address space has.
fn ffi_index_error() -> *mut ffi::PyObject {
    // SAFETY: set before any module is loaded.
    unsafe { ffi::PyExc_IndexError }
}

/// What is raised for a value that no byte has.
fn ffi_type_error() -> *mut ffi::PyObject {
    // SAFETY: as above.
    unsafe { ffi::PyExc_TypeError }
}

/// The number that an object is or has (`__index__`).
#[inline]
fn number_of(
    py: Python<'_>,
    object: *mut ffi::PyObject,
    refused: impl FnOnce() -> PyErr,
    too_large: fn() -> *mut ffi::PyObject,
) -> PyResult<isize> {
    // SAFETY: the object is alive, the lock held.
    let number = unsafe {
        if ffi::PyLong_CheckExact(object) != 0 {
            ffi::PyLong_AsSsize_t(object)
        } else if ffi::PyIndex_Check(object) != 0 {
            ffi::PyNumber_AsSsize_t(object, too_large())
        } else {
            return Err(refused());
        }
    };
    // SAFETY: as above.
    if number != -1 || unsafe { ffi::PyErr_Occurred() }.is_null() {
        return Ok(number);
    }
    let error = PyErr::fetch(py);
    // SAFETY: as above. Of an int it raises OverflowError, whatever is asked for; this calls nothing of Python.
    let of_int =
        unsafe { ffi::PyLong_CheckExact(object) != 0 && ffi::PyNumber_AsSsize_t(object, too_large()) == -1 };
    Err(if of_int { PyErr::fetch(py) } else { error })
}

unsafe extern "C" fn length(object: *mut ffi::PyObject) -> ffi::Py_ssize_t {
    // SAFETY: the interpreter calls slots with objects of the type, and with the lock held.
    unsafe {
        let file = file_of(object);
        or_raise(-1, |py| file.span(py).map(|span| span.size.cast_signed()))
    }
}

unsafe extern "C" fn get(object: *mut ffi::PyObject, item: *mut ffi::PyObject) -> *mut ffi::PyObject {
    // SAFETY: as in `length`.
    unsafe {
        let file = file_of(object);
        if ffi::PySlice_Check(item) == 0 || file.quick().is_none() {
            return or_raise(std::ptr::null_mut(), |py| file.get(py, item));
        }
        // A slice without the ways of `PyResult`, which are a tenth of a short one.
        let (mut start, mut stop, mut step) = (0, 0, 0);
        if ffi::PySlice_Unpack(item, &raw mut start, &raw mut stop, &raw mut step) < 0 {
            return std::ptr::null_mut();
        }
        if let Some(span) = file.quick().filter(|_| step == 1) {
            let (mut first, mut last) = (start, stop);
            let size = span.size.cast_signed();
            let len = ffi::PySlice_AdjustIndices(size, &raw mut first, &raw mut last, step);
            if len.cast_unsigned() < LONG {
                let at = span.at(first.cast_unsigned());
                let mut made = std::ptr::null_mut();
                let touched = kernel::touch(|| made = ffi::PyBytes_FromStringAndSize(at as *const _, len));
                let Err(id) = touched else { return made };
                ffi::Py_DecRef(made);
                return or_raise(std::ptr::null_mut(), |_| Err(file.failed(id, first.cast_unsigned())));
            }
        }
        or_raise(std::ptr::null_mut(), |py| file.part(py, start, stop, step))
    }
}

unsafe extern "C" fn set(
    object: *mut ffi::PyObject,
    item: *mut ffi::PyObject,
    value: *mut ffi::PyObject,
) -> c_int {
    // SAFETY: as in `length`.
    unsafe {
        let file = file_of(object);
        or_raise(-1, |py| file.set(py, item, value).map(|()| 0))
    }
}

unsafe extern "C" fn item(object: *mut ffi::PyObject, index: ffi::Py_ssize_t) -> *mut ffi::PyObject {
    // SAFETY: as in `length`.
    unsafe {
        let file = file_of(object);
        or_raise(std::ptr::null_mut(), |py| {
            let span = file.span(py)?;
            let at = usize::try_from(index).ok().filter(|at| *at < span.size);
            let at = at.ok_or_else(|| PyIndexError::new_err(WRONG_INDEX))?;
            Ok(file.copy_out(py, span, at, 1)?.into_ptr())
        })
    }
}

unsafe extern "C" fn readline(object: *mut ffi::PyObject, _: *mut ffi::PyObject) -> *mut ffi::PyObject {
    // SAFETY: as in `length`.
    unsafe {
        let file = file_of(object);
        or_raise(std::ptr::null_mut(), |py| file.line(py).map(Bound::into_ptr))
    }
}

unsafe extern "C" fn read_byte(object: *mut ffi::PyObject, _: *mut ffi::PyObject) -> *mut ffi::PyObject {
    // SAFETY: as in `length`.
    unsafe {
        let file = file_of(object);
        or_raise(std::ptr::null_mut(), |py| file.next_byte(py).map(|byte| ffi::PyLong_FromLong(byte.into())))
    }
}

unsafe extern "C" fn tell(object: *mut ffi::PyObject, _: *mut ffi::PyObject) -> *mut ffi::PyObject {
    // SAFETY: as in `length`.
    unsafe {
        let file = file_of(object);
        or_raise(std::ptr::null_mut(), |py| {
            file.span(py)?;
            Ok(ffi::PyLong_FromSize_t(file.position()))
        })
    }
}

unsafe extern "C" fn find(
    object: *mut ffi::PyObject,
    arguments: *mut *mut ffi::PyObject,
    count: ffi::Py_ssize_t,
) -> *mut ffi::PyObject {
    // SAFETY: as in `length`, with so many arguments.
    unsafe { found(object, given(arguments, count), false) }
}

unsafe extern "C" fn rfind(
    object: *mut ffi::PyObject,
    arguments: *mut *mut ffi::PyObject,
    count: ffi::Py_ssize_t,
) -> *mut ffi::PyObject {
    // SAFETY: as in `find`.
    unsafe { found(object, given(arguments, count), true) }
}

/// The arguments of a call.
///
/// # Safety
/// So many are at the address; they live as long as the call.
unsafe fn given<'a>(arguments: *mut *mut ffi::PyObject, count: ffi::Py_ssize_t) -> &'a [*mut ffi::PyObject] {
    // SAFETY: the caller's (contract).
    if count == 0 { &[] } else { unsafe { std::slice::from_raw_parts(arguments, count.cast_unsigned()) } }
}

/// # Safety
/// As the interpreter calls a method.
unsafe fn found(
    object: *mut ffi::PyObject,
    arguments: &[*mut ffi::PyObject],
    from_end: bool,
) -> *mut ffi::PyObject {
    // SAFETY: the caller's (contract).
    unsafe {
        let file = file_of(object);
        or_raise(std::ptr::null_mut(), |py| {
            let (1..=3, [sub, bounds @ ..]) = (arguments.len(), arguments) else {
                let given = arguments.len();
                return Err(PyTypeError::new_err(format!("find takes 1 to 3 arguments ({given} given)")));
            };
            let bound = |number: usize| match bounds.get(number) {
                Some(given) if *given != ffi::Py_None() => index_or_error(py, *given).map(Some),
                _ => Ok(None),
            };
            let bounds = [bound(0)?, bound(1)?];
            let at = file.search(py, &Borrowed::from_ptr(py, *sub), bounds, from_end)?;
            Ok(ffi::PyLong_FromSsize_t(at))
        })
    }
}

/// The number of an argument; what has none raises TypeError, what is too large OverflowError.
fn index_or_error(py: Python<'_>, object: *mut ffi::PyObject) -> PyResult<isize> {
    // SAFETY: the object is alive, the lock held.
    let number = unsafe { ffi::PyNumber_AsSsize_t(object, ffi::PyExc_OverflowError) };
    // SAFETY: as above.
    if number == -1 && !unsafe { ffi::PyErr_Occurred() }.is_null() {
        return Err(PyErr::fetch(py));
    }
    Ok(number)
}

/// The methods that are hot; the array ends with an empty one.
fn methods() -> [ffi::PyMethodDef; 6] {
    let no_arguments = |name: &'static CStr, call: ffi::PyCFunction, doc: &'static CStr| ffi::PyMethodDef {
        ml_name: name.as_ptr(),
        ml_meth: ffi::PyMethodDefPointer { PyCFunction: call },
        ml_flags: ffi::METH_NOARGS,
        ml_doc: doc.as_ptr(),
    };
    let arguments = |name: &'static CStr, call: ffi::PyCFunctionFast, doc: &'static CStr| ffi::PyMethodDef {
        ml_name: name.as_ptr(),
        ml_meth: ffi::PyMethodDefPointer { PyCFunctionFast: call },
        ml_flags: ffi::METH_FASTCALL,
        ml_doc: doc.as_ptr(),
    };
    [
        no_arguments(c"readline", readline, c"readline($self, /)\n--\n\nReads to the end of the line."),
        no_arguments(c"read_byte", read_byte, c"read_byte($self, /)\n--\n\nReads a byte, as a number."),
        no_arguments(c"tell", tell, c"tell($self, /)\n--\n\nThe position."),
        arguments(c"find", find, FIND_DOC),
        arguments(c"rfind", rfind, RFIND_DOC),
        ffi::PyMethodDef::zeroed(),
    ]
}

const FIND_DOC: &CStr =
    c"find($self, sub, start=None, end=None, /)\n--\n\nWhere some bytes are first, from the \
    position or `start` on; -1 where they are not.";
const RFIND_DOC: &CStr = c"rfind($self, sub, start=None, end=None, /)\n--\n\nAs `find`, the last place.";

/// Makes the class and puts it into the module.
pub fn add_class(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    let slot = |slot: c_int, pfunc: *mut c_void| ffi::PyType_Slot { slot, pfunc };
    let mut slots = [
        slot(ffi::Py_mp_length, length as *mut c_void),
        slot(ffi::Py_sq_length, length as *mut c_void),
        slot(ffi::Py_mp_subscript, get as *mut c_void),
        slot(ffi::Py_mp_ass_subscript, set as *mut c_void),
        slot(ffi::Py_sq_item, item as *mut c_void),
        slot(ffi::Py_tp_methods, Box::leak(Box::new(methods())).as_mut_ptr().cast()), // which are not copied
        slot(0, std::ptr::null_mut()),
    ];
    let mut spec = ffi::PyType_Spec {
        name: c"quire._core.MappedFile".as_ptr(),
        basicsize: 0, // the base's
        itemsize: 0,
        flags: (ffi::Py_TPFLAGS_DEFAULT | ffi::Py_TPFLAGS_BASETYPE) as _,
        slots: slots.as_mut_ptr(),
    };
    let bases = PyTuple::new(py, [py.get_type::<MappedFileBase>()])?;
    // SAFETY: the functions have the types of their slots; the name lives for ever, and the rest is copied.
    let made = unsafe { ffi::PyType_FromSpecWithBases(&raw mut spec, bases.as_ptr()) };
    // SAFETY: a new reference, or null with an exception set.
    let made = unsafe { Bound::from_owned_ptr_or_err(py, made) }?.cast_into::<PyType>()?;
    module.add("MappedFile", made)
}
