//! fork(2): handlers, and a lock that the child can make new.
//!
//! After a fork only the calling thread lives on, so a lock that another thread of the parent
//! held stays locked in the child for ever. [`ForkMutex`] is a mutex that the child replaces.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{MutexGuard, Once};

use super::lock::Mutex;

/// A mutex whose content the only thread of a forked child can replace without locking it.
pub struct ForkMutex<T>(UnsafeCell<Mutex<T>>);

// SAFETY: shared access goes through the inner mutex; `replace_in_child` has its own contract.
unsafe impl<T: Send> Sync for ForkMutex<T> {}
// SAFETY: as of a mutex.
unsafe impl<T: Send> Send for ForkMutex<T> {}

impl<T: Default> Default for ForkMutex<T> {
    fn default() -> Self {
        ForkMutex::new(T::default())
    }
}

impl<T> ForkMutex<T> {
    /// A new unlocked mutex.
    pub const fn new(value: T) -> Self {
        ForkMutex(UnsafeCell::new(Mutex::new(value)))
    }

    /// Locks.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        // SAFETY: the cell is written only by `replace_in_child`, while no other thread exists.
        unsafe { &*self.0.get() }.lock()
    }

    /// Replaces lock and content; the old content is leaked, as a thread of the parent may have
    /// been half-way through a change of it.
    ///
    /// # Safety
    /// Only in the child of a fork while it has one thread, which holds no guard of this mutex.
    pub unsafe fn replace_in_child(&self, value: T) {
        // SAFETY: no other thread and no guard exists (contract), so the write is exclusive.
        // `ptr::write` does not drop the old value.
        unsafe { std::ptr::write(self.0.get(), Mutex::new(value)) }
    }
}

/// Registers handlers that run around every fork(2) of this process (pthread_atfork(3)); they
/// cannot be taken back.
pub fn at_fork(before: extern "C" fn(), parent: extern "C" fn(), child: extern "C" fn()) {
    // SAFETY: the three are plain functions that live as long as the process.
    unsafe {
        libc::pthread_atfork(Some(before), Some(parent), Some(child));
    }
}

/// How often this process has forked (fork(2), whoever called it) since this was first asked; the
/// child of a fork goes on with the count of its parent.
pub fn forks() -> u64 {
    static ONCE: Once = Once::new();
    static COUNT: AtomicU64 = AtomicU64::new(0);
    extern "C" fn count() {
        COUNT.fetch_add(1, Ordering::Relaxed);
    }
    // SAFETY: the handler is a plain function that lives as long as the process.
    ONCE.call_once(|| unsafe {
        libc::pthread_atfork(Some(count), None, None);
    });
    COUNT.load(Ordering::Relaxed)
}

/// A value that never changes while other threads exist; the child of a fork may replace it.
pub struct ForkCell<T>(UnsafeCell<T>);

// SAFETY: shared reads only; `replace_in_child` has its own contract.
unsafe impl<T: Send + Sync> Sync for ForkCell<T> {}

impl<T> ForkCell<T> {
    /// Holds `value`.
    pub const fn new(value: T) -> Self {
        ForkCell(UnsafeCell::new(value))
    }

    /// The value.
    pub fn get(&self) -> &T {
        // SAFETY: written only by `replace_in_child`, while no other thread exists.
        unsafe { &*self.0.get() }
    }

    /// Replaces the value; the old one is leaked, as it may refer to threads that are gone.
    ///
    /// # Safety
    /// Only in the child of a fork while it has one thread, which holds no borrow of this cell.
    pub unsafe fn replace_in_child(&self, value: T) {
        // SAFETY: exclusive by contract.
        unsafe { std::ptr::write(self.0.get(), value) }
    }
}

/// A place where the handler before a fork leaves a guard, for the handlers after it to drop.
pub struct HeldGuard<G>(UnsafeCell<Option<G>>);

// SAFETY: used only by the thread that forks, while it holds the very lock of the guard.
unsafe impl<G> Sync for HeldGuard<G> {}

impl<G> Default for HeldGuard<G> {
    fn default() -> Self {
        Self::new()
    }
}

impl<G> HeldGuard<G> {
    /// Empty.
    pub const fn new() -> Self {
        HeldGuard(UnsafeCell::new(None))
    }

    /// Keeps a guard.
    ///
    /// # Safety
    /// Only in the handler before a fork, with the guard of the one lock this place belongs to.
    pub unsafe fn keep(&self, guard: G) {
        // SAFETY: whoever has the guard is alone here.
        unsafe { *self.0.get() = Some(guard) }
    }

    /// Drops the guard.
    ///
    /// # Safety
    /// Only in the handlers after a fork, in the thread that kept it or its copy in the child.
    pub unsafe fn let_go(&self) {
        // SAFETY: this thread still has the lock.
        unsafe { *self.0.get() = None }
    }
}
