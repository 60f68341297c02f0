//! A local file or block device, read by pread(2) and written by pwrite(2).
//!
//! Size, modification time and inode are noted at open. A read that meets the end too early, or
//! finds the file modified (looked at no more than once a millisecond, the grain of most file
//! systems' clocks is coarser), fails: pages of two versions are never mixed. A file that is
//! *replaced* by rename stays the one that was opened; a sync of one fails, as no name leads to it. Of
//! a file that is open for writing the modification time says nothing, as it is our own: only its
//! length is looked at.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::Store;
use crate::errors::{FaultCode, OpenError, StoreError, words_of};
use crate::sys::{process, thread::now_ns};
use crate::units::{ByteCount, ByteOffset};

const LOOK_NS: u64 = 1_000_000;

/// What identifies one state of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    modified_s: i64,
    modified_ns: i64,
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        Identity {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified_s: metadata.mtime(),
            modified_ns: metadata.mtime_nsec(),
        }
    }
}

/// A file that is open for reading, or for reading and writing.
#[derive(Debug)]
pub struct FileStore {
    file: File,
    writable: bool,
    label: String,
    /// Its path from the root; none where the path is one of the process's own descriptors.
    path: Option<PathBuf>,
    size: ByteCount,
    identity: Identity,
    looked_ns: AtomicU64,
    fetched: AtomicU64,
    closed: AtomicBool,
    /// Something was written that no sync has followed.
    written: AtomicBool,
}

impl FileStore {
    /// Opens a regular file or a block device.
    ///
    /// # Errors
    /// `OpenError::Io` with the errno; `Format` for a directory, a pipe or a terminal.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        Self::open_with(path, false)
    }

    /// As [`FileStore::open`], for writing too: its size stays what it is.
    ///
    /// # Errors
    /// As [`FileStore::open`].
    pub fn open_writable(path: &Path) -> Result<Self, OpenError> {
        Self::open_with(path, true)
    }

    fn open_with(path: &Path, writable: bool) -> Result<Self, OpenError> {
        let label = path.display().to_string();
        let refused = |error: io::Error| OpenError::Io {
            errno: error.raw_os_error(),
            message: format!("cannot open {label}: {}", words_of(&error)),
        };
        // O_NONBLOCK: a pipe without a writer would make open(2) wait for one.
        let mut options = OpenOptions::new();
        options.read(true).write(writable).custom_flags(libc::O_NONBLOCK);
        let mut file = options.open(path).map_err(refused)?;
        let metadata = file.metadata().map_err(refused)?;
        let kind = metadata.file_type();
        let size = if kind.is_file() {
            metadata.size()
        } else if kind.is_block_device() {
            file.seek(SeekFrom::End(0)).map_err(refused)?
        } else {
            return Err(OpenError::Format(format!(
                "{label} is neither a file nor a block device: it cannot be read at an offset"
            )));
        };
        Ok(FileStore {
            file,
            writable,
            size: ByteCount(size),
            identity: Identity::of(&metadata),
            label,
            path: std::path::absolute(path).ok().filter(|path| !names_descriptor(path)),
            looked_ns: AtomicU64::new(0),
            fetched: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            written: AtomicBool::new(false),
        })
    }

    /// Identifies the file's state at open: device, inode, size and modification time.
    pub fn version(&self) -> String {
        let id = &self.identity;
        format!("{:x}-{:x}-{:x}-{}.{:09}", id.device, id.inode, self.size.0, id.modified_s, id.modified_ns)
    }

    /// Fails when the file was modified since it was opened.
    fn look(&self, offset: ByteOffset, always: bool) -> Result<(), StoreError> {
        let now = now_ns();
        if !always && now - self.looked_ns.load(Ordering::Relaxed).min(now) < LOOK_NS {
            return Ok(());
        }
        let metadata = self.file.metadata().map_err(|error| self.io_error(offset, &error))?;
        self.require_open(offset)?; // it would be that of another file
        let identity = Identity::of(&metadata);
        if identity.size < self.identity.size {
            let message = format!(
                "{} was truncated: it had {} bytes at open and has {} now",
                self.label, self.identity.size, identity.size
            );
            return Err(StoreError::new(FaultCode::Truncated, offset, message));
        }
        if !self.writable && identity != self.identity {
            let message = format!("{} was modified after it was opened: open it again", self.label);
            return Err(StoreError::new(FaultCode::Changed, offset, message));
        }
        self.looked_ns.store(now, Ordering::Relaxed);
        Ok(())
    }

    /// Fails when the path leads to another file by now. One that leads nowhere was unlinked, and who
    /// does that means it.
    fn require_same(&self) -> Result<(), StoreError> {
        let found = self.path.as_ref().and_then(|path| std::fs::metadata(path).ok());
        let Some(found) = found.map(|metadata| Identity::of(&metadata)) else { return Ok(()) };
        let opened = &self.identity;
        if (found.device, found.inode) == (opened.device, opened.inode) {
            return Ok(());
        }
        let message = format!(
            "{} was replaced: inode {} was opened and took what was written, and the path names inode {} \
             now; copy the array to a new file, or open the new one and write there",
            self.label, opened.inode, found.inode
        );
        Err(StoreError::new(FaultCode::Changed, ByteOffset(0), message))
    }

    fn require_open(&self, offset: ByteOffset) -> Result<(), StoreError> {
        if self.closed.load(Ordering::Acquire) {
            let message = format!("{} is closed: open it again", self.label);
            return Err(StoreError::new(FaultCode::Closed, offset, message));
        }
        Ok(())
    }

    fn io_error(&self, offset: ByteOffset, error: &io::Error) -> StoreError {
        StoreError::from_io(offset, &format!("reading {}", self.label), error)
    }
}

/// Whether a path is that of a descriptor, which names another file when it is used again.
fn names_descriptor(path: &Path) -> bool {
    path.starts_with("/proc") || path.starts_with("/dev/fd")
}

impl Store for FileStore {
    fn size(&self) -> ByteCount {
        self.size
    }

    fn label(&self) -> &str {
        &self.label
    }

    fn read_at(&self, offset: ByteOffset, buf: &mut [u8]) -> Result<(), StoreError> {
        let mut done = 0;
        while done < buf.len() {
            self.require_open(offset)?;
            match self.file.read_at(&mut buf[done..], offset.0 + done as u64) {
                Ok(0) => {
                    self.require_open(offset)?;
                    let at = ByteOffset(offset.0 + done as u64);
                    self.look(at, true)?;
                    let message =
                        format!("{} ends before the {} bytes it had at open", self.label, self.size);
                    return Err(StoreError::new(FaultCode::Truncated, at, message));
                }
                Ok(got) => done += got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.io_error(ByteOffset(offset.0 + done as u64), &error)),
            }
        }
        self.fetched.fetch_add(buf.len() as u64, Ordering::Relaxed);
        self.look(offset, false)
    }

    fn read_only(&self) -> Option<String> {
        (!self.writable).then(|| "it was opened for reading only".into())
    }

    fn write_at(&self, offset: ByteOffset, bytes: &[u8]) -> Result<(), StoreError> {
        let mut done = 0;
        self.written.store(true, Ordering::Release);
        while done < bytes.len() {
            self.require_open(offset)?;
            let at = ByteOffset(offset.0 + done as u64);
            let failed =
                |error: &io::Error| StoreError::from_io(at, &format!("writing {}", self.label), error);
            match self.file.write_at(&bytes[done..], at.0) {
                Ok(0) => return Err(failed(&io::Error::from_raw_os_error(libc::EIO))),
                Ok(written) => done += written,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(&error)),
            }
        }
        // A file that was truncated has grown again by this write, with zeros in between.
        self.look(offset, false)
    }

    fn sync(&self) -> Result<(), StoreError> {
        let failed =
            |error| StoreError::from_io(ByteOffset(0), &format!("synchronising {}", self.label), &error);
        self.require_open(ByteOffset(0))?;
        let written = self.written.swap(false, Ordering::AcqRel);
        let synced = self.file.sync_data().map_err(failed);
        let synced = synced.and_then(|()| if written { self.require_same() } else { Ok(()) });
        synced.inspect_err(|_| self.written.store(true, Ordering::Release))
    }

    fn bytes_fetched(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        process::let_go(&self.file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::process::Command;

    fn file_of(bytes: &[u8]) -> (tempfile::NamedTempFile, FileStore) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let store = FileStore::open(file.path()).unwrap();
        (file, store)
    }

    #[test]
    fn reads_any_range() {
        let bytes: Vec<u8> = (0..10_000u32).map(|i| (i % 251) as u8).collect();
        let (_file, store) = file_of(&bytes);
        let mut buf = vec![0; 777];
        store.read_at(ByteOffset(4001), &mut buf).unwrap();
        assert_eq!(buf, bytes[4001..4778]);
        assert_eq!((store.size(), store.bytes_fetched()), (ByteCount(10_000), 777));
    }

    #[test]
    fn truncation_is_told_from_other_changes() {
        let (file, store) = file_of(&[1; 9000]);
        file.as_file().set_len(5000).unwrap();
        let error = store.read_at(ByteOffset(4096), &mut [0; 4096]).unwrap_err();
        assert_eq!((error.code, error.offset), (FaultCode::Truncated, ByteOffset(5000)));
        let (mut file, store) = file_of(&[1; 9000]);
        file.write_all(b"more").unwrap();
        let error = store.read_at(ByteOffset(0), &mut [0; 16]).unwrap_err();
        assert_eq!(error.code, FaultCode::Changed);
    }

    #[test]
    fn what_is_written_is_read() {
        let (file, store) = file_of(&[1; 9000]);
        let refused = store.write_at(ByteOffset(0), b"x").unwrap_err();
        assert_eq!(refused.errno, Some(libc::EBADF));
        let store = FileStore::open_writable(file.path()).unwrap();
        assert_eq!(store.read_only(), None);
        store.write_at(ByteOffset(8998), b"ab").unwrap();
        store.sync().unwrap();
        let mut buf = [0; 3];
        store.read_at(ByteOffset(8997), &mut buf).unwrap();
        assert_eq!(&buf, b"\x01ab");
    }

    #[test]
    fn a_file_that_was_replaced_is_not_synchronised() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("a"), folder.path().join("b"));
        std::fs::write(&path, [1; 9]).unwrap();
        std::fs::write(&other, [2; 9]).unwrap();
        let store = FileStore::open_writable(&path).unwrap();
        store.write_at(ByteOffset(0), b"x").unwrap();
        store.sync().unwrap();
        std::fs::rename(&other, &path).unwrap();
        store.sync().unwrap(); // what was written before was in the file that went
        store.write_at(ByteOffset(1), b"y").unwrap();
        let error = store.sync().unwrap_err();
        assert_eq!(error.code, FaultCode::Changed);
        assert!(error.message.contains("was replaced"), "{error}");
        std::fs::remove_file(&path).unwrap();
        store.sync().unwrap();
    }

    #[test]
    fn a_closed_file_holds_nothing_open() {
        let (file, _) = file_of(&[1; 9000]);
        let store = FileStore::open_writable(file.path()).unwrap();
        store.read_at(ByteOffset(0), &mut [0; 10]).unwrap();
        let fd = store.file.as_raw_fd();
        let opened = || std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap();
        assert_eq!(opened(), file.path().canonicalize().unwrap());
        store.close();
        store.close();
        assert_eq!(opened(), Path::new("/dev/null"));
        let refused =
            [store.read_at(ByteOffset(0), &mut [0; 10]), store.write_at(ByteOffset(0), b"x"), store.sync()];
        assert!(refused.iter().all(|result| result.as_ref().unwrap_err().code == FaultCode::Closed));
        assert_eq!(std::fs::read(file.path()).unwrap(), [1; 9000]);
    }

    #[test]
    fn what_is_no_file_is_refused() {
        assert!(matches!(FileStore::open(Path::new("/")), Err(OpenError::Format(_))));
        assert!(matches!(FileStore::open(Path::new("/dev/null")), Err(OpenError::Format(_))));
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        assert!(matches!(FileStore::open(&pipe), Err(OpenError::Format(_))), "without waiting for a writer");
        let missing = FileStore::open(Path::new("/no/such/file"));
        assert!(matches!(missing, Err(OpenError::Io { errno: Some(libc::ENOENT), .. })));
    }
}
