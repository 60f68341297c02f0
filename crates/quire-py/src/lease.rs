//! Making shared memory, attaching to it by its name, and leaving it: the quick way of `quire.shared_names`.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use quire_core::errors::{MapError, words_of};
use quire_core::kernel_mapping::{KernelMapping, Source};
use quire_core::lease::{self, Attached, Holder};
use quire_core::pmap::kernel::Ask;
use quire_core::sys::backing::Opened;
use quire_core::sys::{fork, memory_file};

use crate::kernel_mapping::KernelRange;
use crate::{courier, errors};

/// What was attached: the range, the record's descriptor, the slot, and size, device and inode.
type Found = (KernelRange, i32, u64, (u64, u64, u64));

fn mapped(memory: Opened, label: &str, size: u64, prot: i32) -> Result<KernelMapping, MapError> {
    let (flags, opened) = (libc::MAP_SHARED, Some(memory));
    let ask = Ask { size, offset: 0, prot, flags, address: 0, reserve: 0, opened, source: label.into() };
    KernelMapping::map(&Source::Opened, Some(size), ask)
}

/// The system's refusal, as the interpreter's own calls raise it.
fn refused(error: &io::Error) -> PyErr {
    PyOSError::new_err((error.raw_os_error(), words_of(error)))
}

/// A new memory file, sealed: its descriptor. Its `name` is what /proc shows.
#[pyfunction]
pub fn make_memory_file(name: &[u8], size: u64, permissions: u32) -> PyResult<i32> {
    let made = memory_file::make_sealed(&CString::new(name)?, size, permissions);
    made.map(|memory| memory.file.into_raw_fd()).map_err(|error| refused(&error))
}

/// A new memory file, sealed and mapped; its `name` is what /proc shows.
#[pyfunction]
pub fn make_segment(
    py: Python<'_>,
    name: &[u8],
    label: &str,
    size: u64,
    permissions: u32,
    prot: i32,
) -> PyResult<KernelRange> {
    courier::know_main_thread();
    let name = CString::new(name)?;
    let mapped = py.detach(|| {
        let memory = memory_file::make_sealed(&name, size, permissions)?;
        Ok(mapped(memory, label, size, prot))
    });
    let mapped = mapped.map_err(|error| refused(&error))?;
    mapped.map(KernelRange::new).map_err(|error| errors::from_map(py, Some(label), &error))
}

/// Maps a memory file, and takes its descriptor.
#[pyfunction]
#[allow(unsafe_code)]
pub fn map_segment(py: Python<'_>, memory: i32, label: &str, size: u64, prot: i32) -> PyResult<KernelRange> {
    // SAFETY: the caller owned the descriptor, and gave it up for this call.
    let memory = File::from(unsafe { OwnedFd::from_raw_fd(memory) });
    courier::know_main_thread();
    let mapped = py.detach(|| Ok(mapped(Opened::taken(memory)?, label, size, prot)));
    let mapped = mapped.map_err(|error| refused(&error))?;
    mapped.map(KernelRange::new).map_err(|error| errors::from_map(py, Some(label), &error))
}

/// Attaches to what a record leads to, and maps it; None where anything stands in the way.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "what the caller knows already")]
pub fn attach_segment(
    py: Python<'_>,
    path: PathBuf,
    label: &str,
    user: u32,
    process: u32,
    prot: i32,
) -> PyResult<Option<Found>> {
    courier::know_main_thread();
    let found = py.detach(|| {
        let attached = lease::attach(&path, user, process, prot & libc::PROT_WRITE != 0)?;
        let Attached { record, slot, holder, memory, identity } = attached;
        let mapping = mapped(memory, label, identity.size, prot).ok()?;
        let kept = mapping.look(|region| region.backing.as_ref()?.descriptor()).flatten()?;
        if lease::show(&record, slot, holder, kept).is_err() {
            let _ = lease::leave(record, Some(slot), &path, false); // of a slot that is written in part nothing stays
            return None;
        }
        Some((mapping, record, slot, identity))
    });
    Ok(found.map(|(mapping, record, slot, identity)| {
        let tuple = (identity.size, identity.device, identity.inode);
        (KernelRange::new(mapping), record.into_raw_fd(), slot, tuple)
    }))
}

/// Makes the record of a name that nobody has, for a descriptor of the process: the record's own, and
/// size, device and inode of the memory; None where anything stands in the way.
#[pyfunction]
#[allow(unsafe_code)]
pub fn make_record(
    py: Python<'_>,
    path: PathBuf,
    user: u32,
    namespace: u64,
    process: u32,
    memory: i32,
) -> Option<(i32, (u64, u64, u64))> {
    // SAFETY: the caller's mapping keeps it open through the call; it is not closed here.
    let memory = ManuallyDrop::new(File::from(unsafe { OwnedFd::from_raw_fd(memory) }));
    let me = Holder { namespace, process };
    let (record, identity) = py.detach(|| lease::make(&path, user, me, &memory))?;
    Some((record.into_raw_fd(), (identity.size, identity.device, identity.inode)))
}

/// Whether a record, by its descriptor, has lost its name.
#[pyfunction]
#[allow(unsafe_code)]
pub fn is_unlinked(record: i32) -> PyResult<bool> {
    // SAFETY: the caller's lease keeps it open through the call; it is not closed here.
    let record = ManuallyDrop::new(File::from(unsafe { OwnedFd::from_raw_fd(record) }));
    record.metadata().map(|found| found.nlink() == 0).map_err(|error| refused(&error))
}

/// Takes a name away from those who hold it; False where nobody does, or anything stands in the way.
#[pyfunction]
pub fn unlink_record(py: Python<'_>, path: PathBuf, user: u32) -> bool {
    py.detach(|| lease::unlink(&path, user).is_some())
}

/// How often the process has forked, for who asks afterwards whether it did.
#[pyfunction]
pub fn forks() -> u64 {
    fork::forks()
}

/// Gives back a slot of a record whose descriptor it takes and closes; the last takes it away. `forks` is
/// what that was when the slot was taken; None for the slot is that of the parent of a fork.
#[pyfunction]
#[allow(unsafe_code)]
pub fn leave_segment(py: Python<'_>, record: i32, slot: Option<u64>, path: PathBuf, forks: u64) {
    // SAFETY: the caller's lease owned the descriptor, and gave it up for this call.
    let record = File::from(unsafe { OwnedFd::from_raw_fd(record) });
    let shared = fork::forks() != forks;
    // A slot that could not be written is nobody's without its lock, which the closing drops.
    py.detach(|| lease::leave(record, slot, &path, shared).unwrap_or(()));
}
