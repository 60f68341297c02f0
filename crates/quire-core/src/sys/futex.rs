//! Waiting on a 32-bit word: futex(2), private to the process. Usable inside a signal handler.
#![allow(unsafe_code)]

use std::sync::atomic::AtomicU32;
use std::time::Duration;

/// Waits until the word may have changed from `expected`, a wake, a signal, or the timeout.
/// Spurious returns are normal: the caller re-reads the word.
pub fn wait(word: &AtomicU32, expected: u32, timeout: Duration) {
    let limit = libc::timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(timeout.subsec_nanos()),
    };
    // SAFETY: the word outlives the call (a borrow) and is 4-byte aligned (AtomicU32); the kernel
    // only reads it. The timespec lives on this stack frame.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
            expected,
            &raw const limit,
        );
    }
}

/// Wakes every thread that waits on the word.
pub fn wake_all(word: &AtomicU32) {
    // SAFETY: the word is only used as a key by the kernel; no memory is written.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, i32::MAX);
    }
}
