//! What `MappingBase` needs of whatever it shows: a mapped store, or a range that the kernel pages.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use quire_core::errors::{MapError, StoreError};
use quire_core::interrupt::PageError;
use quire_core::mapping::Mapping;
use quire_core::pager::swap::SwapPager;
use quire_core::pmap::Kind;
use quire_core::readahead::Advice;
use quire_core::residency::PinError;
use quire_core::store::Store;
use quire_core::sys::memory::Range;
use quire_core::units::ByteCount;

use crate::{courier, module};

/// Something mapped.
pub trait Mapped: Send + Sync {
    /// First address of the bytes.
    fn address(&self) -> usize;
    /// Bytes.
    fn size(&self) -> u64;
    /// Its name, for errors.
    fn label(&self) -> &str;
    /// Bytes in which pages come and go.
    fn granule(&self) -> u64;
    /// Name of the pmap.
    fn pmap(&self) -> &'static str;
    /// How writes are noticed; `None` where that is not quire's business.
    fn tracking(&self) -> Option<&'static str>;
    /// Whether the addresses may be touched.
    fn has_pointer(&self) -> bool;
    /// The addresses, if system calls are refused absent pages of them: their exports are watched.
    fn unfilled(&self) -> Option<Range>;
    /// Whether they may be written.
    fn writable(&self) -> bool;
    /// Writes back and makes durable.
    fn sync(&self, within: std::ops::Range<u64>) -> Result<(), StoreError>;
    /// Has pages resident.
    fn populate(&self, span: std::ops::Range<u64>) -> Result<(), StoreError>;
    /// Copies out.
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), StoreError>;
    /// Copies in.
    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), StoreError>;
    /// How it is going to be touched.
    fn advise(&self, advice: Advice);
    /// Starts to load.
    fn will_need(&self, span: std::ops::Range<u64>);
    /// Keeps pages resident.
    fn pin(&self, span: std::ops::Range<u64>) -> Result<(), PinError>;
    /// Ends one `pin` of the same bytes.
    fn unpin(&self, span: std::ops::Range<u64>);
    /// Evicts; returns the bytes freed.
    fn evict(&self, span: std::ops::Range<u64>) -> Result<ByteCount, StoreError>;
    /// A byte for each granule: 1 resident, 0 not.
    fn resident(&self) -> Vec<u8>;
    /// Bounds what is resident.
    fn set_budget(&self, budget: ByteCount) -> Result<(), MapError>;
    /// Why it has failed.
    fn failure(&self) -> Option<PageError>;
    /// Counters and accounts.
    fn statistics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>>;
    /// Gives up what is dirty: every write to the store is refused from here on.
    fn discard(&self);
    /// Unmaps, once; nothing refers to the addresses any more.
    fn unmap(&self) -> Result<(), StoreError>;
}

/// A mapped store.
pub struct Paged {
    /// The mapping.
    pub mapping: Mapping,
    /// What it shows.
    pub store: Arc<dyn Store>,
}

impl Mapped for Paged {
    fn address(&self) -> usize {
        self.mapping.range().start
    }

    fn size(&self) -> u64 {
        self.store.size().0
    }

    fn label(&self) -> &str {
        self.store.label()
    }

    fn granule(&self) -> u64 {
        self.mapping.object().granule.0
    }

    fn pmap(&self) -> &'static str {
        self.mapping.kind().name()
    }

    fn tracking(&self) -> Option<&'static str> {
        self.mapping.tracking().map(|tracking| tracking.name())
    }

    fn has_pointer(&self) -> bool {
        self.mapping.kind().has_pointer()
    }

    fn unfilled(&self) -> Option<Range> {
        (self.mapping.kind() != Kind::Uffd).then(|| self.mapping.range())
    }

    fn writable(&self) -> bool {
        self.mapping.tracking().is_some()
    }

    fn sync(&self, within: std::ops::Range<u64>) -> Result<(), StoreError> {
        self.mapping.sync(within)
    }

    fn populate(&self, span: std::ops::Range<u64>) -> Result<(), StoreError> {
        self.mapping.populate(span)
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), StoreError> {
        self.mapping.read(offset, into)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.mapping.write(offset, bytes)
    }

    fn advise(&self, advice: Advice) {
        self.mapping.advise(advice);
    }

    fn will_need(&self, span: std::ops::Range<u64>) {
        self.mapping.will_need(span);
    }

    fn pin(&self, span: std::ops::Range<u64>) -> Result<(), PinError> {
        self.mapping.pin(span)
    }

    fn unpin(&self, span: std::ops::Range<u64>) {
        self.mapping.unpin(span);
    }

    fn evict(&self, span: std::ops::Range<u64>) -> Result<ByteCount, StoreError> {
        self.mapping.evict(span)
    }

    fn resident(&self) -> Vec<u8> {
        self.mapping.resident()
    }

    fn set_budget(&self, budget: ByteCount) -> Result<(), MapError> {
        self.mapping.set_budget(budget)
    }

    fn failure(&self) -> Option<PageError> {
        self.mapping.failure()
    }

    fn statistics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let object = self.mapping.object();
        let dict = module::counters_dict(py, &object.counters)?;
        module::account_items(&dict, &object.account)?;
        dict.set_item("bytes_fetched", self.store.bytes_fetched())?;
        dict.set_item("dirty_bytes", py.detach(|| self.mapping.dirty_bytes()).0)?;
        dict.set_item("buffer_bytes", object.pager.standing_bytes().0)?;
        let swap = object.pager.swap().map(SwapPager::swap);
        dict.set_item("swap_bytes", swap.map_or(0, |swap| swap.used().0))?;
        dict.set_item("swap_limit_bytes", swap.map_or(0, |swap| swap.limit().0))?;
        Ok(dict)
    }

    fn discard(&self) {
        self.store.close();
    }

    fn unmap(&self) -> Result<(), StoreError> {
        let written = self.mapping.unmap();
        courier::leave();
        written
    }
}
