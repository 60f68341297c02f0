r"""The header of a `.npy` file, from any source of bytes.

```
offset  0  \x93NUMPY
        6  major, minor
        8  length of the text: 2 bytes in version 1, 4 in versions 2 and 3, little-endian
        .  a Python dict: {'descr': ..., 'fortran_order': ..., 'shape': ...}, in Latin-1 (version
           3: UTF-8), padded with spaces to a multiple of 64
```

The format is specified by NEP 1. The header may come from anyone, so nothing of it is trusted:
its length is bounded, its text is read as a literal and never evaluated.
"""

from __future__ import annotations

import ast
import io
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from quire.errors import FormatError
from quire.layout import DIMENSIONS_MAX, ArrayLayout, require_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.layout import Order

__all__ = ["MAGIC", "header_of", "is_npy", "read_layout"]

MAGIC = b"\x93NUMPY"
HEADER_BYTES_MAX = 1 << 20
"""Room for a dtype of some ten thousand fields; numpy itself refuses more than 10,000 bytes."""

KEYS = {"descr", "fortran_order", "shape"}
LENGTH_BYTES = {1: 2, 2: 4, 3: 4}

_LONG_INT = re.compile(r"(?<=[0-9])L(?=\s*[,)])")


def is_npy(head: bytes) -> bool:
    """Whether bytes that begin with ``head`` are a `.npy` file."""
    return head.startswith(MAGIC)


def read_layout(read: Callable[[int, int], bytes], source_bytes: int, source: str) -> ArrayLayout:
    """The layout of the array of a `.npy` source.

    ``read(offset, length)`` gives bytes of the source; ``source`` is what errors call it.

    Raises:
        quire.FormatError: the header is damaged, hostile, of an unknown version, describes Python
            objects, or an array that does not fit in the source.
    """
    start = read(0, min(source_bytes, 12))
    major = start[6] if len(start) > 6 else 0
    if not is_npy(start) or len(start) < 8 + LENGTH_BYTES.get(major, 0):
        raise _damaged("it ends within the first bytes", source)
    if major not in LENGTH_BYTES:
        raise FormatError(
            f"the .npy header has version {major}.{start[7]}; versions 1 to 3 are known: save the "
            "array again with numpy.save",
            source=source,
        )
    text_at = 8 + LENGTH_BYTES[major]
    text_bytes = int.from_bytes(start[8:text_at], "little")
    data_at = text_at + text_bytes
    if text_bytes > HEADER_BYTES_MAX:
        raise _damaged(f"it claims {text_bytes:,} bytes, more than {HEADER_BYTES_MAX:,}", source)
    if data_at > source_bytes:
        raise _damaged(f"it claims {text_bytes:,} bytes and the source ends before", source)
    fields = _parse(read(text_at, text_bytes), "utf-8" if major == 3 else "latin-1", source)
    layout = _layout(fields, data_at, source)
    layout.require_within(source_bytes, source)
    return layout


def header_of(dtype: np.dtype[Any], shape: tuple[int, ...], order: Order) -> bytes:
    """The header of a new file with such an array.

    >>> header_of(np.dtype("f4"), (2, 3), "C")[:6] == MAGIC
    True
    """
    fields = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": order == "F",
        "shape": shape,
    }
    buffer = io.BytesIO()
    try:
        np.lib.format.write_array_header_1_0(buffer, fields)
    except ValueError:  # longer than the 65,535 bytes of version 1
        buffer = io.BytesIO()
        np.lib.format.write_array_header_2_0(buffer, fields)
    return buffer.getvalue()


def _parse(text: bytes, encoding: str, source: str) -> dict[str, Any]:
    """The dict of a header; Python 2 wrote lengths as `10L`."""
    try:
        header = text.decode(encoding)
        try:
            fields = ast.literal_eval(header)
        except SyntaxError:
            fields = ast.literal_eval(_LONG_INT.sub("", header))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise _damaged(f"its text is no dict ({type(error).__name__})", source) from error
    if not isinstance(fields, dict) or set(fields) != KEYS:
        raise _damaged(f"its dict must have the keys {', '.join(sorted(KEYS))}", source)
    return fields


def _layout(fields: dict[str, Any], data_at: int, source: str) -> ArrayLayout:
    shape, fortran = fields["shape"], fields["fortran_order"]
    if not isinstance(shape, tuple) or len(shape) > DIMENSIONS_MAX:
        raise _damaged(f"its shape is no tuple of at most {DIMENSIONS_MAX} lengths", source)
    if not all(type(length) is int and 0 <= length < 1 << 63 for length in shape):
        raise _damaged("its shape holds something that is no length", source)
    if not isinstance(fortran, bool):
        raise _damaged("its fortran_order is neither True nor False", source)
    try:
        dtype = np.lib.format.descr_to_dtype(fields["descr"])
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, SyntaxError) as error:
        raise _damaged(f"its descr is no dtype ({type(error).__name__})", source) from error
    plain = require_dtype(dtype, source)
    return ArrayLayout(plain, shape, "F" if fortran else "C", data_at, "npy")


def _damaged(why: str, source: str) -> FormatError:
    return FormatError(
        f"the .npy header is damaged: {why}; get the file again, or give dtype= and shape= to map "
        "its bytes as they are",
        source=source,
    )
