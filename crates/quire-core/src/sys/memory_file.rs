//! Memory files (memfd_create(2)) whose size nobody can change, and what tells files in memory from others: seals.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;

use super::backing::Opened;

/// Seals of a memory file whose size nobody can change.
pub const SIZE_SEALS: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
/// Not to be run, for ever (Linux 6.3).
const MFD_NOEXEC_SEAL: u32 = 8;

/// A new one of `size` bytes that are zeros, which those may open whom the `permissions` allow it.
///
/// # Errors
/// As memfd_create(2) and ftruncate(2): EMFILE, ENFILE, ENOMEM, EINVAL for a name of more than 249 bytes, EFBIG.
pub fn make_sealed(name: &CStr, size: u64, permissions: u32) -> io::Result<Opened> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    let made = match create(name, flags | MFD_NOEXEC_SEAL) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => create(name, flags)?,
        made => made?,
    };
    i64::try_from(size)
        .map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
        .and_then(|_| made.set_len(size))?;
    made.set_permissions(Permissions::from_mode(permissions))?;
    // SAFETY: a descriptor of ours; the call has one number as its argument.
    if unsafe { libc::fcntl(made.as_raw_fd(), libc::F_ADD_SEALS, SIZE_SEALS | libc::F_SEAL_SEAL) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Opened::taken(made)
}

fn create(name: &CStr, flags: u32) -> io::Result<File> {
    // SAFETY: a text that ends.
    let made = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, nobody else's.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(made) }))
}

/// The seals of a file in memory: a memory file, or one on tmpfs or hugetlbfs. No other file has any, not even none.
pub fn seals_of(file: &File) -> Option<i32> {
    // SAFETY: a descriptor of ours; the call has no other argument.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    (seals >= 0).then_some(seals)
}

/// Whether it is in memory and nobody can change its size.
pub fn is_sealed(file: &File) -> bool {
    seals_of(file).is_some_and(|seals| seals & SIZE_SEALS == SIZE_SEALS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn what_is_made_keeps_its_size_and_is_what_was_asked_for() {
        let Opened { file, .. } = make_sealed(c"quire:test", 12345, 0o640).unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!((metadata.len(), metadata.mode() & 0o777, metadata.nlink()), (12345, 0o640, 0));
        assert!(is_sealed(&file));
        assert!(file.set_len(1).is_err() && file.set_len(20000).is_err());
        assert_eq!(file.metadata().unwrap().len(), 12345);
    }

    #[test]
    fn what_the_kernel_refuses_is_said() {
        let long = std::ffi::CString::new(vec![b'x'; 300]).unwrap();
        let refused = |name, size| make_sealed(name, size, 0o600).err().unwrap().raw_os_error();
        assert_eq!(refused(&long, 1), Some(libc::EINVAL));
        assert_eq!(refused(c"x", u64::MAX), Some(libc::EFBIG));
    }

    #[test]
    fn a_file_of_a_disk_has_no_seals() {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let file = File::create_new(folder.path().join("file")).unwrap();
        assert_eq!(seals_of(&file), None);
        assert!(!is_sealed(&file));
    }
}
