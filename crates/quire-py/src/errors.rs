//! Core errors as the classes of `quire.errors`: the one place where they are mapped.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyType};
use quire_core::errors::{FaultCode, MapError, OpenError, StoreError};
use quire_core::interrupt::PageError;
use quire_core::sys::fork::ForkMutex;

/// An error that no interpreter check has delivered within this time is given up for a new one:
/// its thread may be gone and its id used again.
const STALE: Duration = Duration::from_secs(1);

const CODES: [FaultCode; 12] = [
    FaultCode::Io,
    FaultCode::Truncated,
    FaultCode::Changed,
    FaultCode::Corrupt,
    FaultCode::Checksum,
    FaultCode::PagerDied,
    FaultCode::Timeout,
    FaultCode::Interrupted,
    FaultCode::Closed,
    FaultCode::Protection,
    FaultCode::SwapFull,
    FaultCode::WriteBack,
];

/// Name of the code in Python.
pub fn code_name(code: FaultCode) -> &'static str {
    match code {
        FaultCode::Io => "io",
        FaultCode::Truncated => "truncated",
        FaultCode::Changed => "changed",
        FaultCode::Corrupt => "corrupt",
        FaultCode::Checksum => "checksum",
        FaultCode::PagerDied => "pager_died",
        FaultCode::Timeout => "timeout",
        FaultCode::Interrupted => "interrupted",
        FaultCode::Closed => "closed",
        FaultCode::Protection => "protection",
        FaultCode::SwapFull => "swap_full",
        FaultCode::WriteBack => "write_back",
    }
}

/// The code of a name.
pub fn code_of_name(name: &str) -> Option<FaultCode> {
    CODES.into_iter().find(|code| code_name(*code) == name)
}

fn class_name(code: FaultCode) -> &'static str {
    match code {
        FaultCode::Io | FaultCode::Closed => "PageIOError",
        FaultCode::Truncated => "TruncatedError",
        FaultCode::Changed => "ChangedError",
        FaultCode::Corrupt => "CorruptError",
        FaultCode::Checksum => "ChecksumError",
        FaultCode::PagerDied => "PagerDiedError",
        FaultCode::Timeout => "PageTimeoutError",
        FaultCode::Interrupted => "InterruptedPageError",
        FaultCode::Protection => "ProtectionError",
        FaultCode::SwapFull => "SwapFullError",
        FaultCode::WriteBack => "SyncError",
    }
}

static CLASSES: PyOnceLock<HashMap<u8, Py<PyType>>> = PyOnceLock::new();

/// Fetches the exception classes, so that a signal handler finds them without an import.
pub fn load_classes(py: Python<'_>) -> PyResult<()> {
    CLASSES.get_or_try_init(py, || {
        let module = py.import("quire.errors")?;
        CODES
            .iter()
            .map(|code| Ok((*code as u8, module.getattr(class_name(*code))?.cast_into::<PyType>()?.unbind())))
            .collect::<PyResult<_>>()
    })?;
    Ok(())
}

/// The class that an asynchronous error of this code is raised as; the caller holds the
/// interpreter lock. Null before [`load_classes`].
pub fn class_pointer(py: Python<'_>, code: FaultCode) -> *mut pyo3::ffi::PyObject {
    let classes = CLASSES.get(py);
    classes.map_or(std::ptr::null_mut(), |classes| classes[&(code as u8)].as_ptr())
}

fn new_error(
    py: Python<'_>,
    class: &str,
    message: &str,
    fields: &[(&str, Option<i64>)],
    source: Option<&str>,
) -> PyErr {
    let made = (|| {
        let kwargs = PyDict::new(py);
        if let Some(source) = source {
            kwargs.set_item("source", source)?;
        }
        for (name, value) in fields {
            kwargs.set_item(*name, *value)?;
        }
        py.import("quire.errors")?.getattr(class)?.call((message,), Some(&kwargs))
    })();
    made.map_or_else(|error| error, PyErr::from_value)
}

/// A store error outside of a fault.
pub fn from_store(py: Python<'_>, source: &str, error: &StoreError) -> PyErr {
    if error.code == FaultCode::Interrupted
        && let Err(interrupt) = py.check_signals()
    {
        return interrupt;
    }
    let fields = [("offset", i64::try_from(error.offset.0).ok()), ("errno", error.errno.map(i64::from))];
    new_error(py, class_name(error.code), &error.message, &fields, Some(error.source_in(source)))
}

/// A source that could not be opened.
pub fn from_open(py: Python<'_>, source: &str, error: &OpenError) -> PyErr {
    match error {
        OpenError::Io { errno, message } => {
            new_error(py, "SourceError", message, &[("errno", errno.map(i64::from))], Some(source))
        }
        OpenError::Format(message) => new_error(py, "FormatError", message, &[], Some(source)),
    }
}

/// A mapping that could not be made.
pub fn from_map(py: Python<'_>, source: Option<&str>, error: &MapError) -> PyErr {
    let message = error.to_string();
    let (class, errno) = match error {
        MapError::Pmap(_) => ("PmapError", None),
        MapError::Budget(_) => ("BudgetError", None),
        MapError::Invalid(_) => return pyo3::exceptions::PyValueError::new_err(message),
        MapError::Sys { errno, .. } => ("Error", Some(i64::from(*errno))),
    };
    new_error(py, class, &message, &[("errno", errno)], source)
}

/// The fields of a page error, as `take_pending_error` and `Mapping.failure` give them.
pub fn page_error_dict<'py>(py: Python<'py>, failure: &PageError) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("code", code_name(failure.error.code))?;
    dict.set_item("class", class_name(failure.error.code))?;
    dict.set_item("source", &failure.source)?;
    dict.set_item("offset", failure.error.offset.0)?;
    dict.set_item("page", failure.page)?;
    dict.set_item("errno", failure.error.errno)?;
    dict.set_item("message", &failure.error.message)?;
    Ok(dict)
}

/// Errors on their way to a thread, by its pthread id. Locked in signal handlers: no code that
/// holds it touches user memory or waits for the interpreter.
static PENDING: ForkMutex<Option<HashMap<usize, (PageError, Instant)>>> = ForkMutex::new(None);

/// Forgets them in the child of a fork.
///
/// # Safety
/// Only in the child of a fork while it has one thread.
#[allow(unsafe_code)]
pub unsafe fn reset_in_child() {
    // SAFETY: one thread (contract).
    unsafe { PENDING.replace_in_child(None) }
}

/// Notes an error for a thread; false when one is already on its way there.
pub fn set_pending(thread: usize, error: &PageError) -> bool {
    let mut pending = PENDING.lock();
    let pending = pending.get_or_insert_default();
    if let Some((_, since)) = pending.get(&thread)
        && since.elapsed() < STALE
    {
        return false;
    }
    pending.insert(thread, (error.clone(), Instant::now()));
    true
}

/// The calling thread's id, as in `threading.get_ident()`.
#[allow(unsafe_code)]
pub fn this_thread() -> usize {
    // SAFETY: no preconditions.
    unsafe { libc::pthread_self() as usize }
}

/// Forgets what is pending for the calling thread.
pub fn forget_pending() {
    if let Some(pending) = PENDING.lock().as_mut() {
        pending.remove(&this_thread());
    }
}

/// The calling thread's undelivered page error; it is delivered by this call.
#[pyfunction]
pub fn take_pending_error(py: Python<'_>) -> PyResult<Option<Bound<'_, PyDict>>> {
    let this = this_thread();
    let pending = PENDING.lock().as_ref().and_then(|pending| pending.get(&this).cloned());
    let Some((error, _)) = pending else { return Ok(None) };
    // With the interpreter lock held, so that no other thread of the interpreter reads the filler
    // in between; nothing in it waits for that lock.
    quire_core::load::delivered(error.mapping);
    if let Some(pending) = PENDING.lock().as_mut() {
        pending.remove(&this);
    }
    page_error_dict(py, &error).map(Some)
}
