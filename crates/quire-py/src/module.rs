//! Functions of the module: budgets, statistics, the pmap ladder, fork.

use std::sync::Once;
use std::sync::atomic::Ordering;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use quire_core::counters::{COUNTERS, Counters, RETIRED_FETCHED};
use quire_core::daemon;
use quire_core::page_cache::{Account, PAGE_CACHE};
use quire_core::pager::Pager;
use quire_core::pressure::{Controller, Reader};
use quire_core::space::SPACE;
use quire_core::swap::Swap;
use quire_core::units::ByteCount;
use quire_core::{fault, mapping, pmap, runtime, sys};

use crate::{courier, errors};

/// Counters and fault latencies as a dict.
pub fn counters_dict<'py>(py: Python<'py>, counters: &Counters) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    for ((name, ..), value) in COUNTERS.iter().zip(counters.values()) {
        dict.set_item(name, value)?;
    }
    let latency = &counters.fault_latency;
    for (name, percent) in [("fault_ns_p50", 50.0), ("fault_ns_p90", 90.0), ("fault_ns_p99", 99.0)] {
        dict.set_item(name, latency.percentile_ns(percent))?;
    }
    dict.set_item("fault_ns_max", latency.max_ns())?;
    Ok(dict)
}

/// What an account holds, added to a dict.
pub fn account_items(dict: &Bound<'_, PyDict>, account: &Account) -> PyResult<()> {
    dict.set_item("resident_bytes", account.used().0)?;
    dict.set_item("peak_resident_bytes", account.peak().0)?;
    dict.set_item("metadata_bytes", account.metadata().0)?;
    dict.set_item("budget_bytes", account.budget().0)
}

/// The default process-wide budget, once, unless one was set: half of the available memory.
pub fn set_default_budget() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if PAGE_CACHE.account.budget() == ByteCount(u64::MAX) {
            PAGE_CACHE.account.set_budget(default_budget());
        }
    });
}

fn default_budget() -> ByteCount {
    let account = &PAGE_CACHE.account;
    let held = ByteCount(account.used().0 + account.metadata().0);
    Controller::new(&Reader::new().read(), held).budget()
}

/// Sets the process-wide budget in bytes; None is the default, half of the available memory.
#[pyfunction]
#[pyo3(signature = (budget_bytes=None))]
pub fn set_budget(py: Python<'_>, budget_bytes: Option<u64>) -> PyResult<()> {
    let budget = budget_bytes.map_or_else(default_budget, ByteCount);
    py.detach(|| mapping::set_process_budget(budget)).map_err(|error| errors::from_map(py, None, &error))
}

/// Has the process-wide budget follow what the machine has free, or no longer.
#[pyfunction]
pub fn set_automatic_budget(py: Python<'_>, on: bool) {
    py.detach(|| daemon::set_automatic(on));
}

/// The process-wide budget in bytes.
#[pyfunction]
pub fn budget() -> u64 {
    set_default_budget();
    PAGE_CACHE.account.budget().0
}

/// Counters of all mappings, present and past, and what is resident now.
#[pyfunction]
pub fn statistics(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let dict = counters_dict(py, &mapping::process_counters())?;
    account_items(&dict, &PAGE_CACHE.account)?;
    let entries = SPACE.all();
    let sum = |of: &dyn Fn(&Pager) -> u64| -> u64 {
        entries.iter().map(|(entry, _)| of(&entry.object.pager)).sum()
    };
    let past = RETIRED_FETCHED.load(Ordering::Relaxed);
    dict.set_item("dirty_bytes", py.detach(mapping::process_dirty_bytes).0)?;
    dict.set_item("bytes_fetched", past + sum(&|pager| pager.store().bytes_fetched()))?;
    dict.set_item("buffer_bytes", sum(&|pager| pager.standing_bytes().0))?;
    let swap = |pager: &Pager, of: &dyn Fn(&Swap) -> u64| pager.swap().map_or(0, |pages| of(pages.swap()));
    dict.set_item("swap_bytes", sum(&|pager| swap(pager, &|swap| swap.used().0)))?;
    dict.set_item("swap_limit_bytes", sum(&|pager| swap(pager, &|swap| swap.limit().0)))?;
    Ok(dict)
}

/// Number of mappings that are open.
#[pyfunction]
pub fn live_mappings() -> usize {
    SPACE.len() + SPACE.kernel().len()
}

/// In the child of a fork: makes the mappings ready there. Where the kernel refuses, the first
/// touch tries again and raises.
#[pyfunction]
pub fn rearm_after_fork() -> PyResult<()> {
    courier::restart_in_child()?;
    courier::learn_main_thread();
    let _ = runtime::rearm();
    Ok(())
}

/// Puts the fault handlers on top again, if any mapping was ever made.
#[pyfunction]
pub fn keep_fault_handlers() {
    sys::signal::keep_fault_handlers();
}

/// The pmap ladder as found here, best first.
#[pyfunction]
pub fn probe(py: Python<'_>) -> PyResult<Bound<'_, PyList>> {
    let ladder = pmap::probe();
    let default = ladder.iter().find(|rung| rung.works).map(|rung| rung.kind);
    let rows = PyList::empty(py);
    for rung in &ladder {
        let row = PyDict::new(py);
        row.set_item("name", rung.kind.name())?;
        row.set_item("works", rung.works)?;
        row.set_item("reason", &rung.reason)?;
        row.set_item("remedy", rung.remedy)?;
        row.set_item("default", Some(rung.kind) == default)?;
        row.set_item("pointer", rung.pointer)?;
        row.set_item("system_calls", rung.system_calls)?;
        row.set_item("trackings", rung.trackings.iter().map(|t| t.name()).collect::<Vec<_>>())?;
        rows.append(row)?;
    }
    Ok(rows)
}

/// Why nobody sees what is touched of ranges that the kernel pages; None where quire does.
#[pyfunction]
pub fn kernel_unwatched() -> Option<String> {
    sys::pagemap::Pagemap::probe().err()
}

/// Bytes of a hardware page.
#[pyfunction]
pub fn page_bytes() -> usize {
    sys::memory::page_bytes()
}

/// The interpreter is about to end. Threads may touch pages to the very end, so the fault handlers
/// are put back if another (`faulthandler.disable`) has taken them away.
#[pyfunction]
pub fn finalize() {
    courier::finalize();
    if !SPACE.is_empty() {
        sys::signal::install_fault_handlers(fault::on_signal);
    }
}
