//! Another process: start it, talk to it over a packet socket, share memory with it, see it end
//! (posix_spawn(3), socketpair(2), memfd_create(2)).
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

unsafe extern "C" {
    static environ: *const *mut libc::c_char;
}

fn owned(fd: i32) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A pair of connected packet sockets, closed on exec.
///
/// # Errors
/// EMFILE, ENFILE.
pub fn packet_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: the call writes two descriptors.
    if unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((owned(fds[0])?, owned(fds[1])?))
}

/// Nameless memory of `len` bytes that another process can map, closed on exec.
///
/// # Errors
/// EMFILE, ENFILE, ENOMEM.
pub fn shared_memory(name: &str, len: usize) -> io::Result<OwnedFd> {
    let name = CString::new(name)?;
    // SAFETY: a NUL-terminated name.
    let fd = owned(unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) })?;
    // SAFETY: an own descriptor.
    if unsafe { libc::ftruncate(fd.as_raw_fd(), len as i64) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd)
}

/// Shared memory mapped for reading here, unmapped on drop.
pub struct SharedView {
    start: usize,
    len: usize,
}

impl SharedView {
    /// Maps all `len` bytes of a memfd.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn new(fd: &OwnedFd, len: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, fd.as_raw_fd(), 0)
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(SharedView { start: at as usize, len })
    }

    /// Copies `to.len()` bytes from `offset`.
    pub fn copy_out(&self, offset: usize, to: &mut [u8]) {
        assert!(offset + to.len() <= self.len, "a slot lies inside the shared memory");
        // SAFETY: in bounds and mapped while `self` lives. The other process may be writing: a raw
        // copy of bytes, of which no reference is made, so torn bytes are the worst that can be.
        unsafe {
            std::ptr::copy_nonoverlapping((self.start + offset) as *const u8, to.as_mut_ptr(), to.len());
        }
    }
}

impl Drop for SharedView {
    fn drop(&mut self) {
        // SAFETY: own mapping, no reference is ever handed out.
        unsafe {
            libc::munmap(self.start as *mut _, self.len);
        }
    }
}

/// Sends one packet; never raises SIGPIPE.
///
/// # Errors
/// EPIPE when the other side is gone.
pub fn send_packet(socket: RawFd, packet: &[u8]) -> io::Result<()> {
    loop {
        // SAFETY: the packet outlives the call.
        let sent = unsafe { libc::send(socket, packet.as_ptr().cast(), packet.len(), libc::MSG_NOSIGNAL) };
        if sent >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Waits up to `limit` for a packet: `Ok(None)` when there was none, `Ok(Some(0))` at the end.
///
/// # Errors
/// ECONNRESET and others, which mean that the other side is gone.
pub fn receive_packet(
    socket: RawFd,
    packet: &mut [u8],
    limit: Option<Duration>,
) -> io::Result<Option<usize>> {
    if let Some(limit) = limit {
        let mut poll = libc::pollfd { fd: socket, events: libc::POLLIN, revents: 0 };
        let ms = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one pollfd.
        if unsafe { libc::poll(&raw mut poll, 1, ms) } <= 0 {
            return Ok(None);
        }
    }
    // SAFETY: the buffer outlives the call and its length is passed.
    let got = unsafe { libc::recv(socket, packet.as_mut_ptr().cast(), packet.len(), 0) };
    match usize::try_from(got) {
        Ok(got) => Ok(Some(got)),
        Err(_) => {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted { Ok(None) } else { Err(error) }
        }
    }
}

/// Ends both directions of a socket: the other side, and our own reader, see the end.
pub fn shut_down(socket: RawFd) {
    // SAFETY: no pointers; on a socket that has ended already it is a no-op.
    unsafe {
        libc::shutdown(socket, libc::SHUT_RDWR);
    }
}

/// Closes, in the child of a fork, a descriptor whose owner was leaked there; -1 is none.
pub fn close_inherited(fd: RawFd) {
    if fd >= 0 {
        // SAFETY: the owner is leaked and never closes it (contract of the callers).
        unsafe {
            libc::close(fd);
        }
    }
}

/// Has a file let go of what it has open, in whatever call it is: `file` is an empty one from here on, which
/// cannot be written, under the same number. Calls that are under way end as they would have.
pub fn let_go(file: &File) {
    // Without a descriptor to spare it stays as it is until it is dropped.
    if let Ok(null) = File::open("/dev/null") {
        // SAFETY: both are open; the number stays its owner's (a borrow).
        unsafe {
            libc::dup3(null.as_raw_fd(), file.as_raw_fd(), libc::O_CLOEXEC);
        }
    }
}

/// A child process.
#[derive(Debug)]
pub struct Child(libc::pid_t);

impl Child {
    /// Starts `argv` with the descriptors `keep` open under their own numbers, in a process group
    /// of its own (a terminal's Ctrl-C is not for it), signals at their defaults, no input.
    ///
    /// # Errors
    /// What posix_spawn says (ENOENT, ENOMEM, EAGAIN).
    pub fn spawn(argv: &[String], keep: &[RawFd]) -> io::Result<Self> {
        let words: Vec<CString> =
            argv.iter().map(|word| CString::new(word.as_str())).collect::<Result<_, _>>()?;
        let mut pointers: Vec<*mut libc::c_char> =
            words.iter().map(|word| word.as_ptr().cast_mut()).collect();
        pointers.push(std::ptr::null_mut());
        let check = |rc: i32| {
            if rc == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(rc)) }
        };
        let mut pid = 0;
        // SAFETY: the two objects are initialised before use and destroyed after; the argument
        // vector is NUL-terminated and outlives the call; `environ` is the process's own.
        unsafe {
            let mut files: libc::posix_spawn_file_actions_t = std::mem::zeroed();
            let mut attributes: libc::posix_spawnattr_t = std::mem::zeroed();
            check(libc::posix_spawn_file_actions_init(&raw mut files))?;
            check(libc::posix_spawnattr_init(&raw mut attributes))?;
            libc::posix_spawn_file_actions_addopen(
                &raw mut files,
                0,
                c"/dev/null".as_ptr(),
                libc::O_RDONLY,
                0,
            );
            for fd in keep {
                // The same number twice clears close-on-exec in the child (POSIX.1-2024, glibc 2.29).
                libc::posix_spawn_file_actions_adddup2(&raw mut files, *fd, *fd);
            }
            let mut signals: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut signals);
            libc::posix_spawnattr_setsigmask(&raw mut attributes, &raw const signals);
            libc::sigfillset(&raw mut signals);
            libc::posix_spawnattr_setsigdefault(&raw mut attributes, &raw const signals);
            libc::posix_spawnattr_setpgroup(&raw mut attributes, 0);
            let flags =
                libc::POSIX_SPAWN_SETSIGMASK | libc::POSIX_SPAWN_SETSIGDEF | libc::POSIX_SPAWN_SETPGROUP;
            libc::posix_spawnattr_setflags(&raw mut attributes, flags as i16);
            let rc = libc::posix_spawnp(
                &raw mut pid,
                pointers[0],
                &raw const files,
                &raw const attributes,
                pointers.as_ptr(),
                environ.cast(),
            );
            libc::posix_spawn_file_actions_destroy(&raw mut files);
            libc::posix_spawnattr_destroy(&raw mut attributes);
            check(rc)?;
        }
        Ok(Child(pid))
    }

    /// The process id.
    pub fn id(&self) -> i32 {
        self.0
    }

    /// Kills it (SIGKILL).
    pub fn kill(&self) {
        // SAFETY: our own child, not yet reaped (`reap` consumes the handle).
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
        }
    }

    /// Waits for its end, at most `grace`, then kills it and waits.
    pub fn reap(self, grace: Duration) {
        let deadline = Instant::now() + grace;
        let mut pause = Duration::from_millis(1);
        while !self.ended(libc::WNOHANG) {
            if Instant::now() >= deadline {
                self.kill();
                self.ended(0);
                return;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        }
    }

    fn ended(&self, flags: i32) -> bool {
        loop {
            // SAFETY: a null status pointer is allowed.
            let rc = unsafe { libc::waitpid(self.0, std::ptr::null_mut(), flags) };
            if rc >= 0 || super::errno() != libc::EINTR {
                return rc != 0; // reaped, or not our child any more
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_inherits_the_kept_descriptor_and_is_reaped() {
        let (ours, theirs) = packet_pair().unwrap();
        let script = format!("printf hello >&{}", theirs.as_raw_fd());
        let argv = ["/bin/sh".into(), "-c".into(), script];
        let child = Child::spawn(&argv, &[theirs.as_raw_fd()]).unwrap();
        drop(theirs);
        let mut packet = [0; 64];
        let got = receive_packet(ours.as_raw_fd(), &mut packet, None).unwrap().unwrap();
        assert_eq!(&packet[..got], b"hello");
        assert_eq!(receive_packet(ours.as_raw_fd(), &mut packet, None).unwrap(), Some(0));
        child.reap(Duration::from_secs(5));
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error() {
        let error = Child::spawn(&["/no/such/program".into()], &[]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
    }
}
