//! userfaultfd(2): own definitions, as the crates lack POISON, MOVE and asynchronous
//! write-protect and cast signed results to unsigned (ioctl_userfaultfd(2), linux/userfaultfd.h).
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::memory::{Range, Touch, is_present, page_bytes};

/// Deliver SIGBUS to the faulting thread instead of a message to a handler.
pub const FEATURE_SIGBUS: u64 = 1 << 7;
/// Messages tell a write-protected page from a missing one; needed for REGISTER_MODE_WP.
pub const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1;
/// Messages name the faulting thread.
pub const FEATURE_THREAD_ID: u64 = 1 << 8;
/// Messages give the very address that was touched (Linux 5.18).
pub const FEATURE_EXACT_ADDRESS: u64 = 1 << 11;
/// UFFDIO_POISON (Linux 6.6).
pub const FEATURE_POISON: u64 = 1 << 14;

/// The kernel itself resolves writes to write-protected pages, and PAGEMAP_SCAN tells which there
/// were (Linux 6.7).
pub const FEATURE_WP_ASYNC: u64 = 1 << 15;
/// Needed by `FEATURE_WP_ASYNC`: pages may be protected before they are there.
pub const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
/// UFFDIO_MOVE (Linux 6.8).
pub const FEATURE_MOVE: u64 = 1 << 16;

const USER_MODE_ONLY: libc::c_int = 1;
const API: u64 = 0xAA;
const REGISTER_MODE_MISSING: u64 = 1;
const REGISTER_MODE_WP: u64 = 2;
const COPY_MODE_WP: u64 = 2;
const MOVE_MODE_DONTWAKE: u64 = 1;
const WRITEPROTECT_MODE_WP: u64 = 1;
const PAGEFAULT_FLAG_WRITE: u64 = 1;
const PAGEFAULT_FLAG_WP: u64 = 2;
const EVENT_PAGEFAULT: u8 = 0x12;

const fn ioctl_number(direction: u64, number: u64, size: usize) -> u64 {
    (direction << 30) | ((size as u64) << 16) | (0xAA << 8) | number
}
const READ: u64 = 2;
const READ_WRITE: u64 = 3;
const UFFDIO_API: u64 = ioctl_number(READ_WRITE, 0x3F, size_of::<ApiArgs>());
const UFFDIO_REGISTER: u64 = ioctl_number(READ_WRITE, 0x00, size_of::<RegisterArgs>());
const UFFDIO_UNREGISTER: u64 = ioctl_number(READ, 0x01, size_of::<RangeArgs>());
const UFFDIO_WAKE: u64 = ioctl_number(READ, 0x02, size_of::<RangeArgs>());
const UFFDIO_COPY: u64 = ioctl_number(READ_WRITE, 0x03, size_of::<CopyArgs>());
const UFFDIO_MOVE: u64 = ioctl_number(READ_WRITE, 0x05, size_of::<CopyArgs>());
const UFFDIO_WRITEPROTECT: u64 = ioctl_number(READ_WRITE, 0x06, size_of::<ProtectArgs>());
const UFFDIO_POISON: u64 = ioctl_number(READ_WRITE, 0x08, size_of::<PoisonArgs>());
const USERFAULTFD_IOC_NEW: u64 = 0xAA << 8;

#[repr(C)]
struct ApiArgs {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RangeArgs {
    start: u64,
    len: u64,
}

#[repr(C)]
struct RegisterArgs {
    range: RangeArgs,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct ProtectArgs {
    range: RangeArgs,
    mode: u64,
}

/// Of UFFDIO_COPY and UFFDIO_MOVE.
#[repr(C)]
struct CopyArgs {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct PoisonArgs {
    range: RangeArgs,
    mode: u64,
    updated: i64,
}

/// One message of the kernel: `struct uffd_msg`, of which only page faults are asked for.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u32,
    padding: u32,
}

impl Message {
    /// The faulting address, rounded down to a hardware page without `FEATURE_EXACT_ADDRESS`.
    pub fn address(&self) -> Option<usize> {
        (self.event == EVENT_PAGEFAULT).then_some(self.address as usize)
    }

    /// The faulting thread's kernel id; 0 without `FEATURE_THREAD_ID`.
    pub fn thread(&self) -> u64 {
        u64::from(self.thread)
    }

    /// What the thread was about to do.
    pub fn touch(&self) -> Touch {
        if self.flags & (PAGEFAULT_FLAG_WRITE | PAGEFAULT_FLAG_WP) != 0 { Touch::Write } else { Touch::Read }
    }
}

/// How a userfaultfd was obtained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Faults of the kernel on the process's behalf (system calls) are served too.
    Full,
    /// Only faults of user code are served.
    UserModeOnly,
}

/// An open userfaultfd, closed on drop.
pub struct Userfaultfd(OwnedFd);

impl Userfaultfd {
    /// Opens one with exactly `features`, by the system call or `/dev/userfaultfd`.
    ///
    /// # Errors
    /// The errno: EPERM when not permitted (sysctl vm.unprivileged_userfaultfd, seccomp), ENOSYS
    /// without kernel support, EINVAL when the kernel lacks one of the features.
    pub fn open(access: Access, features: u64) -> Result<Self, i32> {
        let fd = Self::open_raw(access)?;
        let mut args = ApiArgs { api: API, features, ioctls: 0 };
        fd.ioctl(UFFDIO_API, &mut args)?;
        Ok(fd)
    }

    /// The features that the kernel offers for this kind of access.
    ///
    /// # Errors
    /// The errno, as [`Userfaultfd::open`].
    pub fn features(access: Access) -> Result<u64, i32> {
        let fd = Self::open_raw(access)?;
        let mut args = ApiArgs { api: API, features: 0, ioctls: 0 };
        fd.ioctl(UFFDIO_API, &mut args)?;
        Ok(args.features)
    }

    fn open_raw(access: Access) -> Result<Self, i32> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let mode = if access == Access::UserModeOnly { USER_MODE_ONLY } else { 0 };
        // SAFETY: no pointers.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags | mode) };
        if let Ok(fd) = RawFd::try_from(fd)
            && fd >= 0
        {
            // SAFETY: a new descriptor that nobody else owns.
            return Ok(Userfaultfd(unsafe { OwnedFd::from_raw_fd(fd) }));
        }
        let refusal = super::errno();
        if access == Access::Full { Self::open_device(flags).map_err(|_| refusal) } else { Err(refusal) }
    }

    fn open_device(flags: i32) -> Result<Self, i32> {
        let device = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/userfaultfd")
            .map_err(|error| error.raw_os_error().unwrap_or(libc::EPERM))?;
        // SAFETY: the ioctl takes its flags by value.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW as _, flags) };
        if fd < 0 {
            return Err(super::errno());
        }
        // SAFETY: a new descriptor that nobody else owns.
        Ok(Userfaultfd(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    fn ioctl<T>(&self, number: u64, args: &mut T) -> Result<(), i32> {
        // SAFETY: each number above carries the size of the struct it is called with; the kernel
        // reads and writes just that struct.
        let rc = unsafe { libc::ioctl(self.0.as_raw_fd(), number as _, std::ptr::from_mut(args)) };
        if rc < 0 { Err(super::errno()) } else { Ok(()) }
    }

    /// Registers a range for faults on missing pages and, where asked for, on protected ones.
    ///
    /// # Errors
    /// The errno.
    pub fn register(&self, range: Range, protection: bool) -> Result<(), i32> {
        let mode = REGISTER_MODE_MISSING | if protection { REGISTER_MODE_WP } else { 0 };
        let mut args = RegisterArgs { range: range_args(range), mode, ioctls: 0 };
        self.ioctl(UFFDIO_REGISTER, &mut args)
    }

    /// Registers a range as a place that pages can be moved to: its faults stay the kernel's own.
    ///
    /// # Errors
    /// The errno.
    pub fn register_scratch(&self, range: Range) -> Result<(), i32> {
        let mut args = RegisterArgs { range: range_args(range), mode: REGISTER_MODE_WP, ioctls: 0 };
        self.ioctl(UFFDIO_REGISTER, &mut args)
    }

    /// Ends the registration of a range and wakes its waiters.
    ///
    /// # Errors
    /// The errno.
    pub fn unregister(&self, range: Range) -> Result<(), i32> {
        self.ioctl(UFFDIO_UNREGISTER, &mut range_args(range))
    }

    /// Lets the threads that wait in this range try again.
    ///
    /// # Errors
    /// The errno.
    pub fn wake(&self, range: Range) -> Result<(), i32> {
        self.ioctl(UFFDIO_WAKE, &mut range_args(range))
    }

    /// Write-protects the pages of a range, or allows writes again and wakes who waits for that.
    ///
    /// # Errors
    /// The errno.
    pub fn write_protect(&self, range: Range, on: bool) -> Result<(), i32> {
        let mode = if on { WRITEPROTECT_MODE_WP } else { 0 };
        loop {
            match self.ioctl(UFFDIO_WRITEPROTECT, &mut ProtectArgs { range: range_args(range), mode }) {
                Err(libc::EAGAIN) => {}
                done => return done,
            }
        }
    }

    /// Moves whole pages from `src` to `dst`: what a thread stores in them meanwhile comes along,
    /// or finds the page gone. A huge page stays one where all of it is moved to where one can be. Wakes
    /// nobody. Returns the bytes moved, with the errno when that is not all: EBUSY for a page that the
    /// kernel holds (O_DIRECT).
    ///
    /// # Safety
    /// Both are ranges of the caller's, `dst` registered, empty and as long as `src`; both writable.
    pub unsafe fn move_pages(&self, dst: usize, src: Range) -> (usize, Option<i32>) {
        let mut done = 0;
        while done < src.len {
            let mut args = CopyArgs {
                dst: (dst + done) as u64,
                src: (src.start + done) as u64,
                len: (src.len - done) as u64,
                mode: MOVE_MODE_DONTWAKE,
                copied: 0,
            };
            match self.ioctl(UFFDIO_MOVE, &mut args) {
                Ok(()) => return (src.len, None),
                Err(libc::EAGAIN) => {}
                // Linux 6.18 may move a page at its second attempt (after a race with a fault) and, not
                // knowing, try once more: its own page is then in the way. Nothing else can have emptied
                // the source, which is the caller's.
                Err(libc::EEXIST) if args.copied <= 0 && is_present(src.start + done) == Some(false) => {
                    done += page_bytes();
                    continue;
                }
                Err(errno) if args.copied <= 0 => return (done, Some(errno)),
                Err(_) => {}
            }
            done += usize::try_from(args.copied).unwrap_or(0);
        }
        (done, None)
    }

    /// Installs copies of `src` (whole hardware pages) at `dst`, write-protected or not, and wakes
    /// the waiters there. Pages that are already present stay as they are.
    ///
    /// # Errors
    /// The errno: ENOENT when the range is no longer mapped or registered, ENOMEM, ESRCH.
    ///
    /// # Safety
    /// `dst` is a registered range of the caller's, as long as `src`.
    pub unsafe fn copy(&self, dst: usize, src: &[u8], protected: bool) -> Result<(), i32> {
        let (mut done, total) = (0, src.len());
        while done < total {
            let mut args = CopyArgs {
                dst: (dst + done) as u64,
                src: src.as_ptr() as u64 + done as u64,
                len: (total - done) as u64,
                mode: if protected { COPY_MODE_WP } else { 0 },
                copied: 0,
            };
            match self.ioctl(UFFDIO_COPY, &mut args) {
                Ok(()) => return Ok(()),
                Err(libc::EAGAIN) => {}
                Err(libc::EEXIST) if args.copied < 0 => {
                    let page = Range { start: dst + done, len: page_bytes() };
                    self.wake(page)?;
                    done += page_bytes();
                }
                Err(libc::EEXIST) => {}
                Err(errno) => return Err(errno),
            }
            done += usize::try_from(args.copied).unwrap_or(0);
        }
        Ok(())
    }

    /// Makes every access to the range fail with SIGBUS (EHWPOISON or EFAULT in system calls) and
    /// wakes its waiters.
    ///
    /// # Errors
    /// The errno.
    pub fn poison(&self, range: Range) -> Result<(), i32> {
        let (mut done, page) = (0, page_bytes());
        while done < range.len {
            let rest = Range { start: range.start + done, len: range.len - done };
            let mut args = PoisonArgs { range: range_args(rest), mode: 0, updated: 0 };
            match self.ioctl(UFFDIO_POISON, &mut args) {
                Ok(()) => return Ok(()),
                Err(libc::EAGAIN) => {}
                Err(libc::EEXIST) if args.updated <= 0 => done += page,
                Err(libc::EEXIST) => {}
                Err(errno) => return Err(errno),
            }
            done += usize::try_from(args.updated).unwrap_or(0);
        }
        Ok(())
    }

    /// Reads messages that wait; 0 when there are none.
    pub fn read(&self, messages: &mut [Message]) -> usize {
        // SAFETY: `Message` has the layout and size (32 bytes) of struct uffd_msg and holds plain
        // integers, so any bytes are valid.
        let got =
            unsafe { libc::read(self.0.as_raw_fd(), messages.as_mut_ptr().cast(), size_of_val(messages)) };
        usize::try_from(got).unwrap_or(0) / size_of::<Message>()
    }
}

impl AsRawFd for Userfaultfd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn range_args(range: Range) -> RangeArgs {
    RangeArgs { start: range.start as u64, len: range.len as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_match_the_kernel_headers() {
        assert_eq!(UFFDIO_API, 0xc018_aa3f);
        assert_eq!(UFFDIO_REGISTER, 0xc020_aa00);
        assert_eq!(UFFDIO_UNREGISTER, 0x8010_aa01);
        assert_eq!(UFFDIO_COPY, 0xc028_aa03);
        assert_eq!(UFFDIO_MOVE, 0xc028_aa05);
        assert_eq!(UFFDIO_WRITEPROTECT, 0xc018_aa06);
        assert_eq!(UFFDIO_POISON, 0xc020_aa08);
        assert_eq!(size_of::<Message>(), 32);
    }
}
