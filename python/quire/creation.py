"""New files for arrays: what mode "w+" does before it maps."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quire.errors import ModeError, SourceError
from quire.layout import ARRAY_BYTES_MAX, ArrayLayout, require_dtype, require_order, shape_of
from quire.npy import header_of
from quire.store.resolve import local_path, refuse_options

if TYPE_CHECKING:
    from collections.abc import Mapping as Options

    import numpy.typing as npt

    from quire.layout import ShapeLike
    from quire.store.resolve import Source

__all__ = ["NewFile", "RawShape", "plan"]


@dataclass(frozen=True)
class RawShape:
    """How the user describes bytes without a header: see `quire.open`."""

    dtype: npt.DTypeLike | None = None
    shape: ShapeLike | None = None
    offset: int = 0
    order: str = "C"


@dataclass(frozen=True)
class NewFile:
    """A file that can be made: nothing of it is on the disk yet."""

    path: str
    name: str
    header: bytes
    layout: ArrayLayout
    raw: RawShape
    """How to open it."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the file."""
        return self.layout.offset_bytes + self.layout.size_bytes

    def make(self) -> None:
        """Makes the file, of zeros behind its header; one that is there is emptied, not replaced.

        Raises:
            quire.SourceError: it cannot be made; ``errno`` says why. What was there is there still.
        """
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            with open(descriptor, "wb") as file:
                # First to a length that is refused, if any is, while the old bytes are there.
                file.truncate(max(self.size_bytes, os.fstat(descriptor).st_size))
                file.truncate(0)
                file.write(self.header)
                file.truncate(self.size_bytes)
        except OSError as error:
            raise SourceError(
                f"the file cannot be made: {error.strerror}", source=self.name, errno=error.errno
            ) from error


def plan(source: Source, raw: RawShape, storage_options: Options[str, object] | None) -> NewFile:
    """The file of an array of zeros.

    Without ``dtype`` the elements are bytes, as in `numpy.memmap`. A name that ends in ".npy" gets
    a header and then describes itself.

    Raises:
        quire.ModeError: the source is no local path, or no shape was given.
        quire.SourceError: ``storage_options`` with a path.
        quire.FormatError: the elements are objects, or too many for any file.
    """
    name = os.fsdecode(source) if isinstance(source, (str, os.PathLike)) else None
    path = None if name is None else local_path(name)
    if path is None or name is None:
        raise ModeError('mode "w+" makes a local file: give its path')
    refuse_options(storage_options, path)
    if raw.shape is None:
        raise ModeError('mode "w+" makes an array: give its shape= (and dtype=)', source=name)
    shape = shape_of(raw.shape)
    if -1 in shape:
        raise ModeError('mode "w+" needs every length of the shape', source=name)
    dtype = require_dtype(np.dtype("u1" if raw.dtype is None else raw.dtype), name)
    order = require_order(raw.order)
    is_npy = path.endswith(".npy")
    header = header_of(dtype, shape, order) if is_npy else bytes(raw.offset)
    layout = ArrayLayout(dtype, shape, order, len(header), "npy" if is_npy else "raw")
    layout.require_within(ARRAY_BYTES_MAX, name)
    opened = RawShape() if is_npy else RawShape(dtype, shape, raw.offset, order)
    return NewFile(path, name, header, layout, opened)
