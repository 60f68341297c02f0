//! Locks of open file descriptions on bytes of a file (F_OFD_SETLK, fcntl(2)), and seals of memory files.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Seals of a memory file whose size nobody can change.
pub const SIZE_SEALS: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;

/// Sets or drops a lock on bytes; `false` where another has one there. A length of 0 is to the end.
///
/// # Errors
/// As fcntl(2).
pub fn set(file: &File, kind: libc::c_int, start: u64, len: u64) -> io::Result<bool> {
    // SAFETY: a struct of numbers, for which zeros are values.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    #[allow(clippy::cast_possible_truncation, reason = "F_RDLCK, F_WRLCK and F_UNLCK are 0 to 2")]
    {
        lock.l_type = kind as libc::c_short;
        lock.l_whence = libc::SEEK_SET as libc::c_short;
    }
    lock.l_start = start.cast_signed();
    lock.l_len = len.cast_signed();
    // SAFETY: the file is open, and the struct lives through the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

/// Whether it is a memory file whose size is sealed.
pub fn is_sealed(file: &File) -> bool {
    // SAFETY: the file is open; the call has no other argument.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && seals & SIZE_SEALS == SIZE_SEALS
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
        drop(one);
        assert!(set(&other, libc::F_WRLCK, 0, 0).unwrap());
    }

    #[test]
    fn a_file_of_a_disk_is_not_sealed() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!is_sealed(&opened(&folder.path().join("file"))));
    }
}
