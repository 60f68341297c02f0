//! The file or device behind a kernel mapping: what it is, how long it is now, and why a page of it
//! cannot be had. Called in signal handlers too: every function here is system calls and nothing else.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::memory::{Range, page_bytes};
use super::memory_file::seals_of;
use super::mmap::{self, Request};

/// What is mapped.
pub struct Backing {
    /// Kept open, so that it can be asked; absent while so many are open that the program needs the rest.
    file: Option<File>,
    /// Absolute: the program may change its folder.
    path: Option<PathBuf>,
    device: u64,
    inode: u64,
    regular: bool,
    /// The page cache is all there is of it.
    in_memory: bool,
    /// The number of a block device.
    block: Option<u64>,
    /// Opened by its path, for writing.
    writable: bool,
    /// Asked of the kernel when first needed.
    paging: OnceLock<Paging>,
    /// A description of its own, see [`Backing::with_own`].
    own: OnceLock<Option<File>>,
}

/// How the kernel pages a file.
#[derive(Clone, Copy, Debug)]
struct Paging {
    read_ahead: u64,
    /// Open for writing.
    writable: bool,
}

/// Why a page cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The file ends before it, after so many bytes.
    Truncated(u64),
    /// The device or file system refuses, with this errno.
    Refused(i32),
    /// Nothing is wrong any more.
    Gone,
}

/// Descriptors below this number are kept in any case.
const ALWAYS_KEPT: RawFd = 32;

/// Descriptors above this number are not kept: half of what the process may have open.
fn keep_below() -> RawFd {
    // SAFETY: fills a struct on this stack.
    let limit = unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        limit.rlim_cur
    };
    RawFd::try_from(limit / 2).unwrap_or(RawFd::MAX)
}

/// What a mapping needs to know of a file (fstat(2), which costs less than the statx(2) of the standard library).
pub struct Status {
    /// Bytes of a regular file.
    pub size: u64,
    device: u64,
    inode: u64,
    kind: libc::mode_t,
    /// Of a device file: which device it is.
    number: u64,
    block_bytes: u64,
}

impl Status {
    fn of(file: &File) -> io::Result<Self> {
        // SAFETY: fills a struct on this stack.
        let (rc, found) = unsafe {
            let mut found: libc::stat = std::mem::zeroed();
            (libc::fstat(file.as_raw_fd(), &raw mut found), found)
        };
        if rc != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Status {
            size: found.st_size.cast_unsigned(),
            device: found.st_dev,
            inode: found.st_ino,
            kind: found.st_mode & libc::S_IFMT,
            number: found.st_rdev,
            block_bytes: found.st_blksize.try_into().unwrap_or(0),
        })
    }

    /// Whether it is a regular file.
    pub fn is_file(&self) -> bool {
        self.kind == libc::S_IFREG
    }

    /// Whether it is a block device.
    pub fn is_block_device(&self) -> bool {
        self.kind == libc::S_IFBLK
    }
}

/// A file open for mapping.
pub struct Opened {
    /// The file.
    pub file: File,
    /// What fstat(2) said of it.
    pub status: Status,
    path: Option<PathBuf>,
    writable: bool,
}

impl Opened {
    /// The device and the number by which a file is known, from when it was opened.
    pub fn identity(&self) -> (u64, u64) {
        (self.status.device, self.status.inode)
    }

    /// Opens a path; `writable` for a shared mapping that may be written.
    ///
    /// # Errors
    /// As open(2).
    pub fn path(path: &Path, writable: bool) -> io::Result<Self> {
        // A FIFO must be refused rather than waited for; regular files do not mind.
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let file = OpenOptions::new().read(true).write(writable).custom_flags(flags).open(path)?;
        let status = Status::of(&file)?;
        Ok(Opened { file, status, path: Some(path.to_path_buf()), writable })
    }

    /// Takes a duplicate of a descriptor of the caller's.
    ///
    /// # Errors
    /// EBADF, EMFILE.
    pub fn descriptor(fd: RawFd) -> io::Result<Self> {
        // SAFETY: a descriptor number; the kernel checks it.
        let own = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
        if own < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, nobody else's.
        Self::taken(File::from(unsafe { OwnedFd::from_raw_fd(own) }))
    }

    /// Takes a file itself.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn taken(file: File) -> io::Result<Self> {
        let status = Status::of(&file)?;
        Ok(Opened { file, status, path: None, writable: false })
    }

    /// Whether the page cache is all there is of it: a memory file, or one on tmpfs or hugetlbfs. These have seals,
    /// and lie on no device.
    fn is_in_memory(&self) -> bool {
        let no_device = libc::major(self.status.device) == 0;
        self.status.is_file() && no_device && seals_of(&self.file).is_some()
    }

    /// What stays of it beside a mapping.
    pub fn into_backing(self) -> Backing {
        let fd = self.file.as_raw_fd();
        let keep = self.path.is_none() || fd < ALWAYS_KEPT || fd < keep_below();
        Backing {
            device: self.status.device,
            inode: self.status.inode,
            regular: self.status.is_file(),
            in_memory: self.is_in_memory(),
            block: self.status.is_block_device().then_some(self.status.number),
            path: self.path.map(|path| std::path::absolute(&path).unwrap_or(path)),
            writable: self.writable,
            file: keep.then_some(self.file),
            paging: OnceLock::new(),
            own: OnceLock::new(),
        }
    }
}

impl Backing {
    /// Whether it is a regular file (or memory file), of a length that changes.
    pub fn is_regular(&self) -> bool {
        self.regular
    }

    /// Its device and inode, which no other file has while it is mapped.
    pub fn identity(&self) -> (u64, u64) {
        (self.device, self.inode)
    }

    /// The descriptor that is kept open, where one is.
    pub fn descriptor(&self) -> Option<RawFd> {
        self.file.as_ref().map(File::as_raw_fd)
    }

    /// The same without a descriptor: it is opened by the path that it has now, whenever it must be asked.
    pub fn unopened(&self) -> Backing {
        let own = || std::fs::read_link(format!("/proc/self/fd/{}", self.descriptor()?)).ok();
        let path = self.path.clone().or_else(own);
        Backing { file: None, path, paging: self.paging.clone(), own: OnceLock::new(), ..*self }
    }

    /// Does something with the file, opened again where it was not kept and is still the same one.
    ///
    /// # Errors
    /// ESTALE when another file is at its path by now; as open(2).
    pub fn with_file<T>(&self, work: impl FnOnce(&File) -> io::Result<T>) -> io::Result<T> {
        if let Some(file) = &self.file {
            return work(file);
        }
        let path = self.path.as_deref().unwrap_or(Path::new(""));
        let again = Opened::path(path, self.writable)?;
        if (again.status.device, again.status.inode) != (self.device, self.inode) {
            return Err(io::Error::from_raw_os_error(libc::ESTALE));
        }
        work(&again.file)
    }

    /// Whether it is shown by way of the page cache: not memory of a driver.
    pub fn is_cached(&self) -> bool {
        self.regular || self.block.is_some()
    }

    /// Whether its pages have a home on a disk, or behind a network: not those of a memory file, nor of
    /// a file on tmpfs or hugetlbfs, whose page cache is all there is of it.
    pub fn is_on_disk(&self) -> bool {
        self.is_cached() && !self.in_memory
    }

    /// Whether a shared mapping of it can have been stored to.
    pub fn is_writable(&self) -> bool {
        self.paging().writable
    }

    /// Bytes that the kernel reads ahead of a walk at most.
    pub fn read_ahead_bytes(&self) -> u64 {
        self.paging().read_ahead
    }

    fn paging(&self) -> Paging {
        const READ_AHEAD: u64 = 128 << 10; // VM_READAHEAD_PAGES, where sysfs does not say
        *self.paging.get_or_init(|| {
            let writable = self.with_file(|file| Ok(is_writable(file))).unwrap_or(self.writable);
            let disk = self.block.unwrap_or(self.device);
            let (major, minor) = (libc::major(disk), libc::minor(disk));
            let kept = std::fs::read_to_string(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"));
            let read_ahead = kept.ok().and_then(|text| text.trim().parse::<u64>().ok());
            Paging { read_ahead: read_ahead.map_or(READ_AHEAD, |kib| kib << 10), writable }
        })
    }

    /// Makes it at least `len` bytes long.
    ///
    /// # Errors
    /// As ftruncate(2).
    pub fn extend(&self, len: u64) -> io::Result<()> {
        self.with_file(|file| if file.metadata()?.len() < len { file.set_len(len) } else { Ok(()) })
    }

    /// Whether nobody can make it shorter (a memory file sealed with F_SEAL_SHRINK).
    pub fn cannot_shrink(&self) -> bool {
        let seals = self.with_file(|file| Ok(seals_of(file)));
        seals.is_ok_and(|seals| seals.is_some_and(|seals| seals & libc::F_SEAL_SHRINK != 0))
    }

    /// Has the page cache read just these bytes, and does not wait for them.
    pub fn will_need(&self, offset: u64, len: u64) {
        const PIECE: u64 = 128 << 10;
        // The kernel takes no more of a request than it would read ahead by itself.
        let piece = self.read_ahead_bytes().clamp(PIECE, 2 << 20);
        let _ = self.with_file(|file| {
            for at in (offset..offset + len).step_by(piece as usize) {
                fadvise(file, at, piece.min(offset + len - at), libc::POSIX_FADV_WILLNEED);
            }
            Ok(())
        });
    }

    /// As [`Backing::with_file`], by a description that nobody else uses: the kernel tells each of them once
    /// that writing back has failed, and what the daemon is told msync(2) and fsync(2) are to be told as well.
    fn with_own<T>(&self, work: impl FnOnce(&File) -> io::Result<T>) -> io::Result<T> {
        let open = || {
            let fd = self.descriptor()?;
            let path = PathBuf::from(format!("/proc/self/fd/{fd}"));
            Opened::path(&path, self.is_writable()).ok().map(|again| again.file)
        };
        match self.own.get_or_init(open) {
            Some(own) => work(own),
            None => self.with_file(work),
        }
    }

    /// Has the page cache drop bytes that nobody has mapped; those that were `stored` are written first.
    ///
    /// # Errors
    /// The errno of a failure to write any page of the file; then none is dropped. The kernel takes those
    /// that it could not write for clean: see [`Backing::store_again`].
    pub fn drop_cached(&self, offset: u64, len: u64, stored: bool) -> Result<(), i32> {
        const WRITE: u32 = libc::SYNC_FILE_RANGE_WAIT_BEFORE
            | libc::SYNC_FILE_RANGE_WRITE
            | libc::SYNC_FILE_RANGE_WAIT_AFTER;
        let (at, bytes) = (offset.cast_signed(), len.cast_signed());
        let dropped = self.with_own(|file| {
            // Also where nothing is stored here: what others have just written is not dropped while dirty.
            // SAFETY: writes what is dirty, and changes no byte.
            let written = unsafe { libc::sync_file_range(file.as_raw_fd(), at, bytes, WRITE) } == 0;
            if stored && !written {
                return Ok(Err(super::errno()));
            }
            fadvise(file, offset, len, libc::POSIX_FADV_DONTNEED);
            Ok(Ok(()))
        });
        dropped.unwrap_or(Ok(())) // it cannot be opened: nothing was dropped
    }

    /// Makes all dirty that the page cache holds of some whole pages, as if each had been stored to just now:
    /// it is written again, which what could not be written is not of itself. No byte changes.
    ///
    /// # Errors
    /// As open(2), mmap(2) and madvise(2), for instance where the file system has become read-only.
    pub fn store_again(&self, offset: u64, len: usize) -> io::Result<()> {
        let failed = io::Error::from_raw_os_error;
        self.with_own(|file| {
            let (at, bytes, wait) =
                (offset.cast_signed(), len.cast_signed() as i64, libc::SYNC_FILE_RANGE_WAIT_BEFORE);
            // SAFETY: waits for what is being written. Of failures until now nobody need be told again.
            let _ = unsafe { libc::sync_file_range(file.as_raw_fd(), at, bytes, wait) };
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let (flags, fd) = (libc::MAP_SHARED, file.as_raw_fd());
            let request = Request { address: 0, len, prot, flags, fd, offset: at };
            // SAFETY: addresses of the kernel's choice, for as long as this takes.
            let range = unsafe { mmap::map(&request) }.map_err(failed)?;
            let populated = mmap::resident(range).and_then(|pages| populate_for_writing(range, &pages));
            // SAFETY: as above; nothing refers to it.
            let unmapped = unsafe { mmap::unmap(range) };
            populated.and(unmapped).map_err(failed)
        })
    }

    /// Why the page at `offset` cannot be had, `for_writing` or for reading.
    pub fn cause(&self, offset: u64, page: u64, for_writing: bool) -> Cause {
        let found = self.with_file(|file| {
            let len = file.metadata()?.len();
            if self.regular && offset >= len.next_multiple_of(page) {
                return Ok(Cause::Truncated(len));
            }
            if file.read_at(&mut [0], offset)? == 0 {
                return Ok(Cause::Truncated(block_device_len(file).unwrap_or(len)));
            }
            if for_writing && self.regular && is_writable(file) {
                allocate(file, offset, page.min(len.saturating_sub(offset)).max(1))?;
            }
            Ok(Cause::Gone)
        });
        found.unwrap_or_else(|error| Cause::Refused(error.raw_os_error().unwrap_or(libc::EIO)))
    }

    /// The errno of touches that fail time and again though nothing is wrong with their page. A store has
    /// blocks for all of a large folio: where no room is left for the largest, that is why.
    pub fn unsaid(&self, for_writing: bool) -> i32 {
        const FOLIO_MOST: u64 = 8 << 20;
        let room = self.with_file(|file| Ok(file_system_of(file)));
        let room = room.ok().flatten().map(|found| found.f_bavail * found.f_bsize.unsigned_abs());
        let full = for_writing && room.is_some_and(|room| room < FOLIO_MOST);
        if full { libc::ENOSPC } else { libc::EIO }
    }
}

/// Takes a write fault at each page that is in memory (MADV_POPULATE_WRITE, Linux 5.14).
fn populate_for_writing(range: Range, pages: &[u8]) -> Result<(), i32> {
    let (mut done, page) = (Ok(()), page_bytes());
    let mut start = range.start;
    for run in pages.chunk_by(|one, next| one == next) {
        let part = Range { start, len: run.len() * page };
        if run[0] != 0 {
            // SAFETY: pages of the caller's; their content stays.
            done = done.and(unsafe { mmap::advise(part, libc::MADV_POPULATE_WRITE) });
        }
        start = part.end();
    }
    done
}

/// Whether a file is open for reading and writing.
fn is_writable(file: &File) -> bool {
    // SAFETY: a descriptor of ours.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    flags & libc::O_ACCMODE == libc::O_RDWR
}

/// Has blocks for a hole, as the page's first store would: the file system says why it has none.
fn allocate(file: &File, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: a descriptor of ours; keeps content and size.
    let rc = unsafe {
        libc::fallocate(file.as_raw_fd(), libc::FALLOC_FL_KEEP_SIZE, offset.cast_signed(), len.cast_signed())
    };
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        _ if rc == 0 => Ok(()),
        Some(libc::EOPNOTSUPP) => Ok(()), // a file system that cannot be asked
        _ => Err(error),
    }
}

/// A hint about some bytes (posix_fadvise(3)).
fn fadvise(file: &File, offset: u64, len: u64, advice: i32) {
    // SAFETY: a descriptor of ours; no byte of the file changes.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), offset.cast_signed(), len.cast_signed(), advice) };
}

const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// What fstatfs(2) says.
fn file_system_of(file: &File) -> Option<libc::statfs> {
    // SAFETY: fills a struct on this stack.
    let (rc, found) = unsafe {
        let mut found: libc::statfs = std::mem::zeroed();
        (libc::fstatfs(file.as_raw_fd(), &raw mut found), found)
    };
    (rc == 0).then_some(found)
}

/// Bytes of a page of a file of hugetlbfs; `None` for any other file.
pub fn huge_page_of(opened: &Opened) -> Option<usize> {
    if opened.status.block_bytes <= page_bytes() as u64 {
        return None;
    }
    let found = file_system_of(&opened.file).filter(|found| found.f_type == HUGETLBFS_MAGIC);
    found.and_then(|found| usize::try_from(found.f_bsize).ok())
}

/// The bytes of a block device (BLKGETSIZE64).
///
/// # Errors
/// As ioctl(2).
pub fn block_device_len(file: &File) -> io::Result<u64> {
    const BLKGETSIZE64: u64 = 0x8008_1272; // _IOR(0x12, 114, size_t)
    let mut len = 0u64;
    // SAFETY: the kernel writes one 64-bit number.
    let rc = unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64 as _, &raw mut len) };
    if rc == 0 { Ok(len) } else { Err(io::Error::last_os_error()) }
}
