"""`map`: the operating system's own mapping of a file, a device or anonymous memory."""

from __future__ import annotations

import operator
import os
import stat
from typing import TYPE_CHECKING

from quire import _core
from quire.devices import device_bytes
from quire.errors import Error, FormatError
from quire.kernel_mapping import KernelMapping, RawArray, require_cache
from quire.limits import Asked, explained
from quire.map_flags import check_flags, protection_bits
from quire.sizes import SizeLike, parse_size
from quire.store.resolve import require_path, require_true_size

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol, TypeAlias

    import numpy.typing as npt

    from quire.layout import Order, ShapeLike

    class HasDescriptor(Protocol):
        """An open file."""

        def fileno(self) -> int: ...

    Mappable: TypeAlias = "str | os.PathLike[str] | int | HasDescriptor | None"

__all__ = ["Mappable", "map", "mapped"]

OFFSET_UNIT = 4096
OFFSET_END = 1 << 63
ADDRESS_END = 1 << 64
ANONYMOUS = "anonymous memory"


def map(
    source: Mappable = None,
    size: SizeLike | None = None,
    *,
    sharing: str | None = None,
    protection: str | None = None,
    offset: int = 0,
    page_offset: int | None = None,
    dtype: npt.DTypeLike | None = None,
    shape: ShapeLike | None = None,
    order: Order = "C",
    address: int | None = None,
    flags: int = 0,
    reserve: SizeLike | None = None,
    budget: SizeLike | None = None,
    cache: str = "keep",
) -> KernelMapping:
    """Maps a file, a device or anonymous memory as the operating system does (mmap(2)).

    Nothing is faster for plain local files and devices, and nothing stands between the processor
    and its page cache. Beside the standard library's `mmap` it takes any offset, never ends the
    process with SIGBUS, and says which limit was hit.

    Args:
        source: a path, an open file, or its descriptor (which is duplicated); None for anonymous
            memory.
        size: bytes, an int or text such as "64 MiB"; all from ``offset`` on when absent. It may
            go beyond the end of the source: touching what is not there raises
            `quire.TruncatedError`, until the file is long enough.
        sharing: "shared": stores go to the file and are seen by everyone who maps it, children of
            a fork included; "private": they stay here; "shared-validate": "shared", with flags
            that the file system does not know refused. One must be asked for.
        protection: "none", "r", "w", "x" or several of the letters; "rw" for anonymous memory and
            "r" for anything else when absent.
        offset: byte of the source at which the mapping begins, any.
        page_offset: the same in units of 4096 bytes, as mmap2(2) has it.
        dtype: type of the elements of `Mapping.array`; bytes when absent.
        shape: lengths of the array; one may be -1.
        order: "C" or "F".
        address: a hint where to map, or with FIXED and FIXED_NOREPLACE the place.
        flags: others of `quire.MapFlag`.
        reserve: bytes of addresses to hold, so that `KernelMapping.resize` can grow in place.
        budget: bytes of a file that may be resident, see `KernelMapping.set_budget`.
        cache: "keep" or "drop": whether what exceeds the budget stays in the page cache.

    Raises:
        quire.SourceError: the source cannot be opened.
        quire.Error: the kernel refuses; the message names the limit that was hit, its value now,
            and how to raise it.
        ValueError, TypeError: an argument is out of range, or a flag would do nothing.

    Threads: may be called from any thread.

    >>> import pathlib, quire
    >>> pathlib.Path("/tmp/quire-example.bin").write_bytes(b"virtual memory")
    14
    >>> with quire.map("/tmp/quire-example.bin", sharing="shared", offset=8) as mapping:
    ...     bytes(mapping.array)
    b'memory'
    """
    if page_offset is not None:
        if offset:
            raise ValueError("offset and page_offset say the same: give one of them")
        offset = operator.index(page_offset) * OFFSET_UNIT
    return mapped(
        _core.map_kernel,
        source,
        size,
        sharing,
        protection,
        offset,
        dtype,
        shape,
        order,
        address,
        flags,
        reserve,
        budget,
        cache,
    )


def mapped(
    make: Callable[..., _core.KernelRange],
    source: Mappable,
    size: SizeLike | None,
    sharing: str | None,
    protection: str | None,
    offset: int,
    dtype: npt.DTypeLike | None,
    shape: ShapeLike | None,
    order: Order,
    address: int | None,
    flags: int,
    reserve: SizeLike | None,
    budget: SizeLike | None,
    cache: str,
) -> KernelMapping:
    """Maps as `map` does, by a native function of the arguments of mmap(2)."""
    anonymous = source is None
    bits = (3 if anonymous else 1) if protection is None else protection_bits(protection)
    kind = check_flags(sharing, flags and int(flags), anonymous, address)
    if offset < 0 or (anonymous and offset):
        raise ValueError(f"offset {offset}: it counts from the start of a source, which must be")
    if offset >= OFFSET_END:
        raise ValueError(f"offset {offset}: an offset is below 2**63")
    if not 0 <= (address or 0) < ADDRESS_END:
        raise ValueError(f"address {address}: an address is from 0 to 2**64 - 1")
    if cache != "keep":
        require_cache(cache)
    size_bytes = None if size is None else parse_size(size)
    reserve_bytes = 0 if reserve is None else parse_size(reserve, name="reserve")
    of, label = _source_of(source)
    if size_bytes is None and label.startswith("/dev/") and (whole := device_bytes(label)):
        if offset > whole:
            raise ValueError(
                f"offset {offset} lies beyond the end of the source, which has {whole} bytes"
            )
        size_bytes = whole - offset
    try:
        kernel_range = make(of, label, size_bytes, offset, bits, kind, address or 0, reserve_bytes)
    except Error as error:
        asked = Asked(size_bytes or 0, kind, bits, label, reserve_bytes)
        raise explained(error, asked) from None
    except ValueError:
        _require_length(of, label)
        raise
    mapping: KernelMapping = KernelMapping(kernel_range)
    if of is not None and mapping.size_bytes == 0:
        try:
            require_true_size(of, label)
        except BaseException:
            mapping.close()
            raise
    if dtype is not None or shape is not None or budget is not None:
        mapping._raw = RawArray(dtype, shape, order)
        _finish(mapping, budget, cache)
    if isinstance(of, str):
        given = (of, size_bytes, sharing, protection, offset, dtype, shape, order, flags)
        mapping._recipe = remap, (*given, reserve_bytes, budget, cache)
    return mapping


def remap(
    source: str,
    size: int | None,
    sharing: str | None,
    protection: str | None,
    offset: int,
    dtype: npt.DTypeLike | None,
    shape: ShapeLike | None,
    order: Order,
    flags: int,
    reserve: int,
    budget: SizeLike | None,
    cache: str,
) -> KernelMapping:
    """Makes the mapping of an unpickled recipe."""
    return map(
        source,
        size,
        sharing=sharing,
        protection=protection,
        offset=offset,
        dtype=dtype,
        shape=shape,
        order=order,
        flags=flags,
        reserve=reserve,
        budget=budget,
        cache=cache,
    )


def _source_of(source: Mappable) -> tuple[str | int | None, str]:
    """What the core maps, and its name."""
    if type(source) is int:
        return source, f"descriptor {source}"
    if isinstance(source, str):
        return require_path(source), source
    if source is None:
        return None, ANONYMOUS
    if isinstance(source, int) and not isinstance(source, bool):
        return int(source), f"descriptor {source}"
    if isinstance(source, os.PathLike):
        path = require_path(os.fsdecode(source))
        return path, path
    if hasattr(source, "fileno"):
        descriptor = source.fileno()
        return descriptor, str(getattr(source, "name", f"descriptor {descriptor}"))
    raise TypeError(f"a source is a path, an open file, a descriptor or None, not {source!r}")


KINDS = (
    (stat.S_ISDIR, "a folder: name a file in it"),
    (stat.S_ISFIFO, "a pipe, whose bytes are there once: read it"),
    (stat.S_ISSOCK, "a socket: connect to it and read"),
)


def _require_length(source: str | int | None, label: str) -> None:
    """Raises `quire.FormatError` for what has no bytes that could be mapped."""
    if source is None:
        return
    try:
        mode = os.stat(source).st_mode  # noqa: PTH116 (or a descriptor)
    except OSError:
        return
    for is_kind, what in KINDS:
        if is_kind(mode):
            raise FormatError(f"{label} cannot be mapped, as it is {what}", source=label) from None


def _finish(mapping: KernelMapping, budget: SizeLike | None, cache: str) -> None:
    """Raises now what `Mapping.array` would raise later, and sets the budget."""
    try:
        _ = mapping.shape
        if budget is not None:
            mapping.set_budget(budget, cache=cache)
    except BaseException:
        mapping.close()
        raise
