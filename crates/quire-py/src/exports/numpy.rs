//! Where numpy keeps what `exports` watches: found, verified, and replaced.
//!
//! The stable ABI hides both structures, so their layout is spelled out here, and nothing is written unless
//! what is found agrees with what the interpreter says by calls: any other numpy or Python is left as it is.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

use super::{getbuffer, tofile};

/// The start of `PyTypeObject` (CPython, Include/cpython/object.h), up to what is sought.
#[repr(C)]
struct TypePrefix {
    head: ffi::PyVarObject,
    name: *const c_char,
    sizes: [isize; 2],
    dealloc: *mut c_void,
    vectorcall_offset: isize,
    getattr: *mut c_void,
    setattr: *mut c_void,
    as_async: *mut c_void,
    repr: *mut c_void,
    as_number: *mut c_void,
    as_sequence: *mut c_void,
    as_mapping: *mut c_void,
    hash: *mut c_void,
    call: *mut c_void,
    str: *mut c_void,
    getattro: *mut c_void,
    setattro: *mut c_void,
    as_buffer: *mut BufferProcs,
}

#[repr(C)]
struct BufferProcs {
    getbuffer: *mut c_void,
    releasebuffer: *mut c_void,
}

/// `PyMethodDescrObject` (CPython, Include/cpython/descrobject.h).
#[repr(C)]
struct MethodDescriptor {
    head: ffi::PyObject,
    class: *mut ffi::PyTypeObject,
    name: *mut ffi::PyObject,
    qualname: *mut ffi::PyObject,
    method: *mut Method,
}

/// `PyMethodDef`.
#[repr(C)]
struct Method {
    name: *const c_char,
    function: *mut c_void,
    flags: c_int,
    doc: *const c_char,
}

static GETBUFFER: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());
static TOFILE: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());
static INSTALLED: PyOnceLock<Result<(), String>> = PyOnceLock::new();

type GetBuffer = unsafe extern "C" fn(*mut ffi::PyObject, *mut ffi::Py_buffer, c_int) -> c_int;
pub type WithKeywords =
    unsafe extern "C" fn(*mut ffi::PyObject, *mut ffi::PyObject, *mut ffi::PyObject) -> *mut ffi::PyObject;

/// What numpy had; called only by what has taken its place.
pub fn original_getbuffer() -> GetBuffer {
    // SAFETY: stored before its place was taken, and verified to be the type's `bf_getbuffer`.
    unsafe { std::mem::transmute::<*mut c_void, GetBuffer>(GETBUFFER.load(Ordering::Acquire)) }
}

/// As [`original_getbuffer`], of `ndarray.tofile`.
pub fn original_tofile() -> WithKeywords {
    // SAFETY: stored before its place was taken, and verified to be a method of this kind.
    unsafe { std::mem::transmute::<*mut c_void, WithKeywords>(TOFILE.load(Ordering::Acquire)) }
}

/// Watches numpy's exports, once. Says why it cannot, for `quire doctor`; None when it does.
#[pyfunction]
pub fn watch_exports(py: Python<'_>) -> Option<String> {
    install(py).clone().err()
}

/// As [`watch_exports`].
pub fn install(py: Python<'_>) -> &Result<(), String> {
    INSTALLED.get_or_init(py, || {
        let ndarray = py.import("numpy").and_then(|numpy| numpy.getattr("ndarray"));
        let ndarray = ndarray.map_err(|error| format!("numpy cannot be imported: {error}"))?;
        let ndarray = ndarray.cast_into::<PyType>().map_err(|_| "numpy.ndarray is no type".to_owned())?;
        let memory = Memory::read()?;
        // All is verified before anything is changed.
        let procs = buffer_procs(&ndarray, &memory)?;
        let method = tofile_method(&ndarray, &memory)?;
        // SAFETY: verified to be numpy's own, writable and static; the interpreter lock is held, and who calls
        // through them loads one aligned pointer.
        unsafe {
            replace(&raw mut (*procs).getbuffer, getbuffer as *mut c_void, &GETBUFFER);
            replace(&raw mut (*method).function, tofile::tofile as *mut c_void, &TOFILE);
        }
        Ok(())
    })
}

/// Puts a function in place of another, which `kept` has from before on.
///
/// # Safety
/// `place` is a writable, aligned pointer that lives for ever.
unsafe fn replace(place: *mut *mut c_void, ours: *mut c_void, kept: &AtomicPtr<c_void>) {
    // SAFETY: writable and aligned (contract); others only read it.
    let place = unsafe { AtomicPtr::from_ptr(place) };
    kept.store(place.load(Ordering::Acquire), Ordering::Release);
    place.store(ours, Ordering::Release);
}

/// The buffer procedures of `ndarray`, where they are as they should be.
fn buffer_procs(ndarray: &Bound<'_, PyType>, memory: &Memory) -> Result<*mut BufferProcs, String> {
    let class = ndarray.as_type_ptr();
    if !memory.holds::<TypePrefix>(class as usize, false) {
        return Err("the type numpy.ndarray lies in no memory of its own".to_owned());
    }
    // SAFETY: readable memory of that size; compared below before it is believed.
    let found = unsafe { &*class.cast::<TypePrefix>() };
    let slots = [
        (ffi::Py_tp_dealloc, found.dealloc),
        (ffi::Py_tp_repr, found.repr),
        (ffi::Py_tp_hash, found.hash),
        (ffi::Py_tp_call, found.call),
        (ffi::Py_tp_str, found.str),
        (ffi::Py_tp_getattro, found.getattro),
        (ffi::Py_tp_setattro, found.setattro),
    ];
    // SAFETY: a type and numbers of slots.
    let slot = |number| unsafe { ffi::PyType_GetSlot(class, number) };
    if slots.iter().any(|(number, value)| !std::ptr::eq(slot(*number), *value)) {
        return Err("the types of this Python are laid out in another way".to_owned());
    }
    if !memory.holds::<BufferProcs>(found.as_buffer as usize, true) {
        return Err("the buffer procedures of numpy.ndarray cannot be written".to_owned());
    }
    // SAFETY: readable memory of that size and alignment.
    let procs = unsafe { &*found.as_buffer };
    let known = !procs.getbuffer.is_null()
        && std::ptr::eq(procs.getbuffer, slot(ffi::Py_bf_getbuffer))
        && std::ptr::eq(procs.releasebuffer, slot(ffi::Py_bf_releasebuffer));
    if !known {
        return Err("the buffer procedures of numpy.ndarray are not where they should be".to_owned());
    }
    Ok(found.as_buffer)
}

/// The definition of `ndarray.tofile`, where it is as it should be.
fn tofile_method(ndarray: &Bound<'_, PyType>, memory: &Memory) -> Result<*mut Method, String> {
    let unknown = |what: &str| format!("numpy.ndarray.tofile {what}");
    let descriptor = ndarray.getattr("tofile").map_err(|_| unknown("is not there"))?;
    let name = descriptor.getattr("__name__").map_err(|_| unknown("has no name"))?;
    let kind = &raw mut ffi::PyMethodDescr_Type;
    let is_method = std::ptr::eq(descriptor.get_type_ptr(), kind);
    if !is_method || !memory.holds::<MethodDescriptor>(descriptor.as_ptr() as usize, false) {
        return Err(unknown("is no method in C"));
    }
    // SAFETY: readable memory of that size; compared below before it is believed.
    let found = unsafe { &*descriptor.as_ptr().cast::<MethodDescriptor>() };
    let known = std::ptr::eq(found.class, ndarray.as_type_ptr()) && std::ptr::eq(found.name, name.as_ptr());
    if !known || !memory.holds::<Method>(found.method as usize, true) {
        return Err(unknown("is not described where it should be, or cannot be replaced"));
    }
    // SAFETY: readable memory of that size and alignment.
    let method = unsafe { &*found.method };
    if method.flags != ffi::METH_VARARGS | ffi::METH_KEYWORDS || method.function.is_null() {
        return Err(unknown("takes its arguments in another way"));
    }
    // SAFETY: the name is as long as the one it is compared with, which is read only where it is memory.
    let named = memory.holds::<[u8; 7]>(method.name as usize, false)
        && unsafe { CStr::from_ptr(method.name) } == c"tofile";
    if named { Ok(found.method) } else { Err(unknown("has another definition")) }
}

/// What memory the process has, by proc_pid_maps(5).
struct Memory(Vec<(usize, usize, bool)>);

impl Memory {
    fn read() -> Result<Self, String> {
        let maps = std::fs::read_to_string("/proc/self/maps")
            .map_err(|error| format!("/proc/self/maps cannot be read: {error}"))?;
        Ok(Memory(maps.lines().filter_map(Self::area).collect()))
    }

    fn area(line: &str) -> Option<(usize, usize, bool)> {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let number = |text| usize::from_str_radix(text, 16).ok();
        rest.starts_with('r').then_some((number(start)?, number(end)?, rest.starts_with("rw")))
    }

    /// Whether an aligned value of this type lies there in one area of memory.
    fn holds<T>(&self, at: usize, writable: bool) -> bool {
        let inside = |(start, end, rw): &(usize, usize, bool)| {
            *start <= at
                && at.checked_add(size_of::<T>()).is_some_and(|stop| stop <= *end)
                && (*rw || !writable)
        };
        at.is_multiple_of(align_of::<T>()) && self.0.iter().any(inside)
    }
}
