"""The header of a `.npy` file by numpy's public functions, and the members of a `.npz` file."""

from __future__ import annotations

import ast
import os
import struct
import warnings
import zipfile
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy import load as numpy_load  # as it was when this was imported
from numpy.lib import format as npy
from numpy.lib.array_utils import byte_bounds

if TYPE_CHECKING:
    from quire.compat.memmap import memmap

__all__ = ["MappedNpz", "byte_bounds", "numpy_load", "read_header", "write_header"]

LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field
LOCAL_SIGNATURE = b"PK\x03\x04"
ALIGN_BYTES = 64


def read_header(
    file: IO[bytes], max_header_size: int
) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    """The dtype, the shape, and whether the order is Fortran's; leaves the file at the data.

    Raises:
        ValueError: it is no `.npy` file, is too long, or holds Python objects.
    """
    version = npy.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = npy.read_array_header_1_0(file, max_header_size)
    elif version == (2, 0):
        shape, fortran, dtype = npy.read_array_header_2_0(file, max_header_size)
    elif version == (3, 0):
        shape, fortran, dtype = _read_header_3(file, max_header_size)
    else:
        raise ValueError(f"we only support format version (1,0), (2,0), and (3,0), not {version}")
    if dtype.hasobject:
        raise ValueError("Array can't be memory-mapped: Python objects in dtype.")
    return dtype, shape, fortran


def _read_header_3(file: IO[bytes], max_header_size: int) -> tuple[Any, bool, np.dtype[Any]]:
    """As the others, in UTF-8; numpy has no public function for it."""
    (length,) = struct.unpack("<I", file.read(4))
    if length > max_header_size:
        raise ValueError(
            f"Header info length ({length}) is large and may not be safe to load securely: give "
            "max_header_size"
        )
    fields = ast.literal_eval(file.read(length).decode())
    if not isinstance(fields, dict) or fields.keys() != npy.EXPECTED_KEYS:
        raise ValueError("the header of the file is damaged: save the array again")
    return fields["shape"], fields["fortran_order"], npy.descr_to_dtype(fields["descr"])


def write_header(
    file: IO[bytes],
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    fortran: bool,
    version: tuple[int, int] | None,
) -> None:
    """Writes a header: of the version, or of the oldest that can say it.

    Raises:
        ValueError: there is no such version, or it cannot say it.
    """
    fields = {"descr": npy.dtype_to_descr(dtype), "fortran_order": fortran, "shape": shape}
    writers: dict[Any, Any] = {
        (1, 0): npy.write_array_header_1_0,
        (2, 0): npy.write_array_header_2_0,
        (3, 0): _write_header_3,
    }
    if version is not None:
        if version not in writers:
            raise ValueError(f"we only support format version {list(writers)}, not {version}")
        writers[version](file, fields)
        return
    try:
        npy.write_array_header_1_0(file, fields)
        return
    except ValueError:  # too long for it, or a name that is not Latin-1
        file.seek(0)
    try:
        npy.write_array_header_2_0(file, fields)
        wrote = "2.0: only numpy from 1.9 on can read it"
    except UnicodeEncodeError:
        file.seek(0)
        _write_header_3(file, fields)
        wrote = "3.0: only numpy from 1.17 on can read it"
    warnings.warn(f"Stored array in format {wrote}", UserWarning, stacklevel=3)


def _write_header_3(file: IO[bytes], fields: dict[str, Any]) -> None:
    text = f"{ {key: fields[key] for key in sorted(fields)} }".encode()
    start = len(npy.magic(3, 0)) + 4
    text += b" " * (-(start + len(text) + 1) % ALIGN_BYTES) + b"\n"
    file.write(npy.magic(3, 0) + struct.pack("<I", len(text)) + text)


class MappedNpz(np.lib.npyio.NpzFile):
    """An open `.npz` file whose uncompressed members are mapped where they lie in it."""

    def __init__(
        self, cls: type[memmap], path: str, mode: str, given: tuple[Any, ...], limit: int
    ) -> None:
        allow_pickle, fix_imports, encoding = given
        self._mapped = cls, path, mode, limit
        super().__init__(
            open(path, "rb"),
            own_fid=True,
            allow_pickle=allow_pickle,
            pickle_kwargs={"encoding": encoding, "fix_imports": fix_imports},
            max_header_size=limit,
        )

    def __getitem__(self, key: str) -> Any:
        """The array of a member: mapped, or where it is compressed or of objects, read."""
        found = self._member(key)
        return super().__getitem__(key) if found is None else found

    def _member(self, key: str) -> memmap | None:
        assert self.zip is not None, "the file is closed"
        names = set(self.zip.namelist())
        name = key if key in names else f"{key}.npy"
        if name not in names:
            return None
        info = self.zip.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            return None
        cls, path, mode, limit = self._mapped
        with open(path, "rb") as file:
            file.seek(_data_at(file, info))
            if file.read(len(npy.MAGIC_PREFIX)) != npy.MAGIC_PREFIX:
                return None
            file.seek(-len(npy.MAGIC_PREFIX), os.SEEK_CUR)
            try:
                dtype, shape, fortran = read_header(file, limit)
            except ValueError:
                return None  # of objects, or damaged: numpy says which
            offset = file.tell()
        return cls(path, dtype, mode, offset, shape, "F" if fortran else "C")


def _data_at(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin: behind its local header, whose lengths are its own."""
    file.seek(info.header_offset)
    header = file.read(LOCAL_HEADER.size)
    signature, name_bytes, extra_bytes = LOCAL_HEADER.unpack(header.ljust(LOCAL_HEADER.size, b"\0"))
    if signature != LOCAL_SIGNATURE:
        raise zipfile.BadZipFile(f"the local header of {info.filename!r} is damaged")
    return info.header_offset + LOCAL_HEADER.size + int(name_bytes) + int(extra_bytes)
