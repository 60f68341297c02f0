"""The data of the benchmarks: real text features as rows of 4 KiB, in every form that is compared.

The matrix is the demonstration's (hashed character n-grams of Python source lines), four lines to
a row: float32, C order, shape (rows, 1024). Every compressed form uses zstd at the same level,
without checksums, as zarr and tensorstore write it by default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BytesCodec, ZstdCodec

import quire
from quire.tools.demo import corpus, features

if TYPE_CHECKING:
    from pathlib import Path

LEVEL = 3
ROW_BYTES = 4096
COLUMNS = ROW_BYTES // 4
CHUNKS = {"1 MiB": 1 << 20, "64 KiB": 1 << 16}

Matrix = npt.NDArray[np.float32]


def plain_path(folder: Path) -> Path:
    """The uncompressed `.npy` file."""
    return folder / "rows.npy"


def packed_path(folder: Path, chunk: str) -> Path:
    """The seekable zstd file with frames of that size."""
    return folder / f"rows-{chunk.replace(' ', '')}.npy.zst"


def zarr_path(folder: Path, chunk: str) -> Path:
    """The zarr v3 array with chunks of that size; tensorstore reads it too."""
    return folder / f"rows-{chunk.replace(' ', '')}.zarr"


def make(folder: Path, size_bytes: int, seed: int) -> dict[str, Any]:
    """Writes all forms into `folder`; says how large they became."""
    rows = size_bytes // ROW_BYTES
    lines = corpus.distinct_lines(rows * 4, seed)
    narrow = folder / "narrow.npy"
    features.write_matrix(lines, rows * 4, narrow)
    matrix = np.load(narrow).reshape(rows, COLUMNS)
    narrow.unlink()
    np.save(plain_path(folder), matrix)
    sizes = {"plain": plain_path(folder).stat().st_size}
    for chunk, chunk_bytes in CHUNKS.items():
        packed = packed_path(folder, chunk)
        quire.pack(plain_path(folder), packed, frame=chunk_bytes, level=LEVEL, checksum=False)
        sizes[packed.name] = packed.stat().st_size
        sizes[zarr_path(folder, chunk).name] = _write_zarr(folder, chunk, matrix)
    return {"rows": rows, "size_bytes": size_bytes, "lines": len(lines), "file_bytes": sizes}


def _write_zarr(folder: Path, chunk: str, matrix: Matrix) -> int:
    """Writes the zarr v3 array, one chunk a file, without checksums; its bytes on disk."""
    path = zarr_path(folder, chunk)
    array = zarr.create_array(
        store=path,
        shape=matrix.shape,
        dtype=matrix.dtype,
        chunks=(CHUNKS[chunk] // ROW_BYTES, COLUMNS),
        serializer=BytesCodec(),
        compressors=ZstdCodec(level=LEVEL, checksum=False),
    )
    array[:] = matrix
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
