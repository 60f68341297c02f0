//! Copies out of a mapping and into it, which raise here and now what a touch would raise later.
#![allow(unsafe_code)]

use super::{KernelMapping, not_here};
use crate::errors::{FaultCode, StoreError};
use crate::pmap::kernel::{self, Region};
use crate::space::SPACE;
use crate::sys::memory::Range;
use crate::units::ByteOffset;

impl KernelMapping {
    /// Copies bytes of the mapping, or into it, that are not such as cover its pages for another thread.
    fn copy(
        &self,
        offset: u64,
        len: usize,
        copy: impl Fn(usize) -> Result<(), u64>,
    ) -> Result<(), StoreError> {
        self.expose();
        let used = self.in_use().map_err(|_| not_here(offset))?;
        let start = used.address + offset as usize;
        let copy = || copy(start).map_err(|id| take_failure(id, offset));
        Self::with_bare(&used, Range { start, len }, copy)?.ok_or_else(|| {
            let failure = self.look(Region::last_failure).flatten();
            failure.map_or_else(|| passing(offset), |failure| failure.error)
        })
    }

    /// Copies bytes of the mapping.
    ///
    /// # Errors
    /// Why a page could not be had.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), StoreError> {
        let to = into.as_mut_ptr();
        // SAFETY: `into` is the caller's; the other side stays mapped while it is in use.
        self.copy(offset, into.len(), |at| unsafe { kernel::copy(at as *const u8, to, into.len()) })
    }

    /// Copies bytes into the mapping.
    ///
    /// # Errors
    /// Why a page could not be had.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        // SAFETY: as in `read`; where it may not be written, the fault says so.
        self.copy(offset, bytes.len(), |at| unsafe {
            kernel::copy(bytes.as_ptr(), at as *mut u8, bytes.len())
        })
    }
}

/// The error that a [`kernel::touch`] has met, in the region of that id; it is told by this very call.
pub fn take_failure(id: u64, offset: u64) -> StoreError {
    let mut regions = SPACE.kernel_mut();
    let met = regions.values_mut().find(|region| region.id == id).and_then(|region| {
        let failure = region.last_failure();
        region.delivered();
        failure
    });
    met.map_or_else(
        || passing(offset),
        |failure| StoreError { part: Some(failure.source.into()), ..failure.error },
    )
}

fn passing(offset: u64) -> StoreError {
    StoreError::new(FaultCode::Io, ByteOffset(offset), "a page could not be had for a moment: try again")
}
