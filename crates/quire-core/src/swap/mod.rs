//! The swap store: where pages go that have no other home (anonymous memory, private copies).
//!
//! Pages are put into a nameless file, each time into a new *slot*, a run of 4 KiB blocks: never in
//! place, so that a put that fails leaves the older copy whole. Pages of zeros take no space. See
//! [`slots`] for the blocks, [`codec`] for what a slot holds, [`seal`] for encryption.
//!
//! Calls may come from any thread at the same time, also from a signal handler that interrupted code
//! outside the core. No lock is held while the file is read or written; the caller keeps a slot from
//! being freed while it reads it.
//!
//! **Space.** At most `limit` bytes are in slots; the disk space of freed slots is used again, and is
//! given back once a sixteenth of the limit (4 to 64 MiB) waits. So the file takes at most the limit
//! and that much more. A file system that cannot punch holes keeps the most it once had.
//!
//! **Damage.** A page comes back as it was put, or as an error: each slot's check (xxh64 of 64 bits, or
//! of the authentication tag where pages are encrypted) is kept in memory and seeded with its place, so
//! bytes that changed, that are another slot's or that are older are found. A disk that fails after the
//! kernel took the bytes is told to nobody who does not sync, and nothing here does: what was lost so is
//! met when the page is read again.
//!
//! **Fork.** Swap, file and key are the parent's. [`Swap::after_fork_in_child`] makes it usable in the
//! child for reading: [`Swap::get`] works there for as long as the parent has not freed the slot, since
//! freed blocks are used for other pages. [`Swap::put`] is refused there (it would overwrite the
//! parent's pages, and use a nonce twice), and [`Swap::free`] does nothing.

mod codec;
mod file;
mod seal;
mod slots;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::buffers;
use crate::errors::{FaultCode, MapError, OpenError, StoreError, words_of};
use crate::sys::fork::ForkMutex;
use crate::sys::locked::OwnerMark;
use crate::units::{ByteCount, ByteOffset};

pub use codec::Compression;
pub use file::SwapFile;
pub use slots::{BLOCK_BYTES, SwapSlot};

use codec::{Codec, Damage, Draft, HEADER_BYTES, blocks_of, plain_check};
use slots::{Run, SLOT_BLOCKS_MAX, Slots};

/// The largest page that a slot holds.
pub const PAGE_BYTES_MAX: usize = SLOT_BLOCKS_MAX as usize * BLOCK_BYTES as usize - HEADER_BYTES;
/// Freed blocks that wait for new slots before their disk space is given back.
const BACKED_MIN: u64 = (4 << 20) / BLOCK_BYTES;
const BACKED_MAX: u64 = (64 << 20) / BLOCK_BYTES;
const BACKED_SHARE: u64 = 16;
/// Holes punched by one call.
const PUNCHES_MAX: usize = 8;

/// What a swap is opened with.
#[derive(Clone, Debug)]
pub struct SwapOptions {
    /// Where the file goes; when absent `TMPDIR`, `/var/tmp` or `/tmp`, the first that is on a disk.
    pub folder: Option<PathBuf>,
    /// Bytes of slots that may be in use.
    pub limit: ByteCount,
    /// How pages are made smaller.
    pub compression: Compression,
    /// Whether pages are encrypted, with a key that never leaves this process's locked memory.
    pub encrypt: bool,
}

/// A swap file and the slots in it.
pub struct Swap {
    file: Box<dyn SwapFile>,
    /// What it was opened with; the folder is the one that was chosen.
    folder: PathBuf,
    limit: ByteCount,
    slots: ForkMutex<Slots>,
    codec: Codec,
    owner: OwnerMark,
    /// Cleared when the file system cannot give space back.
    punches: AtomicBool,
}

impl Swap {
    /// Makes a swap file.
    ///
    /// # Errors
    /// When no folder takes one, or no memory can be locked for the key.
    pub fn open(options: &SwapOptions) -> Result<Self, OpenError> {
        let (file, folder) = file::open(options.folder.as_deref())?;
        Swap::with_file(Box::new(file), folder, options)
    }

    /// A swap in a file of the caller's, which begins empty; `folder` is what errors name.
    ///
    /// # Errors
    /// When no memory can be locked for the key.
    pub fn with_file(
        file: Box<dyn SwapFile>,
        folder: PathBuf,
        options: &SwapOptions,
    ) -> Result<Self, OpenError> {
        let owner = OwnerMark::new().map_err(|error| OpenError::Io {
            errno: error.raw_os_error(),
            message: format!("cannot map a page for the swap in {}: {}", folder.display(), words_of(&error)),
        })?;
        Ok(Swap {
            file,
            folder,
            limit: options.limit,
            slots: ForkMutex::new(Slots::default()),
            codec: Codec::new(options.compression, options.encrypt)?,
            owner,
            punches: AtomicBool::new(true),
        })
    }

    /// Stores a page, in a slot that was free.
    ///
    /// # Errors
    /// `SwapFull` when the limit or the disk leaves no room; `Io`. Nothing is stored then.
    pub fn put(&self, bytes: &[u8]) -> Result<SwapSlot, StoreError> {
        if !self.owner.is_owner() {
            let message = "the swap belongs to the parent of this process: open one here";
            return Err(StoreError::new(FaultCode::Closed, ByteOffset(0), message));
        }
        if is_zero(bytes) {
            return Ok(SwapSlot::ZERO);
        }
        if bytes.len() > PAGE_BYTES_MAX {
            let message =
                format!("a page of {} bytes does not fit a swap slot: use a smaller granule", bytes.len());
            return Err(StoreError {
                errno: Some(libc::EFBIG),
                ..StoreError::new(FaultCode::Io, ByteOffset(0), message)
            });
        }
        if self.codec.is_plain() {
            return self.put_plain(bytes);
        }
        let want = self.codec.buffer_bytes(bytes.len());
        let mut buffer = buffers::take(ByteCount(want as u64)).map_err(|error| no_buffer(&error))?;
        let space = buffer.slice_mut(want);
        let slot = match self.codec.pack(bytes, space) {
            Some(draft) => self.put_packed(draft, space),
            None => self.put_plain(bytes),
        };
        buffers::give(buffer);
        slot
    }

    fn put_plain(&self, bytes: &[u8]) -> Result<SwapSlot, StoreError> {
        let run = self.allocate(blocks_of(bytes.len()))?;
        let check = plain_check(run.start, bytes);
        self.write(run, bytes)?;
        Ok(SwapSlot::new(run, false, check))
    }

    fn put_packed(&self, draft: Draft, buffer: &mut [u8]) -> Result<SwapSlot, StoreError> {
        let run = self.allocate(draft.blocks())?;
        let Some(check) = self.codec.seal(draft, run.start, buffer) else {
            self.slots.lock().release(run);
            return Err(StoreError::new(
                FaultCode::Io,
                run.offset(),
                "a page could not be encrypted for swap",
            ));
        };
        self.write(run, &buffer[..run.bytes() as usize])?;
        Ok(SwapSlot::new(run, true, check))
    }

    /// Fills `buf`, which is as long as what was put.
    ///
    /// # Errors
    /// `Io`, `Truncated`; `Checksum` when the bytes on the disk are not those that were put; `Corrupt`
    /// when `buf` has another length. What is in `buf` is then unspecified.
    pub fn get(&self, slot: SwapSlot, buf: &mut [u8]) -> Result<(), StoreError> {
        if slot == SwapSlot::ZERO {
            buf.fill(0);
            return Ok(());
        }
        let run = slot.run();
        if slot.is_packed() {
            return self.get_packed(slot, buf);
        }
        if blocks_of(buf.len()) != run.len {
            return Err(self.damaged(run, Damage::Length(run.bytes() as usize)));
        }
        self.read(run, buf)?;
        if plain_check(run.start, buf) != slot.check() {
            return Err(self.damaged(run, Damage::Changed));
        }
        Ok(())
    }

    fn get_packed(&self, slot: SwapSlot, buf: &mut [u8]) -> Result<(), StoreError> {
        let run = slot.run();
        let mut buffer = buffers::take(ByteCount(run.bytes())).map_err(|error| no_buffer(&error))?;
        let space = buffer.slice_mut(run.bytes() as usize);
        let result = self.read(run, space).and_then(|()| {
            let opened = self.codec.open(run.start, slot.check(), space, buf);
            opened.map_err(|damage| self.damaged(run, damage))
        });
        buffers::give(buffer);
        result
    }

    /// Ends a slot that nobody reads any more. Freeing one twice stops the process: its blocks may be
    /// another page's by then.
    pub fn free(&self, slot: SwapSlot) {
        if slot == SwapSlot::ZERO || !self.owner.is_owner() {
            return;
        }
        self.slots.lock().release(slot.run());
        let share = self.limit().0 / BLOCK_BYTES / BACKED_SHARE;
        self.give_back(share.clamp(BACKED_MIN, BACKED_MAX));
    }

    /// Bytes of all slots in use.
    pub fn used(&self) -> ByteCount {
        ByteCount(self.slots.lock().used() * BLOCK_BYTES)
    }

    /// Bytes of slots that may be in use.
    pub fn limit(&self) -> ByteCount {
        self.limit
    }

    /// Where the file is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Bytes of buffers that a put or get of `read` bytes may hold beside the caller's; no call holds
    /// more for a shorter page.
    pub fn buffer_bytes(&self, read: ByteCount) -> ByteCount {
        ByteCount(self.codec.buffer_bytes(read.as_usize()) as u64 + self.codec.workspace_bytes())
    }

    /// Bytes that stay allocated between calls: the codec's workspaces, at most.
    pub fn standing_bytes(&self) -> ByteCount {
        ByteCount(self.codec.standing_bytes())
    }

    /// Makes the swap readable in the child of a fork; see the module's text.
    ///
    /// # Safety
    /// Only in the child of a fork while it has one thread.
    #[allow(unsafe_code)]
    pub unsafe fn after_fork_in_child(&self) {
        // SAFETY: one thread (contract); the parent's sets are leaked, and are of no use here.
        unsafe {
            self.slots.replace_in_child(Slots::default());
            self.codec.after_fork_in_child();
        }
    }

    fn allocate(&self, blocks: u64) -> Result<Run, StoreError> {
        let limit = self.limit();
        let mut slots = self.slots.lock();
        let run = slots.allocate(blocks, limit.0 / BLOCK_BYTES);
        let used = slots.used() * BLOCK_BYTES;
        drop(slots);
        run.ok_or_else(|| {
            let message = format!(
                "swap is full: {used} of at most {limit} bytes in {} are in use and a page needs {} more; \
                 give a larger limit (quire.Swap), or close mappings or delete arrays that are swapped out",
                self.folder.display(),
                blocks * BLOCK_BYTES
            );
            full(ByteOffset(used), message)
        })
    }

    /// Writes a slot; frees it again when that fails.
    fn write(&self, run: Run, bytes: &[u8]) -> Result<(), StoreError> {
        let mut written = self.write_all(run.offset(), bytes);
        while let Err((_, error)) = &written
            && is_disk_full(error)
            && self.give_back(1)
        {
            written = self.write_all(run.offset(), bytes);
        }
        written.map_err(|(at, error)| {
            self.slots.lock().release(run);
            if is_disk_full(&error) {
                let (folder, limit) = (self.folder.display(), self.limit());
                let message = format!(
                    "swap is full: the disk of {folder} has no room left ({}), within the limit of \
                     {limit} bytes; free space there, or swap to a folder on another disk",
                    words_of(&error)
                );
                return full(at, message);
            }
            StoreError::from_io(at, &format!("writing to swap in {}", self.folder.display()), &error)
        })
    }

    fn write_all(&self, offset: ByteOffset, bytes: &[u8]) -> Result<(), (ByteOffset, io::Error)> {
        let mut done = 0;
        while done < bytes.len() {
            let at = ByteOffset(offset.0 + done as u64);
            match self.file.write_at(&bytes[done..], at.0) {
                Ok(0) => return Err((at, io::Error::from_raw_os_error(libc::EIO))),
                Ok(wrote) => done += wrote.min(bytes.len() - done),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err((at, error)),
            }
        }
        Ok(())
    }

    fn read(&self, run: Run, buf: &mut [u8]) -> Result<(), StoreError> {
        let what = || format!("reading from swap in {}", self.folder.display());
        let mut done = 0;
        while done < buf.len() {
            let at = ByteOffset(run.offset().0 + done as u64);
            match self.file.read_at(&mut buf[done..], at.0) {
                Ok(0) => {
                    let message = format!("{}: the file ends before the page: the page is lost", what());
                    return Err(StoreError::new(FaultCode::Truncated, at, message));
                }
                Ok(got) => done += got.min(buf.len() - done),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(StoreError::from_io(at, &what(), &error)),
            }
        }
        Ok(())
    }

    /// Gives all disk space back at once, when no slot will be read any more: the file itself ends with
    /// `self`.
    pub fn end(&self) {
        if self.owner.is_owner() {
            // A file system that cannot, gives it back with the file.
            let _ = self.file.punch(0, self.limit().0.saturating_add(BACKED_MAX * BLOCK_BYTES).min(1 << 46));
        }
    }

    /// Gives back disk space of freed slots when `least` blocks or more still take some; whether it did.
    fn give_back(&self, least: u64) -> bool {
        if !self.punches.load(Ordering::Relaxed) {
            return false;
        }
        let runs = self.slots.lock().begin_give_back(least, PUNCHES_MAX);
        if runs.is_empty() {
            return false;
        }
        let done = runs.iter().all(|run| self.file.punch(run.offset().0, run.bytes()).is_ok());
        if !done {
            self.punches.store(false, Ordering::Relaxed);
        }
        self.slots.lock().gave_back(&runs, done);
        done
    }

    fn damaged(&self, run: Run, damage: Damage) -> StoreError {
        let folder = self.folder.display();
        let (code, message) = match damage {
            Damage::Changed => (
                FaultCode::Checksum,
                format!("a page in swap in {folder} is not as it was written: it is lost; check that disk"),
            ),
            Damage::Length(len) => {
                (FaultCode::Corrupt, format!("a slot of swap in {folder} holds {len} bytes, not as asked"))
            }
            Damage::NoMemory => return no_memory(run.offset(), "to decode a page from swap"),
        };
        StoreError::new(code, run.offset(), message)
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    // By chunks, so that the compiler uses vectors and the first bytes decide in most cases.
    bytes.chunks(256).all(|chunk| chunk.iter().fold(0, |any, byte| any | byte) == 0)
}

/// No block left, over the user's quota, or at the largest file there may be (RLIMIT_FSIZE).
fn is_disk_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG))
}

fn full(offset: ByteOffset, message: String) -> StoreError {
    StoreError { code: FaultCode::SwapFull, offset, errno: Some(libc::ENOSPC), message, part: None }
}

fn no_memory(offset: ByteOffset, what: &str) -> StoreError {
    let message = format!("no memory {what}; free some");
    StoreError { code: FaultCode::Io, offset, errno: Some(libc::ENOMEM), message, part: None }
}

fn no_buffer(error: &MapError) -> StoreError {
    no_memory(ByteOffset(0), &format!("for a buffer to swap a page with ({error})"))
}

#[cfg(test)]
mod tests;
