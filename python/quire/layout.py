"""Where an array lies in the bytes of a source, and how: the layout of raw bytes."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from quire.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

__all__ = [
    "ARRAY_BYTES_MAX",
    "ArrayLayout",
    "Order",
    "ShapeLike",
    "raw_layout",
    "require_dtype",
    "require_order",
    "shape_of",
]

Order: TypeAlias = Literal["C", "F"]
ShapeLike: TypeAlias = "int | Sequence[int]"

ARRAY_BYTES_MAX = (1 << 63) - 1
DIMENSIONS_MAX = 64 if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else 32


@dataclass(frozen=True)
class ArrayLayout:
    """An array in the bytes of a source.

    Attributes:
        dtype: the type of an element; holds no Python objects.
        shape: lengths, `()` for a single element.
        order: "C" when the last index varies fastest in memory, "F" when the first does.
        offset_bytes: where the first element begins in the source.
        kind: "npy" or "raw".
    """

    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    order: Order
    offset_bytes: int
    kind: str

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the array, without a header."""
        return self.count * self.dtype.itemsize

    def require_within(self, source_bytes: int, source: str) -> None:
        """Makes sure that the array lies within a source of ``source_bytes``.

        Raises:
            quire.FormatError: it does not.
        """
        end = self.offset_bytes + self.size_bytes
        if end > min(source_bytes, ARRAY_BYTES_MAX):
            raise FormatError(
                f"an array of shape {self.shape} and dtype {self.dtype} from byte "
                f"{self.offset_bytes} ends at byte {end:,}, but the source has "
                f"{source_bytes:,}: it is truncated, or the shape is another",
                source=source,
            )

    def view(self, memory: memoryview) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
        """The array over ``memory``, the bytes of the whole source; read-only if that is.

        An array without bytes refers to no memory: the buffer protocol has no empty views.
        """
        if self.size_bytes == 0:
            empty = np.empty(self.shape, self.dtype, self.order)
            empty.flags.writeable = not memory.readonly
            return empty
        flat = np.frombuffer(memory, self.dtype, self.count, self.offset_bytes)
        return flat.reshape(self.shape, order=self.order)


def raw_layout(
    source_bytes: int,
    source: str,
    dtype: npt.DTypeLike,
    shape: ShapeLike | None,
    offset: int,
    order: str,
) -> ArrayLayout:
    """The layout of raw bytes as the user describes them.

    Without ``shape`` the array is one-dimensional and takes all bytes from ``offset``; one length
    of -1 is worked out from the others.

    Raises:
        quire.FormatError: the bytes do not hold such an array.
        ValueError: the order is neither "C" nor "F"; a negative offset or length.
        TypeError: the dtype holds Python objects.

    >>> raw_layout(80, "a.bin", "f4", (-1, 5), 0, "C").shape
    (4, 5)
    """
    order = require_order(order)
    offset = operator.index(offset)
    if offset < 0:
        raise ValueError(f"offset {offset} is negative: it counts from the start of the source")
    element = require_dtype(np.dtype(dtype), source)
    left_bytes = source_bytes - offset
    if left_bytes < 0:
        raise FormatError(
            f"the offset {offset:,} is past the end of the source, {source_bytes:,} bytes",
            source=source,
        )
    lengths = shape_of(-1 if shape is None else shape)
    if -1 in lengths:
        known_bytes = math.prod(length for length in lengths if length != -1) * element.itemsize
        if known_bytes == 0 or left_bytes % known_bytes:
            raise FormatError(
                f"{left_bytes:,} bytes are no whole number of pieces of {known_bytes:,} (dtype "
                f"{element}, shape {lengths}): give another dtype, shape or offset",
                source=source,
            )
        unknown = left_bytes // known_bytes
        lengths = tuple(unknown if length == -1 else length for length in lengths)
    layout = ArrayLayout(element, lengths, order, offset, "raw")
    layout.require_within(source_bytes, source)
    return layout


def require_order(order: str) -> Order:
    """``order``, if it is one.

    Raises:
        ValueError: it is neither "C" nor "F".
    """
    if order in ("C", "F"):
        return "F" if order == "F" else "C"
    raise ValueError(f'order {order!r} is neither "C" nor "F"')


def shape_of(shape: ShapeLike) -> tuple[int, ...]:
    """The lengths that a shape given as an int or a sequence means; one may be -1.

    Raises:
        ValueError, TypeError: it is no shape.
    """
    try:
        lengths: tuple[int, ...] = (operator.index(shape),)  # type: ignore[arg-type]
    except TypeError:
        lengths = tuple(map(operator.index, shape))  # type: ignore[arg-type]
    if any(length < -1 for length in lengths) or lengths.count(-1) > 1:
        raise ValueError(f"shape {shape!r} needs lengths of at least 0, of which one may be -1")
    if len(lengths) > DIMENSIONS_MAX:
        raise ValueError(f"a shape of {len(lengths)} dimensions is more than numpy has")
    return lengths


def require_dtype(dtype: np.dtype[np.generic], source: str) -> np.dtype[np.generic]:
    """``dtype``, if bytes can be an array of it.

    Raises:
        quire.FormatError: it holds Python objects, whose bytes are addresses in another process.
    """
    if dtype.hasobject:
        raise FormatError(
            f"the array has dtype {dtype}, which holds Python objects: quire maps bytes and never "
            "unpickles; load it with numpy and save its numbers with a plain dtype",
            source=source,
        )
    return dtype
