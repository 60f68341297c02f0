"""New files for arrays: what mode "w+" does before it maps."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quire.errors import ModeError, SourceError
from quire.layout import ArrayLayout, require_dtype, require_order, shape_of
from quire.npy import header_of
from quire.store.resolve import local_path

if TYPE_CHECKING:
    import numpy.typing as npt

    from quire.layout import ShapeLike
    from quire.store.resolve import Source

__all__ = ["RawShape", "create"]


@dataclass(frozen=True)
class RawShape:
    """How the user describes bytes without a header: see `quire.open`."""

    dtype: npt.DTypeLike | None = None
    shape: ShapeLike | None = None
    offset: int = 0
    order: str = "C"


def create(source: Source, raw: RawShape) -> RawShape:
    """Makes the file of an array of zeros, replacing one that is there; returns how to open it.

    Without ``dtype`` the elements are bytes, as in `numpy.memmap`. A name that ends in ".npy" gets
    a header and then describes itself.

    Raises:
        quire.ModeError: the source is no local path, or no shape was given.
        quire.SourceError: the file cannot be made; ``errno`` says why.
    """
    name = os.fsdecode(source) if isinstance(source, (str, os.PathLike)) else None
    path = None if name is None else local_path(name)
    if path is None or name is None:
        raise ModeError('mode "w+" makes a local file: give its path')
    if raw.shape is None:
        raise ModeError('mode "w+" makes an array: give its shape= (and dtype=)', source=name)
    shape = shape_of(raw.shape)
    if -1 in shape:
        raise ModeError('mode "w+" needs every length of the shape', source=name)
    dtype = require_dtype(np.dtype("u1" if raw.dtype is None else raw.dtype), name)
    order = require_order(raw.order)
    header = header_of(dtype, shape, order) if path.endswith(".npy") else bytes(raw.offset)
    layout = ArrayLayout(dtype, shape, order, len(header), "npy")
    try:
        with open(path, "wb") as file:
            file.write(header)
            file.truncate(len(header) + layout.size_bytes)
    except OSError as error:
        raise SourceError(
            f"the file cannot be made: {error.strerror}", source=name, errno=error.errno
        ) from error
    return RawShape() if path.endswith(".npy") else RawShape(dtype, shape, raw.offset, order)
