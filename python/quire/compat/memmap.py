"""`memmap`, `open_memmap` and `load` with the interface of numpy's.

A `memmap` is an array over a mapping of quire's. Of a local file that is `quire.map`: the kernel
pages it, truncation raises, and the advice it gets follows the touches. A URL, a `quire.Store`, or
a file whose name ends in ".zst" goes through `quire.open`, which fetches and decompresses.

It is a `numpy.ndarray`, but not a `numpy.memmap`: what asks for that class means to open
``filename`` again by itself, with a plain map of the operating system. ``array`` is the same memory
as an exact `numpy.ndarray`, for libraries that ask for that type.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import operator
import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

import quire
from quire.compat.memmap_npy import MappedNpz, byte_bounds, numpy_load, read_header, write_header
from quire.compat.memmap_source import Window, map_file, map_source, reopened, source_of

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

    import numpy.typing as npt

__all__ = ["load", "memmap", "open_memmap"]

STANDARD_MMAP = mmap.mmap
MODES = {"readonly": "r", "copyonwrite": "c", "readwrite": "r+", "write": "w+"}


class memmap(np.ndarray[Any, Any]):  # noqa: N801 (the name of numpy's)
    """An array in a file, by the arguments of `numpy.memmap`.

    Beyond numpy's: `close` and ``with``; `advise`; it pickles as a reference, never its bytes, so
    that a worker maps the file itself; dask names what is read-only by file and time, and does not
    hash it.

    Args:
        filename: a path, an open file, a URL, or a `quire.Store`.
        dtype: type of the elements.
        mode: "r", "r+", "w+" or "c".
        offset: bytes before the first element.
        shape: lengths; one-dimensional, to the end of the file, when absent.
        order: "C" or "F".

    Raises:
        ValueError: no such mode, no shape for "w+", a file that does not hold the array.
        OSError: the file cannot be opened or mapped.
        quire.Error: a URL, a store, or what is compressed cannot be opened.

    >>> import numpy
    >>> numpy.arange(6, dtype="f4").tofile("/tmp/quire-example.bin")
    >>> with memmap("/tmp/quire-example.bin", "f4", "r", shape=(2, 3)) as mapped:
    ...     mapped
    memmap([[0., 1., 2.],
            [3., 4., 5.]], dtype=float32)
    """

    __array_priority__ = -100.0

    _window: Window | None
    filename: str | Path | None
    offset: int | None
    mode: str | None

    def __new__(
        cls,
        filename: Any,
        dtype: npt.DTypeLike = np.uint8,
        mode: str = "r+",
        offset: int = 0,
        shape: Any = None,
        order: Any = "C",
    ) -> Self:
        """Maps the file."""
        mode = MODES.get(mode, mode)
        if mode not in MODES.values():
            known = [*MODES.values(), *MODES]
            raise ValueError(f"mode must be one of {known!r} (got {mode!r})")
        if mode == "w+" and shape is None:
            raise ValueError("shape must be given if mode == 'w+'")
        element = np.dtype(dtype)
        if element.hasobject:
            raise ValueError(
                f"an array of dtype {element} holds Python objects, whose bytes mean nothing in a "
                "file: save it with numpy.save and allow_pickle"
            )
        offset = operator.index(offset)
        lengths = None if shape is None else _lengths(shape)
        if (source := source_of(filename)) is not None:
            window = map_source(source, mode, element, lengths, offset, order)
            lengths = window.shape
        else:
            count = -1 if lengths is None else math.prod(lengths)
            window = map_file(filename, mode, offset, count, element.itemsize)
            lengths = window.shape if lengths is None else lengths
        self = super().__new__(cls, lengths, element, window.buffer, window.at, order=order)
        self._window, self.offset, self.mode = window, offset, mode
        self.filename = window.filename
        tell_libraries()
        return self

    def __array_finalize__(self, obj: object) -> None:
        if isinstance(obj, memmap) and obj._window is not None and np.may_share_memory(self, obj):
            self._window, self.filename = obj._window, obj.filename
            self.offset, self.mode = obj.offset, obj.mode
        else:
            self._window = self.filename = self.offset = self.mode = None

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        """An ordinary array of what a function made of this one, as numpy does."""
        array = super().__array_wrap__(array, context)
        if self is array or type(self) is not memmap:
            return array
        if return_scalar:
            return array[()]
        return array.view(np.ndarray)

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if type(found) is memmap and found._window is None:
            return found.view(np.ndarray)
        return found

    @property
    def _mmap(self) -> quire.Mapping | None:
        """What is mapped; None for an array that shows no file."""
        return None if self._window is None else self._window.mapping

    @property
    def array(self) -> np.ndarray[Any, Any]:
        """The same memory as an exact `numpy.ndarray`."""
        return self.view(np.ndarray)

    @property
    def closed(self) -> bool:
        """Whether `close` was called, on it or on an array of the same file."""
        return self._window is not None and self._window.closed

    def flush(self) -> None:
        """Writes back what was changed, and makes it durable; nothing where no file is to change.

        Raises:
            quire.SyncError: it could not.
        """
        if self._window is not None:
            self._window.flush()

    def close(self) -> None:
        """Flushes, and ends the use of the file for this array and all its views.

        Where the kernel pages it, memory goes back at once, and a later touch of any of them raises
        `quire.ProtectionError`. What came through `quire.open` ends with its last view. Does
        nothing the second time.

        Raises:
            quire.SyncError: what was changed could not be written.
        """
        if self._window is not None:
            self._window.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advise(self, advice: str) -> None:
        """Says how this part of the file is going to be touched, as `quire.Mapping.advise` has it.

        There is seldom need: where touches are scattered, or walk, the kernel is told by itself.

        Raises:
            ValueError: no such advice, or the array shows no file.
        """
        if self._window is None:
            raise ValueError("the array shows no file: there is nothing to advise")
        part = byte_bounds(self) if self.size else (0, 0)
        self._window.advise(advice, *part)

    def __reduce__(self) -> Any:
        """Pickles where the bytes are, never the bytes; unpickling maps them again.

        In mode "c" that is the file as it is, without what was changed here.

        Raises:
            TypeError: the file has no name.
        """
        window = self._window
        if window is None:
            return super().__reduce__()
        low, high = byte_bounds(self)
        address = self.__array_interface__["data"][0]
        recipe = window.recipe(low, high - low)
        layout = (self.shape, self.dtype, self.strides, address - low, self.flags.writeable)
        return _unpickled, (type(self), recipe, layout, self.mode)

    def __reduce_ex__(self, _: Any) -> Any:
        return self.__reduce__()

    def __getattr__(self, name: str) -> Any:
        # What dask asks for before it makes a token, which it may be imported after this array for.
        if name in ("__dask_graph__", "chunks"):
            tell_libraries()
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def open_memmap(
    filename: Any,
    mode: str = "r+",
    dtype: npt.DTypeLike | None = None,
    shape: Any = None,
    fortran_order: bool = False,
    version: tuple[int, int] | None = None,
    *,
    max_header_size: int = 10_000,
) -> memmap:
    """A `.npy` file as a `memmap`, by the arguments of `numpy.lib.format.open_memmap`.

    Raises:
        ValueError: it is no such file, or holds Python objects.
        OSError: it cannot be opened.

    >>> import numpy
    >>> numpy.save("/tmp/quire-example.npy", numpy.arange(3))
    >>> open_memmap("/tmp/quire-example.npy", "r")
    memmap([0, 1, 2])
    """
    if hasattr(filename, "read"):
        raise ValueError(
            "Filename must be a string or a path-like object.  Memmap cannot use existing file "
            "handles."
        )
    if (source := source_of(filename)) is not None:
        return _whole(memmap, map_source(source, MODES.get(mode, mode)), MODES.get(mode, mode))
    path = os.fspath(filename)
    if "w" in mode:
        element = np.dtype(dtype)
        if element.hasobject:
            raise ValueError("Array can't be memory-mapped: Python objects in dtype.")
        lengths = _lengths(shape)
        with open(path, mode + "b") as file:
            write_header(file, element, lengths, fortran_order, version)
            offset = file.tell()
        mode = "r+"
    else:
        with open(path, "rb") as file:
            element, lengths, fortran_order = read_header(file, max_header_size)
            offset = file.tell()
    order = "F" if fortran_order else "C"
    return memmap(filename, element, mode, offset, lengths, order)


def load(
    file: Any,
    mmap_mode: Any = None,
    allow_pickle: bool = False,
    fix_imports: bool = True,
    encoding: str = "ASCII",
    *,
    max_header_size: int = 10_000,
) -> Any:
    """What `numpy.load` does; with ``mmap_mode`` the array is a `memmap`.

    Members of an uncompressed `.npz` file are mapped where they lie, with "r" and "c"; others are
    read into memory, as numpy reads all of them. A URL or a file ".npy.zst" is mapped by
    `quire.open`.

    Raises:
        As `numpy.load`, `open_memmap`.
    """
    given: tuple[Any, ...] = (allow_pickle, fix_imports, encoding)
    if mmap_mode and not hasattr(file, "read"):
        limit = sys.maxsize if allow_pickle else max_header_size
        if source_of(file) is not None:
            return open_memmap(file, mmap_mode)
        with open(os.fspath(file), "rb") as opened:
            magic = opened.read(6)
        if magic == np.lib.format.MAGIC_PREFIX:
            return open_memmap(file, mmap_mode, max_header_size=limit)
        if magic.startswith(b"PK") and mmap_mode in ("r", "c"):
            return MappedNpz(memmap, os.fspath(file), mmap_mode, given, limit)
    return numpy_load(file, mmap_mode, *given, max_header_size=max_header_size)


def _lengths(shape: Any) -> tuple[int, ...]:
    with contextlib.suppress(TypeError):
        return (operator.index(shape),)
    return tuple(operator.index(length) for length in shape)


def _whole(cls: type[memmap], window: Window, mode: str) -> memmap:
    """The array that a source describes itself."""
    self = np.ndarray.__new__(
        cls, window.shape, window.dtype, window.buffer, window.at, order=window.order
    )
    self._window, self.filename, self.offset, self.mode = window, None, window.at, mode
    tell_libraries()
    return self


def _unpickled(
    cls: type[memmap], recipe: tuple[Any, ...], layout: tuple[Any, ...], mode: str
) -> memmap:
    window = reopened(recipe)
    shape, dtype, strides, first, writable = layout
    self = np.ndarray.__new__(cls, shape, dtype, window.buffer, window.at + first, strides=strides)
    self._window, self.filename = window, window.filename
    self.offset, self.mode = window.offset, "r+" if mode == "w+" else mode
    if not writable:
        self.flags.writeable = False
    tell_libraries()
    return self


def _token(array: memmap) -> Any:
    """What tells an array from others without a look at its bytes; None where they may change."""
    window = array._window
    if window is None or array.mode != "r" or not array.size:
        return None
    low, high = byte_bounds(array)
    first = array.__array_interface__["data"][0] - low
    named = window.version(low, high - low)
    return named and ("quire.memmap", *named, first, array.shape, array.strides, array.dtype.str)


def tell_libraries() -> None:
    """Has libraries that are imported by now know of the class: what they can do with numpy's.

    dask names read-only arrays by `_token`. joblib, where this class is in the place of numpy's,
    sends a path for it, if it finds a map at the end of its bases: it looks for `mmap.mmap`, by the
    name that it has imported. Arrays of numpy's end in the standard one, whatever that name is.
    """
    tokens = sys.modules.get("dask.tokenize")
    if tokens is not None and memmap not in tokens.normalize_token._lookup:
        hashed = tokens.normalize_token.dispatch(np.ndarray)
        tokens.normalize_token.register(memmap, lambda array: _token(array) or hashed(array.array))
    reducer = sys.modules.get("joblib._memmapping_reducer")
    if reducer is not None and isinstance(getattr(reducer, "mmap", None), type):
        maps = (reducer.mmap, STANDARD_MMAP, quire.KernelMapping)
        reducer.mmap = maps  # type: ignore[attr-defined]
