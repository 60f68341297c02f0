//! Attaching to shared memory by its name, and leaving it: the quick way of `quire.shared_names`.

use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::path::PathBuf;

use pyo3::prelude::*;
use quire_core::kernel_mapping::{KernelMapping, Source};
use quire_core::lease::{self, Attached, Holder};
use quire_core::pmap::kernel::Ask;

use crate::kernel_mapping::{KernelRange, get_ready};

/// What was attached: the range, the record's descriptor, the slot, and size, device and inode.
type Found = (KernelRange, i32, u64, (u64, u64, u64));

/// Attaches to what a record leads to, and maps it; None where anything stands in the way.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "what the caller knows already")]
pub fn attach_segment(
    py: Python<'_>,
    path: PathBuf,
    label: &str,
    user: u32,
    namespace: u64,
    process: u32,
    prot: i32,
) -> PyResult<Option<Found>> {
    get_ready(py)?;
    let me = Holder { namespace, process };
    let ask = Ask {
        size: 0,
        offset: 0,
        prot,
        flags: libc::MAP_SHARED,
        address: 0,
        reserve: 0,
        opened: None,
        source: label.into(),
    };
    let found = py.detach(|| {
        let attached = lease::attach(&path, user, me, prot & libc::PROT_WRITE != 0)?;
        let Attached { record, slot, memory, identity } = attached;
        let from = Source::Descriptor(memory.as_raw_fd());
        let mapping = KernelMapping::map(&from, Some(identity.size), ask).ok()?;
        let kept = mapping.look(|region| region.backing.as_ref()?.descriptor()).flatten()?;
        lease::show(&record, slot, me, kept).ok()?;
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

/// Gives back a slot of a record whose descriptor it takes and closes; the last takes it away.
#[pyfunction]
#[allow(unsafe_code)]
pub fn leave_segment(py: Python<'_>, record: i32, slot: u64, path: PathBuf) {
    // SAFETY: the caller's lease owned the descriptor, and gave it up for this call.
    let record = File::from(unsafe { OwnedFd::from_raw_fd(record) });
    // A slot that could not be written is nobody's without its lock, which the closing drops.
    py.detach(|| lease::leave(&record, slot, &path).unwrap_or(()));
}
