//! What a swap file needs beyond reads and writes: giving back disk space (fallocate(2)), and whether
//! a file lies in memory after all (fstatfs(2)).
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Gives the disk space of a range back; it reads as zeros afterwards. The file keeps its length.
///
/// # Errors
/// EOPNOTSUPP where the file system cannot.
pub fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    const MODE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let too_far = |_| io::Error::from_raw_os_error(libc::EFBIG);
    let (offset, len) = (i64::try_from(offset).map_err(too_far)?, i64::try_from(len).map_err(too_far)?);
    loop {
        // SAFETY: no pointers; the descriptor is open while `file` is borrowed.
        if unsafe { libc::fallocate(file.as_raw_fd(), MODE, offset, len) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Whether the file is on tmpfs or ramfs: evicting to it frees little memory or none.
///
/// # Errors
/// What fstatfs says.
pub fn is_in_memory(file: &File) -> io::Result<bool> {
    const RAMFS_MAGIC: i64 = 0x8584_58f6; // linux/magic.h
    // SAFETY: all-zero is a valid statfs: plain integers.
    let mut facts: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the call writes one statfs; the descriptor is open while `file` is borrowed.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut facts) } != 0 {
        return Err(io::Error::last_os_error());
    }
    #[allow(clippy::unnecessary_cast)] // the types differ between architectures and C libraries
    let (kind, tmpfs) = (facts.f_type as i64, libc::TMPFS_MAGIC as i64);
    Ok(kind == tmpfs || kind == RAMFS_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn a_hole_reads_zero_and_its_neighbours_stay() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 3 << 16], 0).unwrap();
        file.sync_all().unwrap();
        let before = file.metadata().unwrap().blocks();
        punch_hole(&file, 1 << 16, 1 << 16).unwrap();
        let mut bytes = vec![1; 3 << 16];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes[1 << 16..2 << 16].iter().all(|byte| *byte == 0));
        assert!(bytes[..1 << 16].iter().chain(&bytes[2 << 16..]).all(|byte| *byte == 7));
        assert!(file.metadata().unwrap().blocks() < before);
    }

    #[test]
    fn tmpfs_is_told_from_a_disk() {
        let shared = crate::sys::process::shared_memory("probe", 4096).unwrap();
        assert!(is_in_memory(&File::from(shared)).unwrap());
        assert!(!is_in_memory(&File::open("/proc/self/stat").unwrap()).unwrap());
    }
}
