//! `ArenaBase`: addresses in which mappings are placed. `quire.Arena` derives from it.

use std::sync::Arc;

use pyo3::prelude::*;
use quire_core::arena;
use quire_core::pmap::kernel::Ask;

use crate::kernel_mapping::{From, Kernel, KernelRange, source_of};
use crate::mapped::Mapped;
use crate::mapping::MappingBase;
use crate::{courier, errors};

/// A reservation of addresses. Thread-safe.
#[pyclass(subclass, extends = MappingBase, module = "quire._core", frozen)]
pub struct ArenaBase {
    kernel: Arc<Kernel>,
}

#[pymethods]
impl ArenaBase {
    #[new]
    fn new(py: Python<'_>, size: u64, label: &str, writable: bool) -> PyResult<PyClassInitializer<Self>> {
        courier::know_main_thread();
        let prot = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        let reserved = arena::reserve(size, prot, label.into());
        let kernel = Kernel::new(reserved.map_err(|error| errors::from_map(py, Some(label), &error))?);
        let base = MappingBase::over(Arc::clone(&kernel) as Arc<dyn Mapped>);
        Ok(PyClassInitializer::from(base).add_subclass(ArenaBase { kernel }))
    }

    /// Name of the arena.
    #[getter]
    fn label(&self) -> &str {
        self.kernel.label()
    }

    /// As `map_kernel`, at byte `address` of the arena.
    #[pyo3(signature = (source, label, size, offset, prot, flags, address=0, reserve=0))]
    #[allow(clippy::too_many_arguments, reason = "the arguments of mmap(2)")]
    fn place(
        &self,
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
        let ask = Ask { size: 0, offset, prot, flags, address, reserve, opened: None, source: label.into() };
        let from = source_of(source.as_ref(), &ask);
        let placed = py.detach(|| arena::place(&self.kernel.mapping, &from, size, ask));
        placed.map(KernelRange::new).map_err(|error| errors::from_map(py, Some(label), &error))
    }

    /// What is placed: byte of the arena, bytes, name of the source, PROT_ and MAP_ bits of each.
    fn placed(&self, py: Python<'_>) -> Vec<(u64, u64, String, i32, i32)> {
        let placed = py.detach(|| arena::placed(&self.kernel.mapping));
        placed
            .into_iter()
            .map(|entry| (entry.offset, entry.size, entry.source.as_ref().into(), entry.prot, entry.flags))
            .collect()
    }
}
