"""What a `memmap` shows: a window of a local file, or all of a source that `quire.open` maps."""

from __future__ import annotations

import errno
import os
import platform
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import quire
from quire.compat.system_errors import as_system, require_addresses

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Window", "map_file", "map_source", "reopened", "source_of"]

FLAGS = {
    "r": os.O_RDONLY,
    "c": os.O_RDONLY,
    "r+": os.O_RDWR,
    "w+": os.O_RDWR | os.O_CREAT | os.O_TRUNC,
}
PERMISSIONS = 0o666


class Window:
    """Bytes that are mapped, and how to map them again; arrays share it.

    Attributes:
        mapping: the mapping.
        buffer: its bytes; keeps it mapped while arrays are alive.
        at: where in it the array begins.
        offset: the byte of the file that is the first of the mapping.
        mode: of the first array.
        filename: as of `numpy.memmap`.
        closed: whether `close` was called.
        shape: of the array; of a local file, its elements.
        dtype, order: of the array, where the source describes it.
    """

    __slots__ = (
        "at", "buffer", "closed", "dtype", "filename", "mapping", "mode", "offset", "order",
        "path", "shape",
    )  # fmt: skip

    def __init__(self, mapping: quire.Mapping, mode: str, offset: int = 0) -> None:
        self.mapping = mapping
        self.buffer = memoryview(mapping)
        self.mode = mode
        self.offset = offset
        self.at = 0
        self.closed = False
        self.filename: str | Path | None = None
        self.path: str | None = None
        self.shape: tuple[int, ...] = ()
        self.dtype: np.dtype[Any] | None = None
        self.order: Any = "C"

    @property
    def address(self) -> int:
        """Of the first byte of the mapping."""
        return self.mapping.address

    def flush(self) -> None:
        """Makes durable what was written for the file."""
        if self.mode != "c" and self.mapping.writable and not self.closed:
            self.mapping.sync()

    def close(self) -> None:
        """Ends the use of it; the addresses stay held while arrays are alive."""
        if self.closed:
            return
        self.flush()
        self.closed = True
        if isinstance(self.mapping, quire.KernelMapping):
            self.mapping.advise("dontneed")
            self.mapping.protect("none")
        else:
            self.mapping.unmap_when_idle()

    def advise(self, advice: str, low: int, high: int) -> None:
        """Gives advice about a range of addresses, or about all where it can be about that only."""
        if isinstance(self.mapping, quire.KernelMapping):
            start = low - self.address
            self.mapping.advise(advice, slice(start, start + high - low))
        else:
            self.mapping.advise(advice)

    def recipe(self, low: int, length: int) -> tuple[Any, ...]:
        """What `reopened` maps a range of addresses by."""
        first = low - self.address
        if not isinstance(self.mapping, quire.KernelMapping):
            return (self.mapping, self.mode, first)
        if self.path is None:
            raise TypeError(
                "this memmap is of a file without a name, which no other process can open: map a "
                "path, or pickle numpy.array(it), a copy"
            )
        found = os.fstat(self.mapping.descriptor)
        identity = (platform.node(), found.st_dev, found.st_ino)
        mode = "r+" if self.mode == "w+" else self.mode
        return (self.filename, self.path, mode, self.offset + first, length, identity)

    def version(self, low: int, length: int) -> tuple[Any, ...] | None:
        """What changes when the bytes of a range of addresses do; None where nothing tells."""
        first = low - self.address
        if not isinstance(self.mapping, quire.KernelMapping):
            version = self.mapping.version
            return None if version is None else (self.mapping.source, version, first, length)
        found = os.fstat(self.mapping.descriptor)
        of_file = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        return (self.path, *of_file, self.offset + first, length)


def source_of(filename: Any) -> Any:
    """What `quire.open` is to map; None for a local file, that the kernel maps."""
    if isinstance(filename, quire.Store):
        return filename
    if not isinstance(filename, (str, os.PathLike)):
        return None
    text = os.fspath(filename)
    if isinstance(text, str) and ("://" in text or text.endswith(".zst")):
        return filename
    return None


def map_source(
    source: Any,
    mode: str,
    dtype: np.dtype[Any] | None = None,
    shape: tuple[int, ...] | None = None,
    offset: int = 0,
    order: Any = "C",
) -> Window:
    """Maps a source through `quire.open`."""
    mapping = quire.open(source, mode=mode, dtype=dtype, shape=shape, offset=offset, order=order)
    window = Window(mapping, "r+" if mode == "w+" else mode)
    window.at = mapping.array.__array_interface__["data"][0] - window.address
    window.shape, window.dtype, window.order = mapping.shape, mapping.dtype, mapping.order
    return window


class Opened:
    """A descriptor, and what errors call its file."""

    __slots__ = ("_descriptor", "name")

    def __init__(self, descriptor: int, name: object) -> None:
        self._descriptor = descriptor
        self.name = name

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor


def map_file(filename: Any, mode: str, offset: int, count: int, itemsize: int) -> Window:
    """Maps the elements of a local file from ``offset`` on, made longer where it may be.

    ``count`` is -1 for all to its end.

    Raises:
        OSError: it cannot be opened, made longer or mapped.
        OverflowError, ValueError: it does not hold so much.
    """
    if hasattr(filename, "read"):
        filename.seek(0, os.SEEK_END)
        size, descriptor, path = filename.tell(), filename.fileno(), None
    else:
        path = os.fspath(filename)
        descriptor = os.open(path, FLAGS[mode] | os.O_CLOEXEC, PERMISSIONS)
    try:
        if path is not None:
            found = os.fstat(descriptor)
            if stat.S_ISDIR(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            size = found.st_size
        count, wanted = _extent(size, mode, offset, count, itemsize)
        if mode in ("r+", "w+") and size < offset + wanted:
            _lengthen(filename if path is None else None, descriptor, offset + wanted)
        name, filename = _names(filename, path)
        window = _map_opened(descriptor, name, filename, mode, offset, wanted)
    finally:
        if path is not None:
            os.close(descriptor)
    window.shape = (count,)
    return window


def _map_opened(
    descriptor: int, name: str | None, filename: Any, mode: str, offset: int, length: int
) -> Window:
    require_addresses(length)
    try:
        mapping = quire.map(
            Opened(descriptor, name or f"descriptor {descriptor}"),
            max(length, 1),
            sharing="private" if mode == "c" else "shared",
            protection="r" if mode == "r" else "rw",
            offset=offset,
        )
    except quire.Error as refused:
        raise as_system(refused, filename) from refused
    window = Window(mapping, mode, offset)
    window.path, window.filename = name, filename
    return window


def _extent(length: int, mode: str, offset: int, count: int, itemsize: int) -> tuple[int, int]:
    """Elements of the array, and the bytes that the file must have for it from the offset on."""
    if offset < 0:
        raise ValueError(f"offset {offset} is negative: it counts from the start of the file")
    if count < 0:
        left = length - offset
        if left < 0:
            raise ValueError(f"the offset {offset} is past the end of the file, {length} bytes")
        if not itemsize or left % itemsize:
            raise ValueError("Size of available data is not a multiple of the data-type size.")
        count = left // itemsize
    wanted = count * itemsize
    if mode in ("r+", "w+"):
        return count, max(wanted, 1 - offset)
    if length == 0:
        raise ValueError("cannot mmap an empty file")
    if offset + wanted > length:
        raise ValueError(
            f"mmap length is greater than file size: the array ends at byte {offset + wanted}, the "
            f"file at {length}; it is truncated, or the shape is another"
        )
    return count, wanted


def _lengthen(file: Any, descriptor: int, length: int) -> None:
    if file is None:
        os.ftruncate(descriptor, length)
        return
    file.seek(length - 1)
    file.write(b"\0")
    file.flush()


def _names(filename: Any, path: Any) -> tuple[str | None, str | Path | None]:
    """The absolute path of the file, and as numpy calls it."""
    if isinstance(filename, os.PathLike):
        resolved = Path(filename).resolve()
        return str(resolved), resolved
    name = path if path is not None else getattr(filename, "name", None)
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    if not isinstance(name, str):
        return None, None
    found = os.path.abspath(name)  # noqa: PTH100 (as numpy names it)
    return found, found


def reopened(recipe: tuple[Any, ...]) -> Window:
    """Maps again what `Window.recipe` tells; a file stays as it is found.

    Raises:
        OSError: it cannot be opened or mapped.
        quire.ChangedError: another file has the path by now.
        quire.TruncatedError: the file ends before the array.
    """
    if isinstance(recipe[0], quire.Mapping):
        mapping, mode, first = recipe
        window = Window(mapping, mode)
        window.at = first
        return window
    filename, path, mode, offset, length, identity = recipe
    descriptor = os.open(path, FLAGS[mode] | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if identity[0] == platform.node() and identity[1:] != (found.st_dev, found.st_ino):
            raise quire.ChangedError(
                "another file has this path since the array was pickled: map that one, and send it",
                source=path,
            )
        end = offset + length
        if found.st_size < end:
            raise quire.TruncatedError(
                f"the array ends at byte {end}, the file by now at {found.st_size}: write the file "
                "again, or map what is left, and send that",
                source=path,
            )
        return _map_opened(descriptor, path, filename, mode, offset, length)
    finally:
        os.close(descriptor)
