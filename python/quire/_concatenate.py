"""`concatenate`: many sources as one array, without copying."""

from __future__ import annotations

import contextlib
import errno
import hashlib
from typing import TYPE_CHECKING, Any

from quire import _core
from quire._api import MODES, find_layout, require_patience, require_use_of, require_writable
from quire.arena import Arena
from quire.creation import RawShape
from quire.errors import ChangedError, FormatError, ModeError, PmapError, SourceError
from quire.layout import ArrayLayout
from quire.mapping import Mapping
from quire.opened_file import (
    Durable,
    identity_of,
    require_identity,
    require_named,
    why_not_kernel,
)
from quire.pmap import KERNEL, pmap_for
from quire.sizes import SizeLike, checked_span, parse_size
from quire.store.resolve import Resolved, resolve

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from collections.abc import Mapping as Options

    import numpy.typing as npt

    from quire.layout import Order, ShapeLike
    from quire.store.resolve import Source
    from quire.swap import Swap

__all__ = ["concatenate", "concatenate_again"]


def concatenate(
    sources: Iterable[Source],
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
    """Maps many sources as one contiguous array, without copying: `numpy.concatenate`, on axis 0.

    Every source is opened as by `open`: `.npy` shards, raw files, compressed or not, local or
    remote. They must have the same dtype and the same lengths but for the first. An error names
    the source that failed, and the offset in that source.

    Local files whose arrays begin and end at whole pages (raw files of such sizes) are mapped side
    by side by the operating system, as by `quire.map`, unless a pmap, budget, granule, policy or
    swap is asked for. Others come through quire's own pager, as by `open`: then each source keeps
    a descriptor, and a remote one a process, as long as the mapping lives.

    Args:
        sources: in the order of their rows; sources without rows may be among them.
        mode: "r", "r+" (stores go to the sources, which must be writable files) or "c".
        dtype: of raw bytes, as in `open`, the same for all.
        shape: of each source of raw bytes, as in `open`: a first length of -1 lets them differ.
        offset: bytes before the first element of each source of raw bytes.
        order: "C"; "F" only where the arrays have one dimension.
        budget: bytes that may be resident, as in `open`.
        granule: as in `open`.
        pmap: as in `open`, or "kernel" for files side by side.
        policy: as in `open`.
        swap: as in `open`.
        storage_options: as in `open`, for all URLs.
        timeout: as in `open`.
        retries: as in `open`.

    Raises:
        quire.FormatError: two sources do not go together; the message names both and what differs.
        ValueError: there is no source; or a file comes twice in mode "r+", and is not mapped by
            the operating system.
        quire.SourceError, quire.ModeError, quire.PmapError, quire.BudgetError: as `open`.

    Threads: may be called from any thread.

    >>> import numpy, quire
    >>> numpy.save("/tmp/quire-shard-0.npy", numpy.arange(6).reshape(3, 2))
    >>> numpy.save("/tmp/quire-shard-1.npy", numpy.arange(6, 10).reshape(2, 2))
    >>> with quire.concatenate(["/tmp/quire-shard-0.npy", "/tmp/quire-shard-1.npy"]) as mapping:
    ...     mapping.shape, mapping.array[2:4].tolist()
    ((5, 2), [[4, 5], [6, 7]])
    """
    if mode not in MODES or mode == "w+":
        raise ModeError(f"{mode!r} is no mode of a concatenation: there are 'r', 'r+', 'c'")
    require_patience(timeout, retries)
    require_use_of(swap, mode)
    if isinstance(sources, str):
        raise TypeError("sources are given as a list, and this is one text: see quire.open")
    wanted = pmap_for(pmap, budget=budget, granule=granule, policy=policy, swap=swap)
    given = list(sources)
    if not given:
        raise ValueError("there is nothing to concatenate: give at least one source")
    options: dict[str, Any] = {
        "mode": mode,
        "dtype": dtype,
        "shape": shape,
        "offset": offset,
        "order": order,
        "budget": budget,
        "granule": granule,
        "pmap": pmap,
        "policy": policy,
        "swap": swap,
        "storage_options": storage_options,
        "timeout": timeout,
        "retries": retries,
    }
    with contextlib.ExitStack() as opened:
        shards = [_opened(opened, source, len(given), options) for source in given]
        layouts = _layouts(shards, RawShape(dtype, shape, offset, order))
        if wanted == KERNEL:
            unmappable = _why_not_mapped(shards, layouts)
            if unmappable is None:
                return _map(shards, layouts, options)
            if pmap == KERNEL:
                raise unmappable
        mapping = _page(shards, layouts, options, None if wanted == KERNEL else wanted)
        opened.pop_all()
        return mapping


def _opened(
    opened: contextlib.ExitStack, source: Source, count: int, options: dict[str, Any]
) -> Resolved:
    """One of ``count`` sources, open; closed with the stack."""
    budget, mode = options["budget"], options["mode"]
    whole_bytes = _core.budget() if budget is None else parse_size(budget, name="budget")
    with _room_for(count):
        shard = resolve(
            source,
            storage_options=options["storage_options"],
            budget_bytes=max(whole_bytes // count, 1),
            timeout_s=options["timeout"],
            writable=mode == "r+",
        )
    opened.callback(shard.store.close)
    require_writable(shard.store, mode)
    return shard


def concatenate_again(
    sources: Sequence[Source], given: dict[str, Any], version: str | None
) -> Mapping:
    """Makes the mapping of an unpickled recipe.

    Raises:
        quire.ChangedError: a source is not the version that was pickled, as with `open`.
    """
    mapping = concatenate(sources, **given)
    if mapping.mode != "r+" and mapping.version != version:
        source = mapping.source
        mapping.close()
        raise ChangedError(
            "a source changed after the mapping was pickled: concatenate them again and send that",
            source=source,
        )
    return mapping


@contextlib.contextmanager
def _room_for(count: int) -> Iterator[None]:
    """Says what to do when descriptors run out."""
    try:
        yield
    except SourceError as error:
        if error.errno != errno.EMFILE:
            raise
        raise SourceError(
            f"the {count:,} sources need a descriptor each, and RLIMIT_NOFILE is used up: raise it "
            "with `ulimit -n`, or resource.setrlimit",
            source=error.source,
            errno=error.errno,
        ) from error


def _layouts(shards: list[Resolved], raw: RawShape) -> list[ArrayLayout]:
    """The layouts of all sources, which go together."""
    stores = [shard.store for shard in shards]
    layouts = [find_layout(store, raw) for store in stores]
    for store, layout in zip(stores, layouts, strict=True):
        _require_joinable(layout, store.label)
        for what, one, other in _differences(layouts[0], layout):
            raise FormatError(
                f"{stores[0].label} and {store.label} do not go together: the {what} of the first "
                f"is {one}, of the second {other}; save both alike",
                source=store.label,
            )
    return layouts


def _whole(layouts: list[ArrayLayout]) -> ArrayLayout:
    first = layouts[0]
    shape = (sum(layout.shape[0] for layout in layouts), *first.shape[1:])
    return ArrayLayout(first.dtype, shape, "C", 0, "raw")


def _label(labels: list[str]) -> str:
    return labels[0] + (f" and {len(labels) - 1} more" if len(labels) > 1 else "")


def _page(
    shards: list[Resolved], layouts: list[ArrayLayout], options: dict[str, Any], pmap: str | None
) -> Mapping:
    """Maps a store of all arrays one behind the other."""
    stores = [shard.store for shard in shards]
    if options["mode"] == "r+":
        _require_distinct(stores)
    parts = [
        (store, layout.offset_bytes, layout.size_bytes)
        for store, layout in zip(stores, layouts, strict=True)
    ]
    label = _label([store.label for store in stores])
    joined = _core.open_concat(parts, label, _version(stores))
    budget, granule = options["budget"], options["granule"]
    return Mapping(
        joined,
        _whole(layouts),
        _recipe(shards, options, joined.version),
        budget_bytes=None if budget is None else parse_size(budget, name="budget"),
        granule_bytes=None if granule is None else parse_size(granule, name="granule"),
        pmap=pmap,
        retries=options["retries"],
        mode=options["mode"],
        policy=options["policy"],
        swap=options["swap"],
    )


class MappedConcatenation(Durable, Arena):
    """Files mapped side by side, as one array; durable when it closes, as `quire.open` is."""

    _given_mode: str
    _version: str | None

    @property
    def mode(self) -> str:
        """As it was asked for."""
        return self._given_mode

    @property
    def version(self) -> str | None:
        """What named the contents that were opened; the mapping shows what the files hold now."""
        return self._version

    def sync(self, offset: int = 0, length: int | None = None) -> None:
        """Writes back what is dirty of every file and makes it durable, as `Mapping.sync`.

        Raises:
            quire.SyncError: of the first file that could not be written, or was replaced at its
                path; those before it are synced.
            ValueError: a negative offset or length.
        """
        first, length = checked_span(offset, length)
        end = self.size_bytes if length is None else first + length
        for part in list(self._held.values()):
            at = part.address - self.address
            start, stop = max(first - at, 0), min(end - at, part.size_bytes)
            if start < stop:
                part.sync(start, stop - start)
                if self._durable:
                    require_named(part, part.source)


def _why_not_mapped(shards: list[Resolved], layouts: list[ArrayLayout]) -> PmapError | None:
    """Why the kernel cannot map the arrays one behind the other; None when it can."""
    page = _core.page_bytes()
    pairs = [pair for pair in zip(shards, layouts, strict=True) if pair[1].size_bytes]
    for number, (shard, layout) in enumerate(pairs):
        why = why_not_kernel(shard)
        if why is not None:
            pass
        elif layout.offset_bytes % page:
            why = f"its array begins at byte {layout.offset_bytes}"
        elif layout.size_bytes % page and number < len(pairs) - 1:
            why = f"its array has {layout.size_bytes} bytes"
        else:
            continue
        return PmapError(
            f'pmap "kernel" joins only files at whole pages of {page} bytes, and of this one '
            f"{why}: leave pmap out",
            source=shard.store.label,
        )
    return None if pairs else PmapError('pmap "kernel" needs at least one row to map')


def _map(shards: list[Resolved], layouts: list[ArrayLayout], options: dict[str, Any]) -> Mapping:
    """Maps the arrays side by side in an arena."""
    whole, mode = _whole(layouts), options["mode"]
    label = _label([shard.store.label for shard in shards])
    arena = MappedConcatenation(whole.size_bytes, label=label, writable=mode != "r")
    try:
        at = 0
        for shard, layout in zip(shards, layouts, strict=True):
            if layout.size_bytes:
                part = arena.map(
                    at,
                    str(shard.pickled),
                    layout.size_bytes,
                    sharing="private" if mode == "c" else "shared",
                    protection="r" if mode == "r" else "rw",
                    offset=layout.offset_bytes,
                )
                require_identity(part, shard.store)
                at += layout.size_bytes
    except BaseException:
        arena.close()
        raise
    arena._given_mode, arena._made_layout = mode, whole
    arena._version = _version([shard.store for shard in shards])
    arena._recipe = _recipe(shards, options, arena._version)
    if mode == "r+":
        arena._sync_at_end()
    return arena


def _require_distinct(stores: list[_core.Store]) -> None:
    """Raises ValueError where a file comes twice in mode "r+"."""
    seen: dict[tuple[int, int], str] = {}
    for store in stores:
        identity = identity_of(store)
        if identity in seen:
            raise ValueError(
                f"{seen[identity]} and {store.label} are one file, whose pages would be in memory "
                'twice and undo each other\'s stores: give it once, or take mode "r" or "c" '
                "(files of whole pages, without a budget, may come twice: they are one memory)"
            )
        seen[identity] = store.label


def _differences(one: ArrayLayout, other: ArrayLayout) -> Iterator[tuple[str, object, object]]:
    if one.dtype != other.dtype:
        yield (
            "dtype",
            one.dtype.descr if one.dtype.names else one.dtype.str,
            (other.dtype.descr if other.dtype.names else other.dtype.str),
        )
    if len(one.shape) != len(other.shape):
        yield "number of dimensions", len(one.shape), len(other.shape)
    if one.shape[1:] != other.shape[1:]:
        yield "shape of a row", one.shape[1:], other.shape[1:]


def _require_joinable(layout: ArrayLayout, source: str) -> None:
    if not layout.shape:
        raise FormatError(
            "an array of no dimensions cannot be concatenated: it has no rows", source=source
        )
    if layout.order == "F" and len(layout.shape) > 1 and layout.count:
        raise FormatError(
            "the array is in Fortran order, so its rows do not lie one behind the other: save it "
            "in C order (numpy.ascontiguousarray)",
            source=source,
        )


def _version(stores: list[_core.Store]) -> str | None:
    """What names the content of all together; None where one does not say."""
    versions = [store.version for store in stores]
    if None in versions:
        return None
    return hashlib.blake2b(repr(versions).encode(), digest_size=16).hexdigest()


def _recipe(
    shards: list[Resolved], options: dict[str, Any], version: str | None
) -> tuple[Any, ...] | None:
    sources = [shard.pickled for shard in shards]
    if any(source is None for source in sources):
        return None
    return concatenate_again, (sources, options, version)
