"""The functions of the package: `open`, `set_budget`, `budget`, and what they share with tools."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np

from quire import _core
from quire.creation import RawShape, plan
from quire.errors import ChangedError, FormatError, ModeError, PmapError
from quire.layout import ArrayLayout, raw_layout, require_dtype, require_order, shape_of
from quire.mapping import Mapping
from quire.npy import MAGIC, is_npy, read_layout
from quire.opened_file import map_file, why_not_kernel
from quire.pmap import KERNEL, pmap_for
from quire.sizes import SizeLike, parse_size
from quire.store.resolve import Resolved, resolve

if TYPE_CHECKING:
    from collections.abc import Mapping as Options

    import numpy.typing as npt

    from quire.layout import Order, ShapeLike
    from quire.store.resolve import Source
    from quire.swap import Swap

__all__ = [
    "anonymous",
    "budget",
    "empty",
    "find_layout",
    "mapping_of",
    "open",
    "reopen",
    "require_patience",
    "require_use_of",
    "require_writable",
    "set_budget",
]

MODES = ("r", "r+", "w+", "c")
TIMEOUT_S_MAX = 1 << 31
RETRIES_MAX = 100


def open(
    source: Source,
    *,
    mode: str = "r",
    dtype: npt.DTypeLike | None = None,
    shape: ShapeLike | None = None,
    offset: int = 0,
    order: Order = "C",
    budget: SizeLike | None = None,
    granule: SizeLike | None = None,
    pmap: str | None = None,
    policy: str | None = None,
    swap: Swap | None = None,
    storage_options: Options[str, object] | None = None,
    timeout: float = 60.0,
    retries: int = 2,
) -> Mapping:
    """Maps ``source`` into memory. Nothing is read but headers until the array is touched.

    A `.npy` file describes itself. For anything else give ``dtype``, and ``shape`` when it is not
    one-dimensional; a ``dtype`` given maps the bytes without looking for a `.npy` header. Bytes
    in the Zstandard seekable format are decompressed as they are touched, wherever they lie.

    Args:
        source: a path; a URL (`file`, `http`, `https`, `s3`, `gs`, `az`, or any that fsspec
            knows); or an object of your own subclass of `quire.Store`.
        mode: as in `numpy.memmap`: "r" maps read-only; "r+" writes back to the source what is
            written to the array, at `Mapping.sync` and when pages are evicted (whole granules, or
            hardware pages: map a file for writing once, as two such mappings undo each other's
            writes); "w+" makes the file
            first, of this ``dtype`` and ``shape``, with a header where its name ends in ".npy";
            "c" (copy-on-write) keeps what is written in this mapping, and in its swap file.
        dtype: type of the elements of raw bytes.
        shape: lengths of the array of raw bytes; one may be -1.
        offset: bytes before the first element of raw bytes.
        order: "C" or "F", of raw bytes.
        budget: bytes that may be resident, an int or text such as "64 MiB"; beside it
            `quire.set_budget` bounds all mappings together. Page tables and lists count in it
            (`Statistics.metadata_bytes`); the kernel's own page tables do not.
        granule: bytes that are read at once; chosen by the source when absent.
        pmap: how pages are made present: "kernel", "uffd", "inline", "guard", "mprotect", or
            "soft", which gives no array but `Mapping.read` and `Mapping.write`. When absent it is
            what the environment variable `QUIRE_PMAP` says; or else "kernel" for a local file that
            is not compressed, in all modes but "c", where no budget, granule or policy is given;
            or else the best that works here (see `quire doctor`). With "kernel" the operating
            system pages as for `quire.map`, and the mapping is a `KernelMapping`: the fastest, and
            it shows what others write to the file, but its pages are the system's page cache,
            which `quire.set_budget` does not bound.
        policy: which page goes when the budget is used up: "clock" (when absent), "sieve",
            "s3fifo", "2q", "fifo" or "lru".
        swap: where pages that were written in mode "c" go.
        storage_options: for URLs: credentials, endpoint and the like, as in fsspec and obstore.
        timeout: seconds after which a read that has no answer counts as failed.
        retries: further tries of a read that failed in a way that may pass.

    Raises:
        quire.SourceError: the source cannot be opened.
        quire.FormatError: it does not hold what was asked for; the message says what to do.
        quire.ModeError, quire.PmapError, quire.BudgetError: what was asked cannot be had.
        ValueError, TypeError: an argument is out of range or of the wrong type.

    Threads: may be called from any thread.

    >>> import numpy
    >>> numpy.arange(10, dtype="i4").tofile("/tmp/quire-example.bin")
    >>> with open("/tmp/quire-example.bin", dtype="i4", shape=(-1, 5)) as mapping:
    ...     mapping.array[1].tolist()
    [5, 6, 7, 8, 9]
    """
    if mode not in MODES:
        raise ModeError(f"{mode!r} is no mode: there are {', '.join(map(repr, MODES))}")
    require_patience(timeout, retries)
    require_use_of(swap, mode)
    raw = RawShape(dtype, shape, offset, order)
    wanted = pmap_for(pmap, granule=granule, policy=policy, swap=swap)
    how = _how(budget, granule, None if wanted == KERNEL else wanted, policy, swap)
    how |= {"retries": retries, "mode": "r+" if mode == "w+" else mode}
    if mode == "w+":
        new = plan(source, raw, storage_options)
        # What is wrong with how it is to be mapped is found with zeros in the file's place.
        Mapping(_core.open_zero(new.size_bytes, new.name), new.layout, **how).close()
        new.make()
        raw, mode = new.raw, "r+"
    resolved = resolve(
        source,
        storage_options=storage_options,
        budget_bytes=how["budget_bytes"],
        timeout_s=timeout,
        writable=mode == "r+",
    )
    try:
        require_writable(resolved.store, mode)
        layout = find_layout(resolved.store, raw)
        given = {
            "mode": mode,
            "dtype": raw.dtype,
            "shape": raw.shape,
            "offset": raw.offset,
            "order": raw.order,
            "budget": budget,
            "granule": granule,
            "pmap": pmap,
            "policy": policy,
            "swap": swap,
            "storage_options": storage_options,
            "timeout": timeout,
            "retries": retries,
        }
        recipe = _recipe(resolved, given)
        if wanted == KERNEL and _kernel_pages(resolved, given):
            return map_file(resolved, layout, raw, mode, budget, recipe)
        return Mapping(resolved.store, layout, recipe, **how)
    except BaseException:
        resolved.store.close()
        raise


def _kernel_pages(resolved: Resolved, given: dict[str, Any]) -> bool:
    """Whether pmap "kernel", where it is wanted, is the one for this source.

    Raises:
        quire.PmapError: it was asked for by name, and cannot map the source.
    """
    why = why_not_kernel(resolved)
    if given["pmap"] != KERNEL:
        return why is None and given["mode"] != "c" and given["budget"] is None
    if why is not None:
        raise PmapError(
            f'pmap "kernel" cannot map this source, as {why}: leave pmap out',
            source=resolved.store.label,
        )
    return True


def anonymous(
    size: SizeLike,
    *,
    budget: SizeLike | None = None,
    granule: SizeLike | None = None,
    pmap: str | None = None,
    policy: str | None = None,
    swap: Swap | None = None,
) -> Mapping:
    """Maps ``size`` bytes of zeroed memory; what exceeds ``budget`` is swapped.

    The size may be larger than the machine's memory. The array of the mapping is one of bytes; see
    `empty` for one of a shape and dtype. Nothing is inherited by the child of a fork.

    Args:
        size: bytes, an int or text such as "64 GiB".
        budget: as in `open`.
        granule: as in `open`.
        pmap: as in `open`.
        policy: as in `open`.
        swap: where pages go.

    Raises:
        quire.PmapError, quire.BudgetError, quire.Error: what was asked cannot be had.
        ValueError, TypeError: an argument is out of range or of the wrong type.

    >>> with anonymous("64 MiB", budget="8 MiB") as mapping:
    ...     mapping.array[::4096] = 7
    ...     int(mapping.array.sum())
    114688
    """
    size_bytes = parse_size(size, name="size")
    layout = raw_layout(size_bytes, "anonymous memory", "u1", None, 0, "C")
    return _anonymous(layout, budget, granule, pmap, policy, swap)


def empty(
    shape: ShapeLike,
    dtype: npt.DTypeLike = float,
    order: Order = "C",
    *,
    budget: SizeLike | None = None,
    granule: SizeLike | None = None,
    pmap: str | None = None,
    policy: str | None = None,
    swap: Swap | None = None,
) -> np.ndarray[Any, Any]:
    """An array as of `numpy.empty`, but of zeros, in memory of `anonymous`.

    The memory goes with the array and its views; `mapping_of` gives its mapping.

    >>> array = empty((1024, 1024), "f4", budget="1 MiB")
    >>> array[:] = 2
    >>> float(array.sum()), mapping_of(array).budget_bytes
    (2097152.0, 1048576)
    """
    element, lengths = require_dtype(np.dtype(dtype), "anonymous memory"), shape_of(shape)
    if -1 in lengths:
        raise ValueError(f"shape {shape!r} needs lengths of at least 0")
    layout = ArrayLayout(element, lengths, require_order(order), 0, "raw")
    return _anonymous(layout, budget, granule, pmap, policy, swap).array


def _anonymous(
    layout: ArrayLayout,
    budget: SizeLike | None,
    granule: SizeLike | None,
    pmap: str | None,
    policy: str | None,
    swap: Swap | None,
) -> Mapping:
    zeros = _core.open_zero(layout.size_bytes, "anonymous memory")
    return Mapping(zeros, layout, mode="c", **_how(budget, granule, pmap, policy, swap))


def _how(
    budget: SizeLike | None,
    granule: SizeLike | None,
    pmap: str | None,
    policy: str | None,
    swap: Swap | None,
) -> dict[str, Any]:
    """Arguments of `Mapping`, sizes read."""
    return {
        "budget_bytes": None if budget is None else parse_size(budget, name="budget"),
        "granule_bytes": None if granule is None else parse_size(granule, name="granule"),
        "pmap": pmap,
        "policy": policy,
        "swap": swap,
    }


def mapping_of(array: np.ndarray[Any, Any]) -> Mapping:
    """The mapping whose memory an array, or a view of one, shows.

    Raises:
        ValueError: it shows other memory.
    """
    base: object = array
    while base is not None and not isinstance(base, Mapping):
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    if base is None:
        raise ValueError("the array is no view of a quire mapping")
    return base


def require_use_of(swap: Swap | None, mode: str) -> None:
    """Raises `quire.ModeError` where there is nothing to swap."""
    if swap is not None and mode != "c":
        raise ModeError(
            f'swap= says where changed pages of mode "c" go, and mode "{mode}" keeps none: leave '
            "it out"
        )


def require_patience(timeout: float, retries: int) -> None:
    """Raises ValueError where they are out of range."""
    if not 0 < timeout < TIMEOUT_S_MAX:
        raise ValueError(
            f"timeout must be seconds above 0 and below {TIMEOUT_S_MAX:,}, not {timeout!r}"
        )
    if not 0 <= operator.index(retries) <= RETRIES_MAX:
        raise ValueError(f"retries must be an int from 0 to {RETRIES_MAX}, not {retries!r}")


def find_layout(store: _core.Store, raw: RawShape) -> ArrayLayout:
    """The layout of the array in ``store``: as ``raw`` says, or as its header does.

    Raises:
        quire.FormatError: there is no header that quire knows, and ``raw`` names no dtype.
        ValueError: a shape or offset without a dtype.
    """
    label = store.label
    if raw.dtype is not None:
        return raw_layout(store.size, label, raw.dtype, raw.shape, raw.offset, raw.order)
    if raw.shape is not None or raw.offset != 0:
        raise ValueError("shape and offset describe raw bytes: give dtype too")
    if not is_npy(store.read(0, min(store.size, len(MAGIC)))):
        raise FormatError(
            "the source is no .npy file: give dtype= (and shape=) to map its bytes as an array",
            source=label,
        )
    return read_layout(store.read, store.size, label)


def set_budget(budget: SizeLike | None = None) -> None:
    """Sets how many bytes all mappings of this process together may keep resident.

    ``budget`` is an int or text such as "2 GiB"; None is the default, half of the memory that is
    free when the first mapping is made. "auto" follows, ten times a second, what is free in the
    machine and in the process's control groups, and gives way when they stall for want of memory
    (PSI, Documentation/accounting/psi.rst of Linux).

    Raises:
        quire.BudgetError: it cannot hold what the open mappings need to make progress.
        ValueError: it is no size.

    >>> set_budget("1 GiB")
    >>> budget()
    1073741824
    >>> set_budget(None)
    """
    automatic = budget == "auto"
    size = None if budget is None or automatic else parse_size(budget, name="budget")
    _core.set_budget(size)  # what is refused changes nothing
    _core.set_automatic_budget(automatic)
    if not automatic:
        _core.set_budget(size)  # again: until now it may have been followed


def budget() -> int:
    """The bytes that all mappings of this process together may keep resident."""
    return _core.budget()


def reopen(source: Source, given: dict[str, Any], version: str | None) -> Mapping:
    """Makes the mapping of an unpickled recipe.

    Raises:
        quire.ChangedError: the source is not the version that was pickled. One that is mapped for
            writing changes by that, and is taken as it is.
    """
    mapping = open(source, **given)
    if mapping.mode != "r+" and mapping.version != version:
        found = mapping.version
        mapping.close()
        raise ChangedError(
            f"the source changed after the mapping was pickled (version {version}, now {found}): "
            "open it again and send that",
            source=mapping.source,
        )
    return mapping


def _recipe(resolved: Resolved, given: dict[str, Any]) -> tuple[Any, ...] | None:
    if resolved.pickled is None:
        return None
    return reopen, (resolved.pickled, given, resolved.store.version)


def require_writable(store: _core.Store, mode: str) -> None:
    """Raises `quire.ModeError` for "r+" of a store that cannot be written."""
    if mode == "r+" and store.read_only is not None:
        raise ModeError(
            f'mode "{mode}" needs a source that can be written, and this one cannot: '
            f'{store.read_only}; mode "c" keeps changes in memory and swap, or open with mode "r" '
            "and copy what you want to change",
            source=store.label,
        )
