//! Locks of open file descriptions on bytes of a file (F_OFD_SETLK, fcntl(2)).
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Sets or drops a lock on bytes; `false` where another has one there. A length of 0 is to the end.
///
/// # Errors
/// As fcntl(2).
pub fn set(file: &File, kind: libc::c_int, start: u64, len: u64) -> io::Result<bool> {
    match call(file, libc::F_OFD_SETLK, &mut lock_of(kind, start, len)) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether another has a lock on any byte.
///
/// # Errors
/// As fcntl(2).
pub fn is_held(file: &File) -> io::Result<bool> {
    let mut lock = lock_of(libc::F_WRLCK, 0, 0);
    call(file, libc::F_OFD_GETLK, &mut lock)?;
    Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK)
}

fn lock_of(kind: libc::c_int, start: u64, len: u64) -> libc::flock {
    // SAFETY: a struct of numbers, for which zeros are values.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    #[allow(clippy::cast_possible_truncation, reason = "F_RDLCK, F_WRLCK and F_UNLCK are 0 to 2")]
    {
        lock.l_type = kind as libc::c_short;
        lock.l_whence = libc::SEEK_SET as libc::c_short;
    }
    lock.l_start = start.cast_signed();
    lock.l_len = len.cast_signed();
    lock
}

fn call(file: &File, command: libc::c_int, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: the file is open, and the struct lives through the call.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut *lock) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;

    fn opened(path: &std::path::Path) -> File {
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
    }

    #[test]
    fn a_lock_is_of_its_opening_and_ends_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record");
        let (one, other) = (opened(&path), opened(&path));
        assert!(set(&one, libc::F_WRLCK, 64, 16).unwrap());
        assert!(!set(&other, libc::F_WRLCK, 0, 0).unwrap());
        assert!(!set(&other, libc::F_WRLCK, 79, 1).unwrap());
        assert!(set(&other, libc::F_WRLCK, 80, 16).unwrap());
        assert!(is_held(&one).unwrap() && is_held(&other).unwrap());
        drop(one);
        assert!(!is_held(&other).unwrap(), "its own do not count");
        assert!(set(&other, libc::F_WRLCK, 0, 0).unwrap());
    }
}
