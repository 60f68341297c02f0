//! The file that pages are swapped to: nameless, for its owner alone, gone with the process.

use std::fs::{File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::errors::{OpenError, words_of};
use crate::sys::swap_file;

/// All I/O of a swap passes this trait, so that a test can fail or shorten any call.
pub trait SwapFile: Send + Sync {
    /// Writes some of `bytes` at `offset`, as pwrite(2).
    ///
    /// # Errors
    /// What the system says.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize>;

    /// Reads some bytes from `offset`, as pread(2).
    ///
    /// # Errors
    /// What the system says.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Gives the disk space of a range back.
    ///
    /// # Errors
    /// EOPNOTSUPP where the file system cannot; it is not asked again.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;
}

impl SwapFile for File {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        FileExt::write_at(self, bytes, offset)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, buf, offset)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        swap_file::punch_hole(self, offset, len)
    }
}

/// Makes the file in `folder`, or where none is named in the first of `TMPDIR`, `/var/tmp` and `/tmp`
/// that is on a disk and has nameless files; one of these two, or neither, where it must be.
pub(super) fn open(folder: Option<&Path>) -> Result<(File, PathBuf), OpenError> {
    let folders = match folder {
        Some(folder) => vec![folder.to_owned()],
        None => default_folders(std::env::var_os("TMPDIR").map(PathBuf::from)),
    };
    let mut best: Option<((bool, bool), File, PathBuf)> = None;
    let mut refusals = Vec::new();
    for folder in folders {
        match open_in(&folder) {
            Ok((file, named)) => {
                let rank = (swap_file::is_in_memory(&file).unwrap_or(false), named);
                if best.as_ref().is_none_or(|(best, ..)| rank < *best) {
                    best = Some((rank, file, folder));
                }
            }
            Err(error) => refusals.push((folder, error)),
        }
    }
    if let Some((_, file, folder)) = best {
        return Ok((file, folder));
    }
    let errno = refusals.first().and_then(|(_, error)| error.raw_os_error());
    let said: Vec<String> =
        refusals.iter().map(|(folder, error)| format!("{}: {}", folder.display(), words_of(error))).collect();
    let message = format!(
        "cannot make a swap file ({}); name a folder on a disk that you may write to",
        said.join("; ")
    );
    Err(OpenError::Io { errno, message })
}

fn default_folders(tmpdir: Option<PathBuf>) -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = tmpdir.filter(|folder| folder.is_absolute()).into_iter().collect();
    for folder in ["/var/tmp", "/tmp"].map(PathBuf::from) {
        if !folders.contains(&folder) {
            folders.push(folder);
        }
    }
    folders
}

/// A new file for its owner alone, closed on exec (the standard library sees to that).
fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    options
}

/// The file, and whether it had a name for a moment.
fn open_in(folder: &Path) -> io::Result<(File, bool)> {
    // With O_EXCL nobody can give it a name later (open(2)).
    match options().custom_flags(libc::O_TMPFILE | libc::O_EXCL).open(folder) {
        Ok(file) => Ok((file, false)),
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)) =>
        {
            Ok((open_named(folder)?, true))
        }
        Err(error) => Err(error),
    }
}

/// Where the file system has no nameless files: a name that nobody else has, removed at once.
fn open_named(folder: &Path) -> io::Result<File> {
    loop {
        let path = folder.join(format!(".quire-swap-{:016x}", RandomState::new().hash_one(0)));
        match options().create_new(true).open(&path) {
            Ok(file) => return std::fs::remove_file(&path).map(|()| file),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::MetadataExt;

    fn check(file: &File, folder: &Path) {
        let metadata = file.metadata().unwrap();
        assert_eq!((metadata.nlink(), metadata.mode() & 0o777), (0, 0o600));
        assert_eq!(std::fs::read_dir(folder).unwrap().count(), 0, "no name is left");
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
        let flags = i32::from_str_radix(flags, 8).unwrap();
        assert_eq!(flags & libc::O_CLOEXEC, libc::O_CLOEXEC);
        assert_eq!(flags & libc::O_ACCMODE, libc::O_RDWR);
    }

    #[test]
    fn the_file_is_nameless_and_private_either_way() {
        let folder = tempfile::tempdir().unwrap();
        let (file, used) = open(Some(folder.path())).unwrap();
        assert_eq!(used, folder.path());
        check(&file, folder.path());
        check(&open_named(folder.path()).unwrap(), folder.path());
    }

    #[test]
    fn a_folder_that_does_not_do_is_named() {
        let Err(OpenError::Io { errno, message }) = open(Some(Path::new("/no/such/folder"))) else {
            panic!("opened")
        };
        assert_eq!(errno, Some(libc::ENOENT));
        assert!(message.contains("/no/such/folder") && message.contains("name a folder"), "{message}");
    }

    #[test]
    fn the_default_is_tmpdir_then_var_tmp() {
        let names = |tmpdir: Option<&str>| default_folders(tmpdir.map(PathBuf::from));
        let paths = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(names(None), paths(&["/var/tmp", "/tmp"]));
        assert_eq!(names(Some("/scratch")), paths(&["/scratch", "/var/tmp", "/tmp"]));
        assert_eq!(names(Some("/tmp")), paths(&["/tmp", "/var/tmp"]));
        assert_eq!(names(Some("relative")), paths(&["/var/tmp", "/tmp"]));
    }
}
