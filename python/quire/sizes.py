"""Sizes in bytes as people write them: an int, or text such as "64 MiB"."""

from __future__ import annotations

import operator
import re
from typing import SupportsIndex, TypeAlias

__all__ = ["SizeLike", "checked_span", "format_size", "parse_size"]

SizeLike: TypeAlias = "int | str | SupportsIndex"

BYTES_OF_UNIT = {
    "": 1,
    "b": 1,
    "k": 1 << 10,
    "kb": 10**3,
    "kib": 1 << 10,
    "m": 1 << 20,
    "mb": 10**6,
    "mib": 1 << 20,
    "g": 1 << 30,
    "gb": 10**9,
    "gib": 1 << 30,
    "t": 1 << 40,
    "tb": 10**12,
    "tib": 1 << 40,
    "p": 1 << 50,
    "pb": 10**15,
    "pib": 1 << 50,
    "e": 1 << 60,
    "eb": 10**18,
    "eib": 1 << 60,
}
SIZE_BYTES_MAX = (1 << 63) - 1

_SIZE = re.compile(r"\s*(\d[\d_,]*(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)


def parse_size(size: SizeLike, *, name: str = "size") -> int:
    """The number of bytes that ``size`` means; ``name`` is what errors call it.

    "KiB", "MiB" and the bare letters are powers of 1024; "kB", "MB" powers of 1000.

    Raises:
        ValueError: text that is no size, a negative number, or more than 2**63 - 1 bytes.
        TypeError: neither an integer nor text.

    >>> parse_size("64 MiB"), parse_size("1.5GB"), parse_size(4096)
    (67108864, 1500000000, 4096)
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        unit = match[2].lower() if match else None
        if size == "auto":
            raise ValueError(
                '"auto" is for all mappings of the process together: quire.set_budget("auto"); '
                f"the {name} here is a size or left out"
            )
        if match is None or unit not in BYTES_OF_UNIT:
            raise ValueError(
                f'{name} {size!r} is no size: give bytes as an int or text such as "64 MiB" '
                "(units: B; kB, MB, GB, TB, PB, EB; KiB, MiB, GiB, TiB, PiB, EiB)"
            )
        number = match[1].replace("_", "").replace(",", "")
        scale = BYTES_OF_UNIT[unit]
        size_bytes = int(float(number) * scale) if "." in number else int(number) * scale
    elif isinstance(size, bool):
        raise TypeError(f'{name} must be an int or text such as "64 MiB", not a bool')
    else:
        try:
            size_bytes = operator.index(size)
        except TypeError:
            raise TypeError(
                f'{name} must be an int or text such as "64 MiB", not {type(size).__name__}'
            ) from None
    if not 0 <= size_bytes <= SIZE_BYTES_MAX:
        raise ValueError(f"{name} of {size_bytes} bytes is outside 0 to {SIZE_BYTES_MAX}")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """``size_bytes`` for a person, in powers of 1024.

    >>> format_size(67108864), format_size(1500), format_size(3)
    ('64.0 MiB', '1.5 KiB', '3 bytes')
    """
    if size_bytes < 1 << 10:
        return f"{size_bytes} bytes" if size_bytes != 1 else "1 byte"
    for unit in ("EiB", "PiB", "TiB", "GiB", "MiB"):
        scale = BYTES_OF_UNIT[unit.lower()]
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes / (1 << 10):.1f} KiB"


def checked_span(offset: int, length: int | None) -> tuple[int, int | None]:
    """Both as they are.

    Raises:
        ValueError: one is negative.
    """
    if offset < 0 or (length is not None and length < 0):
        raise ValueError(f"offset {offset} and length {length} may not be negative")
    return offset, length
