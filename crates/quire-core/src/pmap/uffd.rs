//! `uffd`: full-mode userfaultfd. The faulting thread sleeps in the kernel; one handler thread per
//! CPU polls for its message, and the one on the same CPU is there first. Faults of system calls
//! are served too.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use super::{Pmap, RunningPmap};
use crate::fault;
use crate::sys::lock::Mutex;
use crate::sys::memory::{self, Range};
use crate::sys::userfaultfd::{Access, FEATURE_POISON, Message, Userfaultfd};
use crate::sys::{errno, process, thread};

/// Handler threads at most; a machine with more CPUs serves some faults from another CPU.
const HANDLERS_MAX: usize = 16;

/// The pmap.
pub struct UffdPmap {
    uffd: Userfaultfd,
    stop: OwnedFd,
    handlers: Mutex<Vec<JoinHandle<()>>>,
    /// Handlers that wait for a message.
    free: AtomicUsize,
}

impl UffdPmap {
    /// Opens it and starts its handler threads.
    ///
    /// # Errors
    /// The errno.
    pub fn start() -> Result<Arc<Self>, i32> {
        let uffd = Userfaultfd::open(Access::Full, FEATURE_POISON)?;
        // SAFETY: no pointers; a new descriptor that nobody else owns.
        let stop = unsafe {
            let fd = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
            if fd < 0 {
                return Err(errno());
            }
            OwnedFd::from_raw_fd(fd)
        };
        let pmap =
            Arc::new(UffdPmap { uffd, stop, handlers: Mutex::new(Vec::new()), free: AtomicUsize::new(0) });
        for cpu in thread::allowed_cpus().into_iter().take(HANDLERS_MAX) {
            let handler = Arc::clone(&pmap);
            let started = thread::spawn(&format!("quire-fault-{cpu}"), move || handler.serve(cpu));
            match started {
                Ok(handle) => pmap.handlers.lock().push(handle),
                Err(error) => {
                    pmap.stop();
                    return Err(error.raw_os_error().unwrap_or(libc::EAGAIN));
                }
            }
        }
        Ok(pmap)
    }

    /// A handler thread: waits for messages or the stop, and has each fault resolved.
    fn serve(&self, cpu: usize) {
        thread::bind_to_cpu(cpu);
        let mut message = [Message::default()];
        let mut polls = [self.uffd.as_raw_fd(), self.stop.as_raw_fd()].map(|fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        });
        self.free.fetch_add(1, Ordering::AcqRel);
        loop {
            // SAFETY: two pollfds on this stack.
            unsafe { libc::poll(polls.as_mut_ptr(), 2, -1) };
            if polls[1].revents != 0 {
                return;
            }
            // One at a time: a message that is read is this thread's to resolve, and the others
            // should not wait behind it.
            while self.uffd.read(&mut message) == 1 {
                if let Some(address) = message[0].address() {
                    let others_free = self.free.fetch_sub(1, Ordering::AcqRel) > 1;
                    fault::serve(address, thread::now_ns(), others_free);
                    self.free.fetch_add(1, Ordering::AcqRel);
                }
            }
        }
    }
}

impl Pmap for UffdPmap {
    fn name(&self) -> &'static str {
        "uffd"
    }

    fn enter(&self, range: Range) -> Result<(), i32> {
        self.uffd.register(range)
    }

    fn leave(&self, range: Range) {
        let _ = self.uffd.unregister(range); // fails only for a range that was never registered
    }

    fn install(&self, start: usize, bytes: &[u8]) -> Result<(), i32> {
        // SAFETY: the fault layer installs only whole pages of entered ranges.
        unsafe { self.uffd.copy(start, bytes) }
    }

    fn poison(&self, range: Range) -> Result<(), i32> {
        let poisoned = self.uffd.poison(range);
        self.wake(range);
        poisoned
    }

    fn remove(&self, ranges: &[Range]) {
        // SAFETY: ranges of entered mappings whose pages the caller owns (EVICTING, LOADING).
        unsafe { memory::discard(ranges) }
    }

    fn wake(&self, range: Range) {
        let _ = self.uffd.wake(range); // fails only for an invalid range
    }

    fn faults_are_signals(&self) -> bool {
        false
    }
}

impl RunningPmap for UffdPmap {
    fn stop(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight bytes to an eventfd; it stays readable, so every handler sees it.
        unsafe { libc::write(self.stop.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        for handler in self.handlers.lock().drain(..) {
            // A handler that panicked would have aborted the process (panic = abort).
            let _ = handler.join();
        }
    }

    fn forget_in_child(&self) {
        process::close_inherited(self.uffd.as_raw_fd());
        process::close_inherited(self.stop.as_raw_fd());
    }
}
