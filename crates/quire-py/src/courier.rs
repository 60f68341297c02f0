//! Raises page errors in the threads that touched the page.
//!
//! Called in a signal handler of that thread (`raise_here`), which is in one of four situations:
//!
//! 1. It holds the interpreter lock: the asynchronous exception is set at once.
//! 2. It is the main thread without the lock: a pending call raises at its next check.
//! 3. It is another thread of the interpreter, without the lock: the courier, a thread that may
//!    wait for the lock, sets the exception while the handler waits, so that the thread cannot run
//!    past the error. No deadlock: the handler's thread does not hold the lock. The wait is bounded.
//! 4. It is no thread of the interpreter (a worker of a BLAS library): the main thread raises.
//!
//! The courier also turns a noted SIGINT into a pending call, which a signal handler must not make.
#![allow(unsafe_code)]

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pyo3::ffi;
use pyo3::prelude::*;
use quire_core::errors::FaultCode;
use quire_core::interrupt::{self, Interpreter, PageError};
use quire_core::load;
use quire_core::space::SPACE;
use quire_core::sys::fork::ForkMutex;
use quire_core::sys::{futex, thread};

use crate::errors;

/// A handler waits this long for the courier; beyond it the error comes a little late.
const PATIENCE: Duration = Duration::from_secs(30);

type PendingCall = extern "C" fn(*mut libc::c_void) -> libc::c_int;

struct Python3;

/// A request to the courier; it stays in the list until it is served.
#[derive(Clone, Copy, PartialEq)]
struct Request {
    thread: usize,
    code: FaultCode,
}

struct Courier {
    users: usize,
    pid: u32,
    thread: Option<JoinHandle<()>>,
}

static COURIER: ForkMutex<Courier> = ForkMutex::new(Courier { users: 0, pid: 0, thread: None });
static REQUESTS: ForkMutex<Vec<Request>> = ForkMutex::new(Vec::new());
/// Rung for the courier: an eventfd, as a signal handler may write to it; -1 when none runs.
static BELL: AtomicI32 = AtomicI32::new(-1);
static STOP: AtomicBool = AtomicBool::new(false);
/// Requests served; handlers wait on it.
static SERVED: AtomicU32 = AtomicU32::new(0);
/// The process that the courier runs in.
static PID: AtomicU32 = AtomicU32::new(0);
static NOTED: AtomicBool = AtomicBool::new(false);
static FINALIZING: AtomicBool = AtomicBool::new(false);
/// `PyThreadState_GetUnchecked` (3.13) or `_PyThreadState_UncheckedGet`: exported by every CPython
/// from 3.11, but outside the stable ABI, hence looked up by name.
static THREAD_STATE: AtomicPtr<libc::c_void> = AtomicPtr::new(std::ptr::null_mut());

/// Tells the core about this interpreter; once, at import.
pub fn register() {
    static INTERPRETER: Python3 = Python3;
    for name in [c"PyThreadState_GetUnchecked", c"_PyThreadState_UncheckedGet"] {
        // SAFETY: a NUL-terminated name; the handle means "the whole process".
        let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
        if !found.is_null() {
            THREAD_STATE.store(found, Ordering::Release);
            break;
        }
    }
    learn_main_thread();
    interrupt::set_interpreter(&INTERPRETER);
}

/// A mapping was made: the courier runs while there are any.
pub fn enter() -> std::io::Result<()> {
    let mut courier = COURIER.lock();
    if courier.thread.is_none() || courier.pid != std::process::id() {
        // SAFETY: no pointers.
        let bell = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if bell < 0 {
            return Err(std::io::Error::last_os_error());
        }
        STOP.store(false, Ordering::Release);
        BELL.store(bell, Ordering::Release);
        courier.thread = Some(thread::spawn("quire-courier", move || serve(bell)).inspect_err(|_| {
            BELL.store(-1, Ordering::Release);
            // SAFETY: nobody else has it yet.
            unsafe { libc::close(bell) };
        })?);
        courier.pid = std::process::id();
        PID.store(courier.pid, Ordering::Release);
    }
    courier.users += 1;
    Ok(())
}

/// A mapping is gone; with the last the courier ends. Called without the interpreter lock.
pub fn leave() {
    let mut courier = COURIER.lock();
    courier.users = courier.users.saturating_sub(1);
    if courier.users > 0 || courier.pid != std::process::id() {
        return;
    }
    STOP.store(true, Ordering::Release);
    let bell = BELL.swap(-1, Ordering::AcqRel);
    ring(bell);
    if let Some(thread) = courier.thread.take() {
        let _ = thread.join(); // a panic would have aborted the process
    }
    // SAFETY: the courier, the only reader, has ended.
    unsafe { libc::close(bell) };
}

/// In the child of a fork, after its interpreter is ready: the parent's courier is not here, and
/// its threads may have held our locks.
pub fn restart_in_child() -> std::io::Result<()> {
    let users = SPACE.len();
    // SAFETY: called by the interpreter's only thread in the child; no guard is held.
    unsafe {
        COURIER.replace_in_child(Courier { users: 0, pid: 0, thread: None });
        REQUESTS.replace_in_child(Vec::new());
        errors::reset_in_child();
    }
    let bell = BELL.swap(-1, Ordering::AcqRel);
    if bell >= 0 {
        // SAFETY: the child's copy of the parent's descriptor, used by nobody here.
        unsafe { libc::close(bell) };
    }
    if users > 0 {
        enter()?;
        COURIER.lock().users = users;
    }
    Ok(())
}

/// The interpreter is about to end: nobody may wait for its lock any more.
pub fn finalize() {
    FINALIZING.store(true, Ordering::Release);
}

fn ring(bell: RawFd) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: eight bytes to an eventfd; async-signal-safe.
    unsafe { libc::write(bell, one.as_ptr().cast(), one.len()) };
}

fn serve(bell: RawFd) {
    let mut count = [0u8; 8];
    loop {
        // SAFETY: eight bytes from an eventfd.
        unsafe { libc::read(bell, count.as_mut_ptr().cast(), count.len()) };
        if NOTED.swap(false, Ordering::AcqRel) {
            add_pending_call(resume_call, std::ptr::null_mut());
        }
        let requests = REQUESTS.lock().clone();
        if !requests.is_empty() && !FINALIZING.load(Ordering::Acquire) {
            Python::attach(|py| requests.iter().for_each(|request| set_exception(py, request)));
        }
        REQUESTS.lock().retain(|request| !requests.contains(request));
        SERVED.fetch_add(1, Ordering::AcqRel);
        futex::wake_all(&SERVED);
        if STOP.load(Ordering::Acquire) {
            return;
        }
    }
}

fn set_exception(py: Python<'_>, request: &Request) {
    let class = errors::class_pointer(py, request.code);
    if !class.is_null() {
        // SAFETY: the lock is held (`py`); the class lives as long as the module.
        unsafe { ffi::PyThreadState_SetAsyncExc(request.thread as _, class) };
    }
}

/// Runs in the main thread at the interpreter's next check after a noted SIGINT.
extern "C" fn resume_call(_argument: *mut libc::c_void) -> libc::c_int {
    load::resume();
    0
}

/// Has `call` run in the main thread at the interpreter's next check. The interpreter's queue is
/// short: while it is full, the main thread is on its way to empty it.
fn add_pending_call(call: PendingCall, argument: *mut libc::c_void) {
    let deadline = Instant::now() + PATIENCE;
    // SAFETY: callable from any thread, with or without the lock.
    while unsafe { ffi::Py_AddPendingCall(Some(call), argument) } != 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What the program does with SIGINT.
#[derive(Clone, Copy, PartialEq)]
enum OnInterrupt {
    /// Python's own handler raises KeyboardInterrupt, or the program's raised something.
    Raises,
    /// The program's handler is running.
    Runs,
    /// The program's handler has not raised.
    Returned,
}

/// Runs in the main thread after it met filler because of a SIGINT. Python's own handler raises
/// KeyboardInterrupt there; any other (a program's, asyncio's) need not raise, so the page error is.
/// Not inside of that handler: pending calls run at its first check, and a handler that is broken
/// off has not done its work. While it runs the call is made again at every check, so that the
/// error comes before any other code.
extern "C" fn interrupted_call(_argument: *mut libc::c_void) -> libc::c_int {
    // SAFETY: pending calls run with the lock held.
    let py = unsafe { Python::assume_attached() };
    match on_interrupt(py).unwrap_or(OnInterrupt::Returned) {
        OnInterrupt::Runs => {
            add_pending_call(interrupted_call, std::ptr::null_mut());
            0
        }
        OnInterrupt::Raises => {
            errors::forget_pending();
            load::resume(); // else the next touch might find filler again
            0
        }
        OnInterrupt::Returned => {
            load::resume();
            raise_call(FaultCode::Interrupted as usize as *mut _)
        }
    }
}

fn on_interrupt(py: Python<'_>) -> PyResult<OnInterrupt> {
    let signal = py.import("signal")?;
    let mut handler = signal.call_method1("getsignal", (libc::SIGINT,))?;
    if handler.is(&signal.getattr("default_int_handler")?) {
        return Ok(OnInterrupt::Raises);
    }
    // A partial, a method, an object that can be called: down to the function.
    for inner in ["func", "__func__"] {
        handler = handler.getattr(inner).unwrap_or(handler);
    }
    if !handler.hasattr("__code__")? {
        handler = handler.get_type().getattr("__call__")?;
    }
    let Ok(code) = handler.getattr("__code__") else {
        return Ok(OnInterrupt::Returned); // a function in C, which no pending call breaks off
    };
    let sys = py.import("sys")?;
    let frame = sys.call_method0("_getframe")?;
    if chain_has(frame, "f_back", &|frame| Ok(frame.getattr("f_code")?.is(&code)))? {
        return Ok(OnInterrupt::Runs);
    }
    let traceback = sys.call_method0("exc_info")?.get_item(2)?;
    let passed = |step: &Bound<'_, PyAny>| Ok(step.getattr("tb_frame")?.getattr("f_code")?.is(&code));
    let raised = chain_has(traceback, "tb_next", &passed)?;
    Ok(if raised { OnInterrupt::Raises } else { OnInterrupt::Returned })
}

/// Whether any link of a chain that ends with None satisfies `test`.
fn chain_has<'py>(
    mut link: Bound<'py, PyAny>,
    next: &str,
    test: &dyn Fn(&Bound<'py, PyAny>) -> PyResult<bool>,
) -> PyResult<bool> {
    while !link.is_none() {
        if test(&link)? {
            return Ok(true);
        }
        link = link.getattr(next)?;
    }
    Ok(false)
}

/// Runs in the main thread at the interpreter's next check; raises what is pending for it. The
/// argument is the code.
extern "C" fn raise_call(argument: *mut libc::c_void) -> libc::c_int {
    let Some(code) = FaultCode::from_number(argument as usize as u8) else {
        return 0;
    };
    // SAFETY: pending calls run with the lock held.
    let class = errors::class_pointer(unsafe { Python::assume_attached() }, code);
    if class.is_null() {
        return 0;
    }
    // SAFETY: as above; the class lives as long as the module.
    unsafe { ffi::PyErr_SetNone(class) };
    -1
}

/// Whether the calling thread holds the interpreter lock.
fn holds_lock(own: *mut ffi::PyThreadState) -> bool {
    let found = THREAD_STATE.load(Ordering::Acquire);
    if found.is_null() {
        return false;
    }
    // SAFETY: both names are functions without arguments that return the current thread state,
    // and may be called without the lock.
    let current = unsafe {
        let get: extern "C" fn() -> *mut ffi::PyThreadState = std::mem::transmute(found);
        get()
    };
    std::ptr::eq(current, own)
}

/// Whether the calling thread is the main one: the kernel's id of the main thread is the process id.
pub fn is_main_thread() -> bool {
    thread::id().cast_unsigned() == std::process::id()
}

/// The main thread as `threading.get_ident()` names it; 0 before it opened a mapping.
static MAIN_THREAD: AtomicUsize = AtomicUsize::new(0);

/// Notes, while in the main thread, which it is. Called at each open.
pub fn learn_main_thread() {
    if is_main_thread() {
        MAIN_THREAD.store(errors::this_thread(), Ordering::Release);
    }
}

/// As [`learn_main_thread`], where it is not known yet.
pub fn know_main_thread() {
    if MAIN_THREAD.load(Ordering::Acquire) == 0 {
        learn_main_thread();
    }
}

impl Interpreter for Python3 {
    fn raise_here(&self, error: &PageError) {
        if FINALIZING.load(Ordering::Acquire) {
            return;
        }
        let is_main = is_main_thread();
        let code = error.error.code;
        // SAFETY: reads this thread's own record; needs no lock.
        let own = unsafe { ffi::PyGILState_GetThisThreadState() };
        let target = if own.is_null() { MAIN_THREAD.load(Ordering::Acquire) } else { errors::this_thread() };
        if !errors::set_pending(target, error) {
            return; // one is on its way; the hand-shake for every page would be wasted
        }
        if is_main && code == FaultCode::Interrupted {
            add_pending_call(interrupted_call, std::ptr::null_mut());
            return;
        }
        let request = Request { thread: target, code };
        if !own.is_null() && holds_lock(own) {
            // SAFETY: just checked.
            set_exception(unsafe { Python::assume_attached() }, &request);
        } else if is_main || own.is_null() || is_of_parent() {
            add_pending_call(raise_call, code as usize as *mut _);
        } else if PID.load(Ordering::Acquire) == 0 || BELL.load(Ordering::Acquire) < 0 {
            send_messenger(request);
        } else {
            ask_courier(request);
        }
    }

    fn interrupt_noted(&self) {
        NOTED.store(true, Ordering::Release);
        let bell = BELL.load(Ordering::Acquire);
        if bell >= 0 {
            ring(bell);
        }
    }
}

/// Whether the courier that this process knows of runs in its parent.
fn is_of_parent() -> bool {
    let pid = PID.load(Ordering::Acquire);
    pid != 0 && pid != std::process::id()
}

/// Where no courier runs, as mappings that the kernel pages keep none: a thread for this one errand.
fn send_messenger(request: Request) {
    let done = Arc::new(AtomicU32::new(0));
    let told = Arc::clone(&done);
    let sent = thread::spawn("quire-messenger", move || {
        if !FINALIZING.load(Ordering::Acquire) {
            Python::attach(|py| set_exception(py, &request));
        }
        told.store(1, Ordering::Release);
        futex::wake_all(&told);
    });
    let deadline = Instant::now() + PATIENCE;
    while sent.is_ok() && done.load(Ordering::Acquire) == 0 && Instant::now() < deadline {
        futex::wait(&done, 0, Duration::from_millis(50));
    }
}

fn ask_courier(request: Request) {
    let bell = BELL.load(Ordering::Acquire);
    if bell < 0 {
        return;
    }
    REQUESTS.lock().push(request);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let seen = SERVED.load(Ordering::Acquire);
        let waiting = REQUESTS.lock().contains(&request);
        if !waiting || Instant::now() > deadline || FINALIZING.load(Ordering::Acquire) {
            return;
        }
        ring(bell);
        futex::wait(&SERVED, seen, Duration::from_millis(50));
    }
}
