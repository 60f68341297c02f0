//! Leases of names of shared memory: the way in and out that nothing stands in.
//!
//! The format of records and the rules of their locks are those of `quire.shared_records` and
//! `quire.shared_names`, which do all that is not done here: make records, take away what is left
//! of killed processes, and say what stands in the way.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::sys::record_lock;

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
    /// The memory.
    pub memory: File,
    /// What it is.
    pub identity: Identity,
}

/// Opens the memory that a record leads to, and locks a slot in it.
///
/// `None` where anything is in the way, and nothing was done.
pub fn attach(path: &Path, user: u32, me: Holder, writable: bool) -> Option<Attached> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let record = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).ok()?;
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
    let opened = |number| Some((number, open_memory(slot_at(number)?, me, identity, writable)?));
    let (holder, memory) = numbers(true).take(HOLDERS_TRIED_MAX).find_map(opened)?;
    // Free ones first, then those of the dead, whose locks are gone.
    let dead = numbers(true).filter(|&number| number != holder);
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
    ours.then_some(Attached { record, slot: slot as u64, memory, identity })
}

/// Says in a slot by which descriptor of the process others can open the memory.
///
/// # Errors
/// As write(2).
pub fn show(record: &File, slot: u64, me: Holder, descriptor: i32) -> io::Result<()> {
    let mut said = [0; SLOT_BYTES];
    said[..8].copy_from_slice(&me.namespace.to_ne_bytes());
    said[8..12].copy_from_slice(&me.process.to_ne_bytes());
    said[12..].copy_from_slice(&descriptor.to_ne_bytes());
    record.write_all_at(&said, offset_of(slot))
}

/// Gives a slot back, and closes the record; the last takes it away.
///
/// # Errors
/// As write(2), fcntl(2), unlink(2): without its lock the slot is nobody's in any case.
pub fn leave(record: &File, slot: u64, path: &Path) -> io::Result<()> {
    record.write_all_at(&[0; SLOT_BYTES], offset_of(slot))?;
    record_lock::set(record, libc::F_UNLCK, offset_of(slot), SLOT_BYTES as u64)?;
    if record_lock::set(record, libc::F_WRLCK, 0, 0)? && record.metadata()?.nlink() > 0 {
        std::fs::remove_file(path)?;
    }
    Ok(())
}

/// Opens the memory file through a holder, if it is there.
fn open_memory(slot: &[u8], me: Holder, identity: Identity, writable: bool) -> Option<File> {
    let process = u32::from_ne_bytes(slot[8..12].try_into().ok()?);
    let descriptor = u32::from_ne_bytes(slot[12..16].try_into().ok()?);
    let path = if process == me.process {
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
    let same = identity_of(&memory.metadata().ok()?) == identity;
    (same && record_lock::is_sealed(&memory)).then_some(memory)
}

fn identity_of(found: &std::fs::Metadata) -> Identity {
    Identity { size: found.len(), device: found.dev(), inode: found.ino() }
}

fn is_held(slot: &[u8]) -> bool {
    slot[8..12] != [0; 4]
}

fn word(data: &[u8], at: usize) -> u64 {
    data[at..at + 8].iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte))
}

fn offset_of(slot: u64) -> u64 {
    HEADER_BYTES as u64 + slot * SLOT_BYTES as u64
}
