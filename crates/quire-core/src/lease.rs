//! Leases of names of shared memory: the way in and out that nothing stands in.
//!
//! The format of records and the rules of their locks are those of `quire.shared_records` and
//! `quire.shared_names`, which do all that is not done here: make records, take away what is left
//! of killed processes, and say what stands in the way.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::sys::backing::Opened;
use crate::sys::{memory_file, record_lock};

const MAGIC: &[u8; 8] = b"quireSM1";
const HEADER_BYTES: usize = 64;
const SLOT_BYTES: usize = 16;
const PAGE_BYTES: usize = 4096;
const HOLDERS_TRIED_MAX: usize = 4;
const NEW_SLOTS_MAX: usize = 8;

/// Who holds a segment: what a slot says, but the descriptor.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Holder {
    /// The PID namespace; 0 where it is not known.
    pub namespace: u64,
    /// The process.
    pub process: u32,
}

/// What tells one memory file from another.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Bytes.
    pub size: u64,
    /// As of stat(2).
    pub device: u64,
    /// As of stat(2).
    pub inode: u64,
}

/// A segment that was attached to.
pub struct Attached {
    /// The record; it has the lock on the slot.
    pub record: File,
    /// Number of the slot.
    pub slot: u64,
    /// Who has it. Whom a process number leads to is in the same PID namespace, so it is his.
    pub holder: Holder,
    /// The memory.
    pub memory: Opened,
    /// What it is.
    pub identity: Identity,
}

/// Opens the memory that a record leads to, and locks a slot in it.
///
/// `None` where anything is in the way, and nothing was done.
pub fn attach(path: &Path, user: u32, process: u32, writable: bool) -> Option<Attached> {
    let record = open_record(path)?;
    let mut data = [0; PAGE_BYTES];
    let count = record.read_at(&mut data, 0).ok().filter(|&count| count < PAGE_BYTES)?;
    let slots = data[..count].get(HEADER_BYTES..)?.chunks_exact(SLOT_BYTES);
    if !data.starts_with(MAGIC) {
        return None;
    }
    let identity = Identity { size: word(&data, 8), device: word(&data, 16), inode: word(&data, 24) };
    let numbers = |held: bool| {
        let slots = slots.clone().enumerate();
        slots.filter(move |(_, slot)| is_held(slot) == held).map(|(number, _)| number)
    };
    let slot_at = |number: usize| slots.clone().nth(number);
    let opened = |number| Some((number, open_memory(slot_at(number)?, process, identity, writable)?));
    let (other, memory) = numbers(true).take(HOLDERS_TRIED_MAX).find_map(opened)?;
    // Free ones first, then those of the dead, whose locks are gone.
    let dead = numbers(true).filter(|&number| number != other);
    let new = slots.len()..slots.len() + NEW_SLOTS_MAX;
    let slot = numbers(false).chain(dead).chain(new).find(|&number| {
        matches!(
            record_lock::set(&record, libc::F_WRLCK, offset_of(number as u64), SLOT_BYTES as u64),
            Ok(true)
        )
    })?;
    // Only now is it sure that nobody takes the record away: if it has its name, it keeps it.
    let found = record.metadata().ok()?;
    let ours = found.is_file() && found.uid() == user && found.nlink() > 0;
    let holder = Holder { namespace: word(slot_at(other)?, 0), process };
    ours.then_some(Attached { record, slot: slot as u64, holder, memory, identity })
}

/// Makes the record of a name that nobody has, for a memory file of the caller's; the first slot is its.
///
/// It is locked before anything is written: until then it has nothing that another could take for
/// a segment, and whoever took it away meanwhile is seen by its having no name.
///
/// `None` where anything is in the way, and the name is not ours.
pub fn make(path: &Path, user: u32, me: Holder, memory: &File) -> Option<(File, Identity)> {
    let identity = identity_of(&memory.metadata().ok()?);
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600).custom_flags(flags);
    let record = options.open(path).ok()?;
    match record_lock::set(&record, libc::F_WRLCK, offset_of(0), SLOT_BYTES as u64) {
        Ok(true) if write_first(&record, user, me, memory, identity) => return Some((record, identity)),
        Ok(false) => return None, // another uses it, or takes it away
        Ok(true) | Err(_) => {}
    }
    let _ = take_away(&record, path); // nothing is to be left of it; the next to make one tries again
    None
}

/// Writes a new record with its first slot, which is locked; false where it cannot be, or has no name.
fn write_first(record: &File, user: u32, me: Holder, memory: &File, identity: Identity) -> bool {
    if !record.metadata().is_ok_and(|found| found.uid() == user && found.nlink() > 0) {
        return false;
    }
    let mut said = [0; HEADER_BYTES + SLOT_BYTES];
    said[..8].copy_from_slice(MAGIC);
    for (at, word) in [(8, identity.size), (16, identity.device), (24, identity.inode)] {
        said[at..at + 8].copy_from_slice(&word.to_ne_bytes());
    }
    said[HEADER_BYTES..].copy_from_slice(&slot_of(me, memory.as_raw_fd()));
    record.write_all_at(&said, 0).is_ok()
}

/// Says in a slot by which descriptor of the process others can open the memory.
///
/// # Errors
/// As write(2).
pub fn show(record: &File, slot: u64, me: Holder, descriptor: i32) -> io::Result<()> {
    record.write_all_at(&slot_of(me, descriptor), offset_of(slot))
}

fn slot_of(me: Holder, descriptor: i32) -> [u8; SLOT_BYTES] {
    let mut said = [0; SLOT_BYTES];
    said[..8].copy_from_slice(&me.namespace.to_ne_bytes());
    said[8..12].copy_from_slice(&me.process.to_ne_bytes());
    said[12..].copy_from_slice(&descriptor.to_ne_bytes());
    said
}

/// Takes a record away from those who have slots in it.
///
/// Under the lock of its header nobody else does: if it has its name then, the path leads to it.
///
/// `None` where nobody has any, or anything is in the way, and nothing was done.
pub fn unlink(path: &Path, user: u32) -> Option<()> {
    let record = open_record(path)?;
    let mut header = [0; HEADER_BYTES];
    record.read_exact_at(&mut header, 0).ok()?;
    if !header.starts_with(MAGIC)
        || !record_lock::set(&record, libc::F_WRLCK, 0, HEADER_BYTES as u64).ok()?
        || !record_lock::is_held(&record).ok()?
    {
        return None;
    }
    let found = record.metadata().ok()?;
    let ours = found.is_file() && found.uid() == user && found.nlink() > 0;
    ours.then(|| std::fs::remove_file(path).ok()).flatten()
}

fn open_record(path: &Path) -> Option<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).ok()
}

/// Gives a slot back, and closes the record; the last takes it away. Without a slot of his own, who
/// leaves shares another's.
///
/// One that is `shared`, as it was open at a fork, may be open in the child by the same opening,
/// whose locks are then the child's too: so it is closed with its lock, which ends with the last
/// who has it open, and opened anew to see whether anybody has.
///
/// # Errors
/// As write(2), fcntl(2), unlink(2): without its lock the slot is nobody's in any case.
pub fn leave(record: File, slot: Option<u64>, path: &Path, shared: bool) -> io::Result<()> {
    let found = record.metadata()?;
    if found.nlink() == 0 {
        return Ok(()); // nobody comes to it any more
    }
    let written = slot.map_or(Ok(()), |slot| record.write_all_at(&[0; SLOT_BYTES], offset_of(slot)));
    if shared {
        drop(record);
        let again = open_record(path).ok_or_else(io::Error::last_os_error)?;
        let same = again.metadata()?;
        if (same.dev(), same.ino()) == (found.dev(), found.ino()) {
            take_away(&again, path)?;
        }
    } else {
        record_lock::set(&record, libc::F_UNLCK, 0, 0)?;
        take_away(&record, path)?;
    }
    written
}

/// Removes a record in which nobody else has a slot, if it has its name still.
fn take_away(record: &File, path: &Path) -> io::Result<()> {
    if record_lock::set(record, libc::F_WRLCK, 0, 0)? && record.metadata()?.nlink() > 0 {
        std::fs::remove_file(path)?;
    }
    Ok(())
}

/// Opens the memory file through a holder, if it is there.
fn open_memory(slot: &[u8], own: u32, identity: Identity, writable: bool) -> Option<Opened> {
    let process = u32::from_ne_bytes(slot[8..12].try_into().ok()?);
    let descriptor = u32::from_ne_bytes(slot[12..16].try_into().ok()?);
    let path = if process == own {
        format!("/proc/self/fd/{descriptor}")
    } else {
        format!("/proc/{process}/fd/{descriptor}")
    };
    // Looked at before it is opened: to open a device in its place may do something.
    if identity_of(&std::fs::metadata(&path).ok()?) != identity {
        return None;
    }
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let memory = OpenOptions::new().read(true).write(writable).custom_flags(flags).open(path).ok()?;
    let memory = Opened::taken(memory).ok()?;
    let same = memory.status.size == identity.size && memory.identity() == (identity.device, identity.inode);
    (same && memory_file::is_sealed(&memory.file)).then_some(memory)
}

fn identity_of(found: &std::fs::Metadata) -> Identity {
    Identity { size: found.len(), device: found.dev(), inode: found.ino() }
}

fn is_held(slot: &[u8]) -> bool {
    slot[8..12] != [0; 4]
}

fn word(data: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(std::array::from_fn(|place| data[at + place]))
}

fn offset_of(slot: u64) -> u64 {
    HEADER_BYTES as u64 + slot * SLOT_BYTES as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user() -> u32 {
        std::fs::metadata("/proc/self").unwrap().uid()
    }

    fn me() -> Holder {
        Holder { namespace: 1, process: std::process::id() }
    }

    #[test]
    fn a_record_is_made_once_and_goes_with_its_last_slot() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("name.x");
        let memory = File::create_new(folder.path().join("memory")).unwrap();
        let (record, identity) = make(&path, user(), me(), &memory).unwrap();
        let data = std::fs::read(&path).unwrap();
        assert_eq!(data.len(), HEADER_BYTES + SLOT_BYTES);
        assert_eq!(word(&data, 24), identity.inode);
        assert!(make(&path, user(), me(), &memory).is_none());
        // A memory file is sealed, and this one is none: nothing is attached, and no slot is taken.
        assert!(attach(&path, user(), me().process, true).is_none());
        assert_eq!(std::fs::read(&path).unwrap(), data);
        leave(record, Some(0), &path, false).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn who_attaches_is_where_the_one_is_whom_he_met() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("name.z");
        let memory = memory_file::make_sealed(c"z", 4096, 0o600).unwrap();
        let (first, identity) = make(&path, user(), me(), &memory.file).unwrap();
        let found = attach(&path, user(), me().process, true).unwrap();
        assert!(found.holder == me() && found.identity == identity && found.slot == 1);
        show(&found.record, found.slot, found.holder, found.memory.file.as_raw_fd()).unwrap();
        leave(first, Some(0), &path, false).unwrap();
        assert!(attach(&path, user(), me().process, false).unwrap().identity == identity);
        assert!(unlink(&path, user() + 1).is_none() && path.exists());
        assert!(unlink(&path, user()).is_some() && !path.exists());
        leave(found.record, Some(found.slot), &path, false).unwrap();
    }

    #[test]
    fn what_a_fork_shared_is_held_until_both_have_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("name.w");
        let memory = memory_file::make_sealed(c"w", 4096, 0o600).unwrap();
        for first_is_parent in [true, false] {
            let (record, _) = make(&path, user(), me(), &memory.file).unwrap();
            let child = (record.try_clone().unwrap(), None); // the same opening, as a fork makes it
            let parent = (record, Some(0));
            let (first, last) = if first_is_parent { (parent, child) } else { (child, parent) };
            leave(first.0, first.1, &path, true).unwrap();
            assert!(make(&path, user(), me(), &memory.file).is_none(), "the name is held");
            assert!(record_lock::is_held(&open_record(&path).unwrap()).unwrap());
            assert_eq!(is_held(&std::fs::read(&path).unwrap()[HEADER_BYTES..]), !first_is_parent);
            leave(last.0, last.1, &path, true).unwrap();
            assert!(!path.exists());
        }
    }

    #[test]
    fn who_leaves_what_was_shared_takes_no_other_record_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("name.u");
        let memory = memory_file::make_sealed(c"u", 4096, 0o600).unwrap();
        let (record, _) = make(&path, user(), me(), &memory.file).unwrap();
        std::fs::rename(&path, folder.path().join("moved")).unwrap();
        std::fs::write(&path, b"something else").unwrap();
        leave(record, Some(0), &path, true).unwrap();
        assert!(path.exists());
    }

    #[test]
    fn a_name_is_not_unlinked_while_its_record_is_taken_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("name.t");
        let memory = memory_file::make_sealed(c"t", 4096, 0o600).unwrap();
        drop(make(&path, user(), me(), &memory.file).unwrap());
        let taker = open_record(&path).unwrap();
        assert!(record_lock::set(&taker, libc::F_WRLCK, 0, 0).unwrap());
        assert!(unlink(&path, user()).is_none() && path.exists());
    }

    #[test]
    fn a_name_that_nobody_holds_is_not_taken_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("name.v");
        let memory = memory_file::make_sealed(c"v", 4096, 0o600).unwrap();
        drop(make(&path, user(), me(), &memory.file).unwrap());
        assert!(unlink(&path, user()).is_none() && path.exists());
        std::fs::write(&path, b"something else").unwrap();
        assert!(unlink(&path, user()).is_none() && path.exists());
    }

    #[test]
    fn what_is_no_record_or_not_ours_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        for (number, bytes) in [&b""[..], b"quireSM1", &[0; 80], &[7; 5000]].into_iter().enumerate() {
            let path = folder.path().join(number.to_string());
            std::fs::write(&path, bytes).unwrap();
            assert!(attach(&path, user(), me().process, true).is_none());
            assert_eq!(std::fs::read(&path).unwrap(), bytes);
        }
        let memory = File::create_new(folder.path().join("memory")).unwrap();
        let path = folder.path().join("name.y");
        assert!(make(&path, user() + 1, me(), &memory).is_none());
        assert!(!path.exists(), "nothing is left of what could not be made");
    }
}
