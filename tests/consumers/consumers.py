"""Libraries that take a buffer or an array, each as a function of one: what it gives is compared.

Every function is called with an ordinary array and with one of a mapping whose pages are not there.
"""

from __future__ import annotations

import array
import binascii
import bz2
import ctypes
import hashlib
import io
import json
import lzma
import pickle
import re
import socket
import sqlite3
import struct
import tempfile
import threading
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

Consumer = Callable[[np.ndarray], Any]

TABLE: dict[str, Consumer] = {}
"""Of 4,096 rows of 16 float64."""
TEXT: dict[str, Consumer] = {}
"""Of the bytes of a JSON text."""
WRITERS: dict[str, Consumer] = {}
"""Of a table that may be written: what it holds afterwards is compared as well."""


def of(kind: dict[str, Consumer], library: str | None = None) -> Callable[[Consumer], Consumer]:
    """Enters a function where its library is installed; the tests name those required."""

    def enter(function: Consumer) -> Consumer:
        if library is None or find_spec(library) is not None:
            kind[function.__name__] = function
        return function

    return enter


@of(TABLE)
def ufuncs(x: np.ndarray) -> Any:
    return np.sqrt(np.abs(x)).sum(axis=0), np.add.reduce(x), x.mean(axis=1), np.median(x[::7])


@of(TABLE)
def ufunc_out(x: np.ndarray) -> Any:
    out = np.empty_like(x)
    return np.multiply(x, 2, out=out) is out, out


@of(TABLE)
def linear_algebra(x: np.ndarray) -> Any:
    return x.T @ x, np.linalg.svd(x[:64], compute_uv=False), np.einsum("ij,ij->i", x, x)


@of(TABLE)
def sorting(x: np.ndarray) -> Any:
    return np.sort(x, axis=0), np.argsort(x[:, 3], kind="stable"), np.unique(x[:, 0])


@of(TABLE)
def fancy_indexing(x: np.ndarray) -> Any:
    return x[[4095, 0, 77]], x[x[:, 0] > 0], x[::-1, ::3]


@of(TABLE)
def masked(x: np.ndarray) -> Any:
    return np.ma.masked_less(x, 0).sum(), np.nanmax(x), np.histogram(x, 20)


@of(TABLE)
def fourier(x: np.ndarray) -> Any:
    return np.fft.rfft(x, axis=0)


@of(TABLE)
def random_choice(x: np.ndarray) -> Any:
    return np.random.default_rng(3).choice(x, 50)


@of(TABLE)
def frombuffer(x: np.ndarray) -> Any:
    return np.frombuffer(memoryview(x).cast("B"), "i8")


@of(TABLE)
def memoryview_casts(x: np.ndarray) -> Any:
    whole = memoryview(x).cast("B")
    return bytes(whole[:100]), whole.cast("q")[7], whole[::-1][:9].tobytes(), x.data.shape


@of(TABLE)
def saved_by_numpy(x: np.ndarray) -> Any:
    with tempfile.TemporaryFile() as file:
        np.save(file, x)
        file.seek(0)
        return np.load(file)


@of(TABLE)
def pickled_by_value(x: np.ndarray) -> Any:
    return pickle.loads(pickle.dumps(x, protocol=5))


@of(TABLE)
def struct_unpacked(x: np.ndarray) -> Any:
    view = memoryview(x).cast("B")
    return struct.unpack_from("<3d", view, 8 * 16 * 4000), list(struct.iter_unpack("<d", view[:80]))


@of(TABLE)
def copied_by_ctypes(x: np.ndarray) -> Any:
    into = ctypes.create_string_buffer(x.nbytes)
    ctypes.memmove(into, x.ctypes.data, x.nbytes)
    return into.raw


@of(TABLE)
def standard_array(x: np.ndarray) -> Any:
    return array.array("d", x.tobytes()).tolist()[-3:]


@of(TABLE)
def files_and_streams(x: np.ndarray) -> Any:
    stream = io.BytesIO()
    stream.write(x)
    with tempfile.TemporaryFile() as file:
        file.write(x)
        file.seek(0)
        return stream.getvalue() == file.read(), stream.getvalue()


@of(TABLE)
def sent_by_socket(x: np.ndarray) -> Any:
    received = bytearray()

    def receive() -> None:
        while piece := right.recv(1 << 16):
            received.extend(piece)

    left, right = socket.socketpair()
    with right:
        reader = threading.Thread(target=receive)
        reader.start()
        try:
            with left:
                left.sendall(x)
        finally:
            reader.join()
    return bytes(received)


@of(TABLE, "pandas")
def pandas_frame(x: np.ndarray) -> Any:
    import pandas as pd

    frame = pd.DataFrame(x, copy=False)
    grouped = frame.groupby(frame[0] > 0)[1].sum()
    return frame.describe().to_numpy(), grouped.to_numpy(), frame.rolling(5).mean().to_numpy()


@of(TABLE, "pyarrow")
def arrow_array(x: np.ndarray) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    flat = pa.Array.from_buffers(pa.float64(), x.size, [None, pa.py_buffer(x)])
    table = pa.table({"a": pa.array(x[:, 0]), "b": pa.array(x[:, 1])})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return pc.sum(flat).as_py(), sink.getvalue().to_pybytes()


@of(TABLE, "polars")
def polars_frame(x: np.ndarray) -> Any:
    import polars as pl

    frame = pl.from_numpy(x, schema=[f"c{number}" for number in range(16)])
    return frame.sum().to_numpy(), frame.sort("c3")["c3"].to_numpy()


@of(TABLE, "numba")
def numba_compiled(x: np.ndarray) -> Any:
    return numba_sum()(x)


@of(TABLE, "sklearn")
def scikit_learn_fits(x: np.ndarray) -> Any:
    from sklearn.cluster import KMeans
    from sklearn.linear_model import LinearRegression
    from sklearn.preprocessing import StandardScaler

    line = LinearRegression().fit(x[:, 1:], x[:, 0])
    means = KMeans(3, n_init=1, random_state=0).fit(x)
    return line.coef_, means.labels_, StandardScaler().fit_transform(x)


@of(TABLE, "scipy")
def scipy_functions(x: np.ndarray) -> Any:
    from scipy import signal, sparse, spatial

    tree = spatial.cKDTree(x[:, :3])
    return signal.detrend(x, axis=0), sparse.csr_matrix(x).sum(), tree.query(x[:5, :3])[1]


@of(TABLE, "dask")
def dask_array(x: np.ndarray) -> Any:
    import dask.array as da

    return da.from_array(x, chunks=(512, 16), name=False).sum(axis=0).compute()


@of(TABLE, "joblib")
def joblib_dumped(x: np.ndarray) -> Any:
    import joblib

    stream = io.BytesIO()
    joblib.dump(x, stream)
    stream.seek(0)
    return joblib.hash(x), joblib.load(stream)


@of(TABLE, "h5py")
def hdf5_written(x: np.ndarray) -> Any:
    import h5py

    with tempfile.NamedTemporaryFile() as file, h5py.File(file.name, "w") as hdf:
        hdf["x"] = x
        return hdf["x"][...]


@of(TABLE, "safetensors")
def safetensors_saved(x: np.ndarray) -> Any:
    from safetensors.numpy import load, save

    return load(save({"x": x}))["x"]


@of(TABLE, "torch")
def torch_tensor(x: np.ndarray) -> Any:
    import torch

    tensor = torch.from_numpy(x.copy() if not x.flags.writeable else x)
    return torch.linalg.norm(tensor, dim=0).numpy(), (tensor @ tensor.T[:, :5]).numpy()


@of(TEXT)
def regular_expressions(x: np.ndarray) -> Any:
    found = re.findall(rb'"id": (\d+7)\b', x)
    spans = [match.span() for match in re.finditer(rb"odd", memoryview(x))]
    return found, spans, re.sub(rb"\d", b"#", x)[:200]


@of(TEXT)
def hashes(x: np.ndarray) -> Any:
    return [hashlib.new(name, x).digest() for name in ("sha256", "md5", "blake2b", "sha3_256")]


@of(TEXT)
def checksums(x: np.ndarray) -> Any:
    return zlib.crc32(x), zlib.adler32(x), binascii.crc32(x), binascii.hexlify(x)[-20:]


@of(TEXT)
def compressors(x: np.ndarray) -> Any:
    packed = zlib.compress(x), bz2.compress(x), lzma.compress(x)
    return packed, zlib.decompress(packed[0]) == bytes(x)


@of(TEXT)
def json_text(x: np.ndarray) -> Any:
    return json.loads(str(x, "utf-8")), json.loads(x.tobytes())


@of(TEXT)
def text_decoding(x: np.ndarray) -> Any:
    return str(memoryview(x), "utf-8"), bytes(x).splitlines()[-1]


@of(TEXT)
def bytes_methods(x: np.ndarray) -> Any:
    return b"".join([b"<", x, b">"]), bytearray(x).find(b"odd"), int.from_bytes(x[:9], "big")


@of(TEXT)
def sqlite_blobs(x: np.ndarray) -> Any:
    with sqlite3.connect(":memory:") as base:
        base.execute("create table t (b blob)")
        row = base.execute("insert into t values (?)", (x.data,)).lastrowid
        with base.blobopen("t", "b", row) as blob:
            blob.write(x.data)
            blob.seek(0)
            read = blob.read()
        (size,) = base.execute("select length(b) from t").fetchone()
    base.close()
    return read, size


@of(TEXT, "pyarrow")
def arrow_reads_json(x: np.ndarray) -> Any:
    import pyarrow as pa

    reader = pa.BufferReader(pa.py_buffer(x))
    return reader.size(), reader.read_at(50, 1000)


@of(WRITERS)
def written_by_ufuncs(x: np.ndarray) -> Any:
    np.add(x, 1, out=x)
    x[::5] *= 3
    np.clip(x, -1, 4, out=x)
    x[:, 2].sort()
    np.copyto(x[100:200], 7, where=x[100:200] > 0)


@of(WRITERS)
def written_by_struct(x: np.ndarray) -> Any:
    struct.pack_into("<2d", memoryview(x).cast("B"), 8 * 16 * 3000, 1.5, 2.5)


@of(WRITERS)
def written_by_ctypes(x: np.ndarray) -> Any:
    ctypes.memset(x.ctypes.data, 0, 4096 * 3)
    numbers = (ctypes.c_double * x.size).from_buffer(x)
    numbers[5] = 5.5
    del numbers


@of(WRITERS)
def written_by_readinto(x: np.ndarray) -> Any:
    with tempfile.TemporaryFile() as file:
        file.write(bytes(range(256)) * (x.nbytes // 512))
        file.seek(0)
        return file.readinto(x)


@of(WRITERS)
def written_by_socket(x: np.ndarray) -> Any:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(bytes(range(8)) * 512)
        return right.recv_into(x, 4096, socket.MSG_WAITALL)


@of(WRITERS)
def written_by_random(x: np.ndarray) -> Any:
    np.random.default_rng(1).random(out=x)
    np.random.default_rng(2).shuffle(x)


@of(WRITERS, "numba")
def written_by_numba(x: np.ndarray) -> Any:
    numba_fill()(x)


@of(WRITERS, "torch")
def written_by_torch(x: np.ndarray) -> Any:
    import torch

    torch.from_numpy(x).mul_(2).add_(1)


def numba_sum() -> Any:
    return _compiled("sum")


def numba_fill() -> Any:
    return _compiled("fill")


COMPILED: dict[str, Any] = {}


def _compiled(name: str) -> Any:
    """A function compiled once, for all arrays: their strides are of one kind."""
    import numba

    def total(x: Any) -> float:
        found = 0.0
        for row in range(x.shape[0]):
            for column in range(x.shape[1]):
                found += x[row, column]
        return found

    def fill(x: Any) -> None:
        for row in range(x.shape[0]):
            x[row, row % 16] = row

    if name not in COMPILED:
        COMPILED[name] = numba.njit(total if name == "sum" else fill)
    return COMPILED[name]
