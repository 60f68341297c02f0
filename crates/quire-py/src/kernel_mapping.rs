//! `KernelMappingBase`: a range that the kernel pages. `quire.KernelMapping` derives from it.

use std::ffi::CString;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use quire_core::counters::{Counters, add};
use quire_core::errors::{FaultCode, MapError, StoreError};
use quire_core::interrupt::PageError;
use quire_core::kernel_mapping::{KernelMapping, Source};
use quire_core::page_cache::Account;
use quire_core::pmap::kernel::Ask;
use quire_core::readahead::Advice;
use quire_core::residency::PinError;
use quire_core::sys::lock::Mutex;
use quire_core::sys::memory::{Range, page_bytes};
use quire_core::units::{ByteCount, ByteOffset};

use crate::mapped::Mapped;
use crate::mapping::MappingBase;
use crate::{courier, errors, module};

/// The range behind the face that all mappings share.
pub struct Kernel {
    /// The range.
    pub mapping: KernelMapping,
    writable: bool,
    page: u64,
}

/// A range that the kernel pages. Thread-safe.
#[pyclass(subclass, extends = MappingBase, module = "quire._core", frozen)]
pub struct KernelMappingBase {
    kernel: Arc<Kernel>,
}

impl Kernel {
    /// As it is mapped now.
    pub fn new(mapping: KernelMapping) -> Arc<Self> {
        let (page, writable) = mapping
            .look(|region| (region.page as u64, region.prot & libc::PROT_WRITE != 0))
            .unwrap_or((1, false));
        Arc::new(Kernel { mapping, writable, page })
    }

    fn end_of(&self, offset: u64, length: Option<u64>) -> PyResult<u64> {
        let size = self.size();
        let length = length.unwrap_or(size.saturating_sub(offset));
        if offset.checked_add(length).is_none_or(|end| end > size) {
            return Err(PyValueError::new_err(format!(
                "{length} bytes from byte {offset} on do not lie in a mapping of {size}"
            )));
        }
        Ok(length)
    }
}

fn store_error(error: &MapError, offset: u64) -> StoreError {
    let errno = if let MapError::Sys { errno, .. } = error { Some(*errno) } else { None };
    StoreError {
        code: FaultCode::Io,
        offset: ByteOffset(offset),
        errno,
        message: error.to_string(),
        part: None,
    }
}

impl Mapped for Kernel {
    fn address(&self) -> usize {
        self.mapping.expose();
        self.mapping.look(|region| region.range.start + region.slack).unwrap_or(0)
    }

    fn size(&self) -> u64 {
        self.mapping.look(|region| region.size).unwrap_or(0)
    }

    fn label(&self) -> &str {
        self.mapping.source()
    }

    fn granule(&self) -> u64 {
        self.page
    }

    fn pmap(&self) -> &'static str {
        "kernel"
    }

    fn tracking(&self) -> Option<&'static str> {
        None
    }

    fn has_pointer(&self) -> bool {
        true
    }

    fn unfilled(&self) -> Option<Range> {
        None // the kernel brings them in
    }

    fn writable(&self) -> bool {
        self.mapping.look(|region| region.prot & libc::PROT_WRITE != 0).unwrap_or(self.writable)
    }

    fn sync(&self, within: std::ops::Range<u64>) -> Result<(), StoreError> {
        let end = within.end.min(self.size());
        let start = within.start.min(end);
        self.mapping.sync(start, end - start, libc::MS_SYNC)
    }

    fn populate(&self, span: std::ops::Range<u64>) -> Result<(), StoreError> {
        let (start, len) = (span.start, span.end - span.start);
        self.mapping
            .advise(start, len, libc::MADV_POPULATE_READ, false)
            .map_err(|error| store_error(&error, start))
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), StoreError> {
        self.mapping.read(offset, into)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.mapping.write(offset, bytes)
    }

    fn advise(&self, advice: Advice) {
        let advice = match advice {
            Advice::Normal => libc::MADV_NORMAL,
            Advice::Sequential => libc::MADV_SEQUENTIAL,
            Advice::Random => libc::MADV_RANDOM,
        };
        let _ = self.mapping.advise(0, self.size(), advice, false); // a hint
    }

    fn will_need(&self, span: std::ops::Range<u64>) {
        let _ = self.mapping.advise(span.start, span.end - span.start, libc::MADV_WILLNEED, false);
    }

    fn pin(&self, span: std::ops::Range<u64>) -> Result<(), PinError> {
        self.mapping.pin(span).map_err(PinError::Map)
    }

    fn unpin(&self, span: std::ops::Range<u64>) {
        self.mapping.unpin(span);
    }

    fn evict(&self, span: std::ops::Range<u64>) -> Result<ByteCount, StoreError> {
        let count = |pages: Vec<u8>| pages.iter().map(|page| u64::from(*page)).sum::<u64>();
        let resident = || self.mapping.resident().map(count).unwrap_or(0);
        let before = resident();
        let start = span.start;
        self.mapping.evict(span).map_err(|error| store_error(&error, start))?;
        Ok(ByteCount(before.saturating_sub(resident()) * page_bytes() as u64))
    }

    fn resident(&self) -> Vec<u8> {
        let pages = self.mapping.resident().unwrap_or_default();
        let each = (self.granule() as usize / page_bytes()).max(1);
        pages.chunks(each).map(|chunk| chunk.iter().copied().min().unwrap_or(0)).collect()
    }

    fn set_budget(&self, budget: ByteCount) -> Result<(), MapError> {
        self.mapping.set_budget(budget.0, self.mapping.wishes().drops.load(Ordering::Relaxed))
    }

    fn failure(&self) -> Option<PageError> {
        self.mapping.failure()
    }

    fn statistics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let resident = self.mapping.present_bytes();
        let wishes = self.mapping.wishes();
        let account = Account::new(ByteCount(wishes.budget.load(Ordering::Relaxed)));
        let counters = Counters::default();
        add(&counters.errors, self.mapping.errors());
        add(&counters.evicted_bytes, wishes.trimmed.load(Ordering::Relaxed));
        let dict = module::counters_dict(py, &counters)?;
        module::account_items(&dict, &account)?;
        dict.set_item("resident_bytes", resident)?;
        dict.set_item("peak_resident_bytes", wishes.peak.load(Ordering::Relaxed).max(resident))?;
        for name in ["bytes_fetched", "dirty_bytes", "buffer_bytes", "swap_bytes", "swap_limit_bytes"] {
            dict.set_item(name, 0)?;
        }
        Ok(dict)
    }

    fn discard(&self) {
        // What was stored is in the file's page cache, and goes to the disk whoever maps it; what could not
        // be written is given up.
        self.mapping.wishes().unwritten.forget();
    }

    fn unmap(&self) -> Result<(), StoreError> {
        let unwritten = self.mapping.wishes().unwritten.is_there();
        let written = if unwritten { self.sync(0..self.size()) } else { Ok(()) };
        self.mapping.unmap();
        written
    }
}

/// A range that was mapped and has no face yet.
#[pyclass(module = "quire._core", frozen)]
pub struct KernelRange {
    kernel: Mutex<Option<Arc<Kernel>>>,
}

impl KernelRange {
    /// A range for a face to take.
    pub fn new(mapping: KernelMapping) -> Self {
        KernelRange { kernel: Mutex::new(Some(Kernel::new(mapping))) }
    }
}

/// What may be mapped: nothing (anonymous memory), a descriptor, or a path.
#[derive(FromPyObject)]
pub enum From {
    /// A descriptor.
    Descriptor(i32),
    /// A path.
    Path(PathBuf),
}

/// What the core maps.
pub fn source_of<'a>(source: Option<&'a From>, ask: &Ask) -> Source<'a> {
    let writes = ask.prot & libc::PROT_WRITE != 0 && ask.flags & libc::MAP_TYPE != libc::MAP_PRIVATE;
    match source {
        None => Source::Anonymous,
        Some(From::Descriptor(fd)) => Source::Descriptor(*fd),
        Some(From::Path(path)) => Source::Path(path, writes),
    }
}

/// Maps by the kernel's pmap. Arguments as of mmap(2), but for `offset`, which may be any byte.
#[pyfunction]
#[pyo3(signature = (source, label, size, offset, prot, flags, address=0, reserve=0))]
#[allow(clippy::too_many_arguments, reason = "the arguments of mmap(2)")]
pub fn map_kernel(
    py: Python<'_>,
    source: Option<From>,
    label: &str,
    size: Option<u64>,
    offset: u64,
    prot: i32,
    flags: i32,
    address: usize,
    reserve: u64,
) -> PyResult<KernelRange> {
    courier::know_main_thread();
    let ask = Ask { size: 0, offset, prot, flags, address, reserve, opened: None, source: label.into() };
    let from = source_of(source.as_ref(), &ask);
    let mapped = py.detach(|| KernelMapping::map(&from, size, ask));
    mapped.map(KernelRange::new).map_err(|error| errors::from_map(py, Some(label), &error))
}

#[pymethods]
impl KernelMappingBase {
    #[new]
    fn new(kernel_range: &KernelRange) -> PyResult<PyClassInitializer<Self>> {
        let taken = kernel_range.kernel.lock().take();
        let kernel = taken.ok_or_else(|| PyValueError::new_err("the range has a face already"))?;
        let base = MappingBase::over(Arc::clone(&kernel) as Arc<dyn Mapped>);
        Ok(PyClassInitializer::from(base).add_subclass(KernelMappingBase { kernel }))
    }

    /// Name of what is mapped.
    #[getter]
    pub fn label(&self) -> &str {
        self.kernel.label()
    }

    /// Byte of the source at which the mapping begins.
    #[getter]
    pub fn offset(&self) -> u64 {
        self.kernel.mapping.look(|region| region.offset + region.slack as u64).unwrap_or(0)
    }

    /// The mapping's own descriptor of the source, -1 where none is kept; closed with the mapping.
    #[getter]
    fn descriptor(&self) -> i32 {
        let kept = self.kernel.mapping.look(|region| region.backing.as_ref()?.descriptor());
        kept.flatten().unwrap_or(-1)
    }

    /// Device and inode of the file; None of anonymous memory, and when it is unmapped.
    #[getter]
    fn identity(&self) -> Option<(u64, u64)> {
        self.kernel.mapping.look(|region| Some(region.backing.as_ref()?.identity())).flatten()
    }

    /// Closes that descriptor.
    fn close_descriptor(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.kernel.mapping.drop_descriptor()).map_err(|error| self.failed(py, &error))
    }

    /// PROT_ bits of all of it.
    #[getter]
    fn prot(&self) -> i32 {
        self.kernel.mapping.look(|region| region.prot).unwrap_or(0)
    }

    /// MAP_ bits it was made with.
    #[getter]
    pub fn map_flags(&self) -> i32 {
        self.kernel.mapping.look(|region| region.flags).unwrap_or(0)
    }

    /// Bytes of addresses that are held for it, from `address` on.
    #[getter]
    fn reserved_bytes(&self) -> u64 {
        self.kernel.mapping.look(|region| (region.reserved - region.slack) as u64).unwrap_or(0)
    }

    /// Whether it is fixed for ever.
    #[getter]
    fn sealed(&self) -> bool {
        self.kernel.mapping.look(|region| region.is_sealed()).unwrap_or(false)
    }

    /// Bounds what is resident of a file; `drop` also what the page cache keeps of it.
    fn bound(&self, py: Python<'_>, budget: u64, drop: bool) -> PyResult<()> {
        py.detach(|| self.kernel.mapping.set_budget(budget, drop)).map_err(|error| self.failed(py, &error))
    }

    /// Whether something that was stored could not be written back.
    #[getter]
    fn unwritten(&self) -> bool {
        self.kernel.mapping.wishes().unwritten.is_there()
    }

    /// msync(2) with these flags.
    fn msync(&self, py: Python<'_>, offset: u64, length: Option<u64>, flags: i32) -> PyResult<()> {
        let length = self.kernel.end_of(offset, length)?;
        py.detach(|| self.kernel.mapping.sync(offset, length, flags))
            .map_err(|error| errors::from_store(py, self.kernel.label(), &error))
    }

    /// madvise(2), on the pages around the bytes or `inside` of them.
    fn madvise(
        &self,
        py: Python<'_>,
        advice: i32,
        offset: u64,
        length: Option<u64>,
        inside: bool,
    ) -> PyResult<()> {
        let length = self.kernel.end_of(offset, length)?;
        py.detach(|| self.kernel.mapping.advise(offset, length, advice, inside))
            .map_err(|error| self.failed(py, &error))
    }

    /// mprotect(2).
    fn mprotect(&self, py: Python<'_>, offset: u64, length: Option<u64>, prot: i32) -> PyResult<()> {
        let length = self.kernel.end_of(offset, length)?;
        py.detach(|| self.kernel.mapping.protect(offset, length, prot))
            .map_err(|error| self.failed(py, &error))
    }

    /// mlock2(2).
    fn mlock(&self, py: Python<'_>, offset: u64, length: Option<u64>, on_fault: bool) -> PyResult<()> {
        let length = self.kernel.end_of(offset, length)?;
        py.detach(|| self.kernel.mapping.lock(offset, length, on_fault))
            .map_err(|error| self.failed(py, &error))
    }

    /// munlock(2).
    fn munlock(&self, py: Python<'_>, offset: u64, length: Option<u64>) -> PyResult<()> {
        let length = self.kernel.end_of(offset, length)?;
        py.detach(|| self.kernel.mapping.unlock(offset, length)).map_err(|error| self.failed(py, &error))
    }

    /// mbind(2): a policy and a bit for each node.
    fn mbind(&self, py: Python<'_>, policy: i32, nodes: u64, moves: bool) -> PyResult<()> {
        py.detach(|| self.kernel.mapping.bind(policy, nodes, moves)).map_err(|error| self.failed(py, &error))
    }

    /// Names anonymous memory; None takes the name away.
    fn set_name(&self, py: Python<'_>, name: Option<CString>) -> PyResult<()> {
        py.detach(|| self.kernel.mapping.name(name.as_deref())).map_err(|error| self.failed(py, &error))
    }

    /// mseal(2).
    fn mseal(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.kernel.mapping.seal()).map_err(|error| self.failed(py, &error))
    }

    /// Changes how many bytes are mapped; BufferError where that would take addresses from a view.
    fn change_size(slf: PyRef<'_, Self>, py: Python<'_>, size: u64) -> PyResult<()> {
        let base = slf.as_super();
        let kernel = &slf.kernel;
        let changed = base.change(py, |views| kernel.mapping.resize(size, views).map(|done| (done, views)));
        match changed.transpose().map_err(|error| slf.failed(py, &error))? {
            Some((true, _)) => Ok(()),
            Some((false, true)) => Err(PyBufferError::new_err(VIEWED)),
            Some((false, false)) => Err(PyBufferError::new_err(NO_ROOM)),
            None => Err(PyBufferError::new_err(CHANGING)),
        }
    }

    /// Unmaps a part; its addresses stay held.
    fn unmap_bytes(&self, py: Python<'_>, offset: u64, length: Option<u64>) -> PyResult<()> {
        let length = self.kernel.end_of(offset, length)?;
        py.detach(|| self.kernel.mapping.unmap_part(offset, length)).map_err(|error| self.failed(py, &error))
    }

    /// Keeps what lies before a byte, and returns the rest.
    fn split_at(slf: PyRef<'_, Self>, py: Python<'_>, at: u64) -> PyResult<KernelRange> {
        let mapping = &slf.kernel.mapping;
        match slf.as_super().change(py, |views| if views { None } else { Some(mapping.split(at)) }) {
            Some(Some(rest)) => rest.map(KernelRange::new).map_err(|error| slf.failed(py, &error)),
            Some(None) => {
                Err(PyBufferError::new_err("cannot split: views of the mapping are alive; delete them first"))
            }
            None => Err(PyBufferError::new_err(CHANGING)),
        }
    }
}

const VIEWED: &str = "cannot resize: views of the mapping are alive and it cannot stay where it is; delete them \
    first, or map with reserve=, which keeps room to grow in place";
const CHANGING: &str = "another thread is resizing or splitting the mapping: ask again when it has";
const NO_ROOM: &str = "cannot resize: the addresses held with reserve= are used up; map again with more";

impl KernelMappingBase {
    fn failed(&self, py: Python<'_>, error: &MapError) -> PyErr {
        errors::from_map(py, Some(self.kernel.label()), error)
    }
}
