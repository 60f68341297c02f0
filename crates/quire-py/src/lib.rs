//! `quire._core`: the Python face of `quire-core`, one thin file per noun. No paging is done here;
//! nothing here is called on the fault path but `courier`, to raise an error in a thread.

use pyo3::prelude::*;

mod arena;
mod courier;
mod errors;
mod exports;
mod kernel_mapping;
mod lease;
mod mapped;
mod mapped_file;
mod mapping;
mod module;
mod store;

// What tells a faulting thread of its error asks whether it holds the interpreter lock: an interpreter
// without one turns it on for this module, and says so.
#[pymodule(gil_used = true)]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    courier::register();
    errors::load_classes(m.py())?;
    m.add_class::<store::PyStore>()?;
    m.add_class::<mapping::MappingBase>()?;
    m.add_class::<arena::ArenaBase>()?;
    m.add_class::<kernel_mapping::KernelRange>()?;
    m.add_class::<kernel_mapping::KernelMappingBase>()?;
    mapped_file::add_class(m)?;
    for function in [
        wrap_pyfunction!(store::open_file, m)?,
        wrap_pyfunction!(store::open_memory, m)?,
        wrap_pyfunction!(store::open_zero, m)?,
        wrap_pyfunction!(store::open_zstd, m)?,
        wrap_pyfunction!(store::open_concat, m)?,
        wrap_pyfunction!(store::open_external, m)?,
        wrap_pyfunction!(store::open_faulty, m)?,
        wrap_pyfunction!(store::compress_frame, m)?,
        wrap_pyfunction!(store::encode_seek_table, m)?,
        wrap_pyfunction!(kernel_mapping::map_kernel, m)?,
        wrap_pyfunction!(lease::make_memory_file, m)?,
        wrap_pyfunction!(lease::make_segment, m)?,
        wrap_pyfunction!(lease::map_segment, m)?,
        wrap_pyfunction!(lease::attach_segment, m)?,
        wrap_pyfunction!(lease::forks, m)?,
        wrap_pyfunction!(lease::leave_segment, m)?,
        wrap_pyfunction!(lease::make_record, m)?,
        wrap_pyfunction!(lease::is_unlinked, m)?,
        wrap_pyfunction!(lease::unlink_record, m)?,
        wrap_pyfunction!(module::set_budget, m)?,
        wrap_pyfunction!(module::kernel_unwatched, m)?,
        wrap_pyfunction!(module::set_automatic_budget, m)?,
        wrap_pyfunction!(module::budget, m)?,
        wrap_pyfunction!(module::statistics, m)?,
        wrap_pyfunction!(module::live_mappings, m)?,
        wrap_pyfunction!(module::rearm_after_fork, m)?,
        wrap_pyfunction!(module::keep_fault_handlers, m)?,
        wrap_pyfunction!(module::probe, m)?,
        wrap_pyfunction!(module::page_bytes, m)?,
        wrap_pyfunction!(module::finalize, m)?,
        wrap_pyfunction!(errors::take_pending_error, m)?,
        wrap_pyfunction!(exports::watch_exports, m)?,
    ] {
        m.add_function(function)?;
    }
    Ok(())
}
