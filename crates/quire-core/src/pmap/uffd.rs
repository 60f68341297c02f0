//! `uffd`: full-mode userfaultfd. The faulting thread sleeps in the kernel; one handler thread per
//! CPU polls for its message, and the one on the same CPU is there first. Faults of system calls
//! are served too.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use super::frames::Frames;
use super::{Kind, Pmap, RunningPmap, Tracking};
use crate::fault;
use crate::sys::lock::Mutex;
use crate::sys::memory::Range;
use crate::sys::userfaultfd::{Access, FEATURE_EXACT_ADDRESS, FEATURE_POISON, FEATURE_THREAD_ID, Message};
use crate::sys::{errno, process, thread};

/// Handler threads at most; a machine with more CPUs serves some faults from another CPU.
const HANDLERS_MAX: usize = 16;
/// Readahead follows threads, by the bytes that they touch. Older than poison, so never refused alone.
const FEATURES: u64 = FEATURE_POISON | FEATURE_THREAD_ID | FEATURE_EXACT_ADDRESS;

/// The pmap.
pub struct UffdPmap {
    frames: Frames,
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
    pub fn start(tracking: Tracking) -> Result<Arc<Self>, i32> {
        let frames = Frames::open(Access::Full, FEATURES, tracking)?;
        // SAFETY: no pointers; a new descriptor that nobody else owns.
        let stop = unsafe {
            let fd = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
            if fd < 0 {
                return Err(errno());
            }
            OwnedFd::from_raw_fd(fd)
        };
        let pmap =
            Arc::new(UffdPmap { frames, stop, handlers: Mutex::new(Vec::new()), free: AtomicUsize::new(0) });
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
        let mut polls = [self.frames.as_raw_fd(), self.stop.as_raw_fd()].map(|fd| libc::pollfd {
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
            while self.frames.uffd.read(&mut message) == 1 {
                let message = &message[0];
                if let Some(address) = message.address() {
                    let others_free = self.free.fetch_sub(1, Ordering::AcqRel) > 1;
                    let (touch, toucher) = (message.touch(), message.thread());
                    fault::serve(address, touch, toucher, thread::now_ns(), others_free);
                    self.free.fetch_add(1, Ordering::AcqRel);
                }
            }
        }
    }
}

impl Pmap for UffdPmap {
    fn kind(&self) -> Kind {
        Kind::Uffd
    }

    fn enter(&self, range: Range, writable: bool) -> Result<(), i32> {
        self.frames.enter(range, writable)
    }

    fn leave(&self, range: Range) {
        self.frames.leave(range);
    }

    fn install(&self, start: usize, bytes: &[u8], protected: bool) -> Result<(), i32> {
        self.frames.install(start, bytes, protected)
    }

    fn poison(&self, range: Range) -> Result<(), i32> {
        let poisoned = self.frames.uffd.poison(range);
        self.wake(range);
        poisoned
    }

    fn remove(&self, ranges: &[Range]) {
        self.frames.remove(ranges);
    }

    fn wake(&self, range: Range) {
        let _ = self.frames.uffd.wake(range); // fails only for an invalid range
    }

    fn protect(&self, range: Range, on: bool) -> Result<(), i32> {
        self.frames.protect(range, on)
    }

    fn frames(&self) -> Option<&Frames> {
        Some(&self.frames)
    }

    fn tracking(&self) -> Tracking {
        self.frames.tracking()
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
        self.frames.forget_in_child();
        process::close_inherited(self.stop.as_raw_fd());
    }
}
