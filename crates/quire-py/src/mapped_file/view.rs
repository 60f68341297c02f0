//! Buffers of others, as plain bytes.
#![allow(unsafe_code)]

use std::ffi::c_int;
use std::mem::MaybeUninit;

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// A buffer of an object, as plain bytes whatever their format; released on drop, with the interpreter lock held,
/// as those are who have one: calls of `MappedFile`, and it itself. It stays where it is, as an exporter may point
/// into it.
pub struct View(Box<ffi::Py_buffer>);

// SAFETY: an address and a length that stay as they are until the release, which the lock protects.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

impl View {
    /// Asks an object for its bytes; `TypeError` or `BufferError` as it says.
    pub fn of(object: &Bound<'_, PyAny>, flags: c_int) -> PyResult<Self> {
        let mut view = Box::new(MaybeUninit::<ffi::Py_buffer>::uninit());
        // SAFETY: the object is alive; the view is filled where this returns 0.
        if unsafe { ffi::PyObject_GetBuffer(object.as_ptr(), view.as_mut_ptr(), flags) } != 0 {
            return Err(PyErr::fetch(object.py()));
        }
        // SAFETY: just filled.
        Ok(View(unsafe { view.assume_init() }))
    }

    /// Where they begin.
    pub fn address(&self) -> usize {
        self.0.buf as usize
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len.cast_unsigned()
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: filled by `of`, released once, with the lock held (see the type).
        unsafe { ffi::PyBuffer_Release(&raw mut *self.0) }
    }
}

/// The bytes of an argument, while the argument is alive.
pub enum Given<'a> {
    /// Of a bytes object, which they never leave: nothing to release.
    Plain(&'a [u8]),
    /// Of any other object.
    Held(View),
}

impl<'a> Given<'a> {
    /// As [`View::of`].
    #[inline]
    pub fn of(object: &'a Bound<'_, PyAny>) -> PyResult<Self> {
        match object.cast_exact::<PyBytes>() {
            Ok(bytes) => Ok(Given::Plain(bytes.as_bytes())),
            Err(_) => View::of(object, ffi::PyBUF_SIMPLE).map(Given::Held),
        }
    }

    /// The bytes.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        match self {
            Given::Plain(bytes) => bytes,
            Given::Held(view) if view.len() == 0 => &[],
            // SAFETY: held until drop; contiguous, as no strides were asked for. Their owner may use them
            // meanwhile, as with every `write`.
            Given::Held(view) => unsafe {
                std::slice::from_raw_parts(view.address() as *const u8, view.len())
            },
        }
    }
}
