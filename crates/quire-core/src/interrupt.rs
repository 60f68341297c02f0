//! Between a bad page and the interpreter: errors for the thread that touched, and Ctrl-C for a
//! thread that waits. The core does not know the interpreter; it is told what to call.
//!
//! Ctrl-C: a SIGINT that arrives while quire watches (any mapping over a slow store is open) sets
//! [`PENDING`]. Waits see it and end; the pages concerned become filler. The interpreter clears it
//! (`resume`) at its next check in the main thread, which is also where it raises
//! KeyboardInterrupt: until then every further fault ends at once, so that one C call over a slow
//! array ends soon after the key.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::errors::StoreError;
use crate::sys::{signal, thread};

/// How often a wait looks for an interrupt.
pub const LOOK: Duration = Duration::from_millis(20);

/// A page that could not be filled, as told to the thread that touched it.
#[derive(Clone, Debug)]
pub struct PageError {
    /// What the store said.
    pub error: StoreError,
    /// Name of the source.
    pub source: String,
    /// Granule number within the mapping.
    pub page: u64,
    /// Number of the mapping, unique in the process.
    pub mapping: u64,
}

/// What the interpreter's side does for the core. Called from signal handlers of threads that
/// touched a page, with or without the interpreter lock.
pub trait Interpreter: Sync {
    /// Makes the calling thread raise `error` at the interpreter's next check, or, where it is not
    /// a thread of the interpreter, the main thread.
    fn raise_here(&self, error: &PageError);

    /// A SIGINT was noted: have [`resume`](crate::load::resume) called in the main thread at the
    /// interpreter's next check. Called in a signal handler: only async-signal-safe work.
    fn interrupt_noted(&self);
}

static INTERPRETER: OnceLock<&'static dyn Interpreter> = OnceLock::new();
static PENDING: AtomicBool = AtomicBool::new(false);
/// When the last interrupt was noted, on the monotonic clock.
static NOTED_NS: AtomicU64 = AtomicU64::new(0);
static WATCHERS: AtomicI32 = AtomicI32::new(0);

/// A number for a new mapping, unique in the process.
pub fn new_mapping_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Registers the interpreter, once.
pub fn set_interpreter(interpreter: &'static dyn Interpreter) {
    // A second registration could only come from a second copy of the module; the first stays.
    let _ = INTERPRETER.set(interpreter);
}

/// Passes an error on to the calling thread.
pub fn raise_here(error: &PageError) {
    if let Some(interpreter) = INTERPRETER.get() {
        interpreter.raise_here(error);
    }
}

/// Starts or keeps watching SIGINT; each call is paired with [`unwatch`].
pub fn watch() {
    WATCHERS.fetch_add(1, Ordering::AcqRel);
    signal::watch_interrupt(note);
}

/// Ends one [`watch`]; the last puts the handler before ours back.
pub fn unwatch() {
    if WATCHERS.fetch_sub(1, Ordering::AcqRel) == 1 {
        signal::unwatch_interrupt();
    }
}

/// Makes sure, while anything watches, that ours is the handler on top: the program may have set
/// its own since.
pub fn watch_again() {
    if WATCHERS.load(Ordering::Acquire) > 0 {
        signal::watch_interrupt(note);
    }
}

fn note() {
    NOTED_NS.store(thread::now_ns(), Ordering::Release);
    PENDING.store(true, Ordering::Release);
    if let Some(interpreter) = INTERPRETER.get() {
        interpreter.interrupt_noted();
    }
}

/// Whether an interrupt was noted that the interpreter has not yet acted on.
pub fn pending() -> bool {
    PENDING.load(Ordering::Acquire)
}

/// The interpreter acted on the interrupt. Not before all waits have had time to see it: the main
/// thread may act at once, and the waits of other threads, which it may be about to join, would go
/// on.
pub fn clear() {
    if pending() {
        let seen_ns = NOTED_NS.load(Ordering::Acquire) + 2 * LOOK.as_nanos() as u64;
        std::thread::sleep(Duration::from_nanos(seen_ns.saturating_sub(thread::now_ns())));
    }
    PENDING.store(false, Ordering::Release);
}

/// Sleeps; false when an interrupt is noted meanwhile.
pub fn sleep(length: Duration) -> bool {
    let end = Instant::now() + length;
    while !pending() {
        let rest = end.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            return true;
        }
        std::thread::sleep(rest.min(LOOK));
    }
    false
}
