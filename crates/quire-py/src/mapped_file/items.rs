//! The bytes of a `MappedFile` one after the other: its iterators, and `in`.

use std::sync::atomic::{AtomicUsize, Ordering};

use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes};

use super::{MappedFileBase, search};

/// Iterates over bytes of length 1, as the standard library's `mmap` does; a size that changes meanwhile counts.
#[pyclass(frozen, module = "quire._core")]
pub struct Items {
    file: Py<MappedFileBase>,
    /// The index that comes next; one more than that if it goes backwards.
    next: AtomicUsize,
    backwards: bool,
}

impl Items {
    /// From the first byte on.
    pub fn forwards(file: Py<MappedFileBase>) -> Self {
        Items { file, next: AtomicUsize::new(0), backwards: false }
    }

    /// From the last of so many bytes on.
    pub fn backwards(file: Py<MappedFileBase>, size: usize) -> Self {
        Items { file, next: AtomicUsize::new(size), backwards: true }
    }

    /// Whether an object is equal to any of them.
    pub fn contain(file: Bound<'_, MappedFileBase>, object: &Bound<'_, PyAny>) -> PyResult<bool> {
        let py = file.py();
        let exactly =
            object.is_exact_instance_of::<PyBytes>() || object.is_exact_instance_of::<PyByteArray>();
        if exactly {
            let bytes = object.extract::<Vec<u8>>()?;
            let [byte] = bytes[..] else {
                file.get().span(py)?;
                return Ok(false);
            };
            return file.get().holds(py, byte);
        }
        let items = Bound::new(py, Items::forwards(file.unbind()))?;
        for item in items.try_iter()? {
            if item?.eq(object)? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

#[pymethods]
impl Items {
    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let file = self.file.get();
        let span = file.span(py)?;
        let next = self.next.load(Ordering::Relaxed);
        let at = if self.backwards { next.checked_sub(1) } else { Some(next) };
        let Some(at) = at.filter(|at| *at < span.size) else { return Ok(None) };
        let byte = file.byte(span, at)?;
        self.next.store(if self.backwards { at } else { at + 1 }, Ordering::Relaxed);
        Ok(Some(PyBytes::new(py, &[byte])))
    }
}

impl MappedFileBase {
    /// Whether any byte has this value.
    #[allow(unsafe_code)]
    fn holds(&self, py: Python<'_>, byte: u8) -> PyResult<bool> {
        let span = self.span(py)?;
        self.touch(py, span.size, 0, || {
            // SAFETY: all of the span, which stays open (`touch`).
            let bytes = unsafe { std::slice::from_raw_parts(span.at(0) as *const u8, span.size) };
            search::first(bytes, &[byte]).is_some()
        })
    }
}
