//! Stores: native ones by name, others through the external pager.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use quire_core::errors::{FaultCode, OpenError, StoreError};
use quire_core::interrupt;
use quire_core::pager::channel::Shape;
use quire_core::pager::external::{ExternalStore, Facts, Recipe};
use quire_core::store::concat::{ConcatStore, Part};
use quire_core::store::faulty::{FaultPlan, FaultyStore, Operation};
use quire_core::store::file::FileStore;
use quire_core::store::memory::MemoryStore;
use quire_core::store::zero::ZeroStore;
use quire_core::store::zstd::ZstdStore;
use quire_core::store::{Store, seek_table, zstd};
use quire_core::units::{ByteCount, ByteOffset};

use crate::{courier, errors};

/// What a store can say of itself beside its bytes.
#[derive(Clone)]
enum Kind {
    File,
    Memory,
    Zstd(Arc<ZstdStore>),
    Concat,
    External(Arc<ExternalStore>),
    Faulty,
}

/// Bytes somewhere, read by offset. Thread-safe.
#[pyclass(name = "Store", module = "quire._core", frozen)]
pub struct PyStore {
    store: Arc<dyn Store>,
    kind: Kind,
    version: Option<String>,
    closed: AtomicBool,
}

impl PyStore {
    fn new(store: Arc<dyn Store>, kind: Kind, version: Option<String>) -> Self {
        PyStore { store, kind, version, closed: AtomicBool::new(false) }
    }

    /// The core's store.
    pub fn store(&self) -> Arc<dyn Store> {
        Arc::clone(&self.store)
    }
}

#[pymethods]
impl PyStore {
    /// Why it cannot be written; None where it can.
    #[getter]
    fn read_only(&self) -> Option<String> {
        self.store.read_only()
    }

    #[getter]
    fn size(&self) -> u64 {
        self.store.size().0
    }

    #[getter]
    fn label(&self) -> &str {
        self.store.label()
    }

    #[getter]
    fn grain(&self) -> u64 {
        self.store.grain().0
    }

    #[getter]
    fn is_slow(&self) -> bool {
        self.store.is_slow()
    }

    #[getter]
    fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    #[getter]
    fn bytes_fetched(&self) -> u64 {
        self.store.bytes_fetched()
    }

    /// Reads exactly `length` bytes from `offset`.
    fn read<'py>(&self, py: Python<'py>, offset: u64, length: usize) -> PyResult<Bound<'py, PyBytes>> {
        if offset.checked_add(length as u64).is_none_or(|end| end > self.store.size().0) {
            return Err(PyValueError::new_err(format!(
                "{length} bytes from {offset} reach past the end of the store, {}",
                self.store.size()
            )));
        }
        if self.closed.load(Ordering::Acquire) {
            let error = StoreError::new(FaultCode::Closed, ByteOffset(offset), "the store is closed");
            return Err(errors::from_store(py, self.store.label(), &error));
        }
        // Python code that runs in the main thread has acted on earlier interrupts.
        if courier::is_main_thread() {
            interrupt::clear();
        }
        let mut failed: Option<StoreError> = None;
        let bytes = PyBytes::new_with(py, length, |buf| {
            failed = py.detach(|| self.store.read_at(ByteOffset(offset), buf)).err();
            Ok(())
        })?;
        match failed {
            None => Ok(bytes),
            Some(error) => Err(errors::from_store(py, self.store.label(), &error)),
        }
    }

    /// Facts of the store beside size and label.
    fn describe<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        match &self.kind {
            Kind::File => dict.set_item("kind", "file")?,
            Kind::Memory => dict.set_item("kind", "memory")?,
            Kind::Faulty => dict.set_item("kind", "faulty")?,
            Kind::Concat => dict.set_item("kind", "concat")?,
            Kind::Zstd(zstd) => {
                dict.set_item("kind", "zstd")?;
                dict.set_item("frames", zstd.frame_count())?;
                dict.set_item("frame_bytes", self.store.grain().0)?;
                dict.set_item("compressed_bytes", zstd.compressed_size().0)?;
                dict.set_item("checksums", zstd.has_checksums())?;
            }
            Kind::External(external) => {
                let hello = PyBytes::new(py, external.hello().get(1..).unwrap_or_default());
                dict.update(
                    py.import("json")?.call_method1("loads", (hello,))?.cast_into::<PyDict>()?.as_mapping(),
                )?;
                dict.set_item("pid", py.detach(|| external.pid()))?;
            }
        }
        Ok(dict)
    }

    /// Ends reads that wait and refuses later ones.
    fn close(&self, py: Python<'_>) {
        self.closed.store(true, Ordering::Release);
        py.detach(|| self.store.close());
    }
}

/// Opens a local file or block device, for writing too where asked for.
#[pyfunction]
#[pyo3(signature = (path, writable=false))]
pub fn open_file(py: Python<'_>, path: PathBuf, writable: bool) -> PyResult<PyStore> {
    let opened =
        py.detach(|| if writable { FileStore::open_writable(&path) } else { FileStore::open(&path) });
    let store = Arc::new(opened.map_err(|error| errors::from_open(py, &path.to_string_lossy(), &error))?);
    Ok(PyStore::new(store.clone(), Kind::File, Some(store.version())))
}

/// A store over a copy of `data`.
#[pyfunction]
pub fn open_memory(data: Vec<u8>, label: String) -> PyStore {
    PyStore::new(Arc::new(MemoryStore::new(label, data)), Kind::Memory, None)
}

/// So many zero bytes: anonymous memory.
#[pyfunction]
pub fn open_zero(size: u64, label: String) -> PyStore {
    PyStore::new(Arc::new(ZeroStore::new(label, ByteCount(size))), Kind::Memory, None)
}

/// The decompressed bytes of a store in the Zstandard seekable format.
#[pyfunction]
pub fn open_zstd(py: Python<'_>, inner: &PyStore) -> PyResult<PyStore> {
    let below = inner.store();
    let opened = py.detach(|| ZstdStore::open(below));
    let store = Arc::new(opened.map_err(|error| errors::from_open(py, inner.store.label(), &error))?);
    Ok(PyStore::new(store.clone(), Kind::Zstd(store), inner.version.clone()))
}

/// Parts of stores, given as (store, offset, bytes), one behind the other.
#[pyfunction]
pub fn open_concat(
    parts: Vec<(PyRef<'_, PyStore>, u64, u64)>,
    label: String,
    version: Option<String>,
) -> PyResult<PyStore> {
    let part = |(store, offset, size): (PyRef<'_, PyStore>, u64, u64)| Part {
        store: store.store(),
        offset: ByteOffset(offset),
        size: ByteCount(size),
    };
    let store = ConcatStore::new(label, parts.into_iter().map(part).collect())
        .ok_or_else(|| PyValueError::new_err("a part does not lie in its store, or they are too long"))?;
    Ok(PyStore::new(Arc::new(store), Kind::Concat, version))
}

/// A store in a pager process started from `argv`, which unpickles `recipe`.
#[pyfunction]
pub fn open_external(
    py: Python<'_>,
    argv: Vec<String>,
    recipe: Vec<u8>,
    label: String,
    slots: u32,
    slot_bytes: usize,
    timeout_s: f64,
) -> PyResult<PyStore> {
    let timeout = Duration::try_from_secs_f64(timeout_s)
        .ok()
        .filter(|timeout| !timeout.is_zero() && *timeout < Duration::from_secs(1 << 31))
        .ok_or_else(|| {
            PyValueError::new_err(format!("a timeout of {timeout_s} s is not a positive duration"))
        })?;
    if slots == 0 || slot_bytes == 0 {
        return Err(PyValueError::new_err("slots and slot_bytes must be positive"));
    }
    let recipe = Recipe { argv, bytes: recipe, shape: Shape { slots, slot_bytes }, timeout };
    let mut interrupted: Option<PyErr> = None;
    let mut go_on = || {
        interrupted = Python::attach(|py| py.check_signals()).err();
        interrupted.is_none()
    };
    let opened = py.detach(|| ExternalStore::open(recipe, read_hello, &mut go_on));
    if let Some(interrupt) = interrupted {
        return Err(interrupt);
    }
    let store = Arc::new(opened.map_err(|error| errors::from_open(py, &label, &error))?);
    let version = store.version().map(str::to_owned);
    Ok(PyStore::new(store.clone(), Kind::External(store), version))
}

/// Reads a pager's first packet: `H` or `E`, then JSON.
fn read_hello(packet: &[u8]) -> Result<Facts, OpenError> {
    let bad = |what: &str| OpenError::Io { errno: None, message: format!("the pager process said {what}") };
    let (kind, json) = packet.split_first().ok_or_else(|| bad("nothing"))?;
    let json: serde_json::Value = serde_json::from_slice(json).map_err(|error| bad(&error.to_string()))?;
    let text = |key: &str| json[key].as_str().map(str::to_owned);
    match kind {
        b'H' => Ok(Facts {
            size: ByteCount(json["size"].as_u64().ok_or_else(|| bad("no size"))?),
            label: text("label").ok_or_else(|| bad("no label"))?,
            version: text("version"),
        }),
        b'E' if json["code"] == "format" => Err(OpenError::Format(text("message").unwrap_or_default())),
        b'E' => Err(OpenError::Io {
            errno: json["errno"].as_i64().and_then(|errno| i32::try_from(errno).ok()),
            message: text("message").unwrap_or_default(),
        }),
        _ => Err(bad("something that is not the protocol")),
    }
}

/// A store whose reads, writes or syncs fail or wait according to a plan; for tests.
#[pyfunction]
#[pyo3(signature = (inner, *, operation="read", first=0, count=None, offset=0, length=None, code="io", errno=None, delay_s=0.0))]
#[allow(clippy::too_many_arguments, reason = "keyword arguments of the Python face")]
pub fn open_faulty(
    inner: &PyStore,
    operation: &str,
    first: u64,
    count: Option<u64>,
    offset: u64,
    length: Option<u64>,
    code: &str,
    errno: Option<i32>,
    delay_s: f64,
) -> PyResult<PyStore> {
    let code = match code {
        "ok" => None,
        name => Some(
            errors::code_of_name(name).ok_or_else(|| PyValueError::new_err(format!("no code {name:?}")))?,
        ),
    };
    let delay = Duration::try_from_secs_f64(delay_s)
        .map_err(|_| PyValueError::new_err(format!("a delay of {delay_s} s is not a duration")))?;
    let operation = Operation::from_name(operation)
        .ok_or_else(|| PyValueError::new_err(format!("no operation {operation:?}")))?;
    let plan = FaultPlan {
        operation,
        first,
        count,
        offset: ByteOffset(offset),
        length: length.map(ByteCount),
        code,
        errno,
        delay,
    };
    let store = FaultyStore::new(inner.store(), plan);
    Ok(PyStore::new(Arc::new(store), Kind::Faulty, inner.version.clone()))
}

/// Compresses `data` (any contiguous buffer) into one frame; returns it and the low 32 bits of the
/// data's XXH64. The interpreter lock is not held meanwhile.
#[pyfunction]
pub fn compress_frame<'py>(
    py: Python<'py>,
    data: PyBuffer<u8>,
    level: i32,
) -> PyResult<(Bound<'py, PyBytes>, u32)> {
    let bytes = data.to_vec(py)?;
    let (frame, checksum) =
        py.detach(|| zstd::compress_frame(&bytes, level)).map_err(PyValueError::new_err)?;
    Ok((PyBytes::new(py, &frame), checksum))
}

/// The seek table, a skippable frame, of frames given as (compressed, decompressed, checksum).
#[pyfunction]
pub fn encode_seek_table<'py>(py: Python<'py>, entries: Vec<(u32, u32, Option<u32>)>) -> Bound<'py, PyBytes> {
    PyBytes::new(py, &seek_table::encode_seek_table(&entries))
}
