//! Raw system calls, and nearly all of the unsafe code. Each file wraps one facility of the
//! kernel in functions whose safety rules are stated; nothing here knows of pages' states.

pub mod arena;
pub mod backing;
pub mod fork;
pub mod futex;
pub mod lazy_words;
pub mod lock;
pub mod locked;
pub mod memory;
pub mod memory_file;
pub mod mmap;
pub mod pagemap;
pub mod process;
pub mod record_lock;
pub mod signal;
pub mod swap_file;
pub mod thread;
pub mod userfaultfd;

/// The thread's errno of the last failed call.
pub fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// What the system says of an errno.
pub fn errno_message(errno: i32) -> String {
    crate::errors::words_of(&std::io::Error::from_raw_os_error(errno))
}
