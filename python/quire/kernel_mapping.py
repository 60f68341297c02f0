"""`KernelMapping`: a range of memory that the operating system pages, made by `quire.map`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from quire import _core
from quire.errors import Error
from quire.layout import ArrayLayout, Order, ShapeLike, raw_layout
from quire.limits import Asked, explained
from quire.map_flags import ADVICE, INWARD, MAP_TYPE, PROTECTIONS, MapFlag, protection_bits
from quire.mapping import Mapping
from quire.residency import Pin, bytes_of
from quire.sizes import SizeLike, checked_span, parse_size

if TYPE_CHECKING:
    import weakref
    from collections.abc import Callable, Iterable
    from types import TracebackType

    import numpy as np
    import numpy.typing as npt

__all__ = ["KernelMapping", "RawArray", "require_cache"]

MS_ASYNC = 1
MS_INVALIDATE = 2
MS_SYNC = 4
POLICIES = {"default": 0, "preferred": 1, "bind": 2, "interleave": 3, "local": 4}
NODES_MAX = 64
NO_BUDGET = (1 << 64) - 1

Returned = TypeVar("Returned")

_unmap = _core.MappingBase.unmap


class RawArray:
    """How the bytes of a mapping are an array."""

    __slots__ = ("dtype", "offset_bytes", "order", "shape")

    def __init__(
        self,
        dtype: npt.DTypeLike | None = None,
        shape: ShapeLike | None = None,
        order: Order = "C",
        offset_bytes: int = 0,
    ) -> None:
        """As in `quire.open`; bytes, where no dtype is given."""
        self.dtype = dtype
        self.offset_bytes = offset_bytes
        self.shape = shape
        self.order = order


BYTES = RawArray()


class KernelMapping(Mapping, _core.KernelMappingBase):
    r"""A range of memory that the operating system pages; made by `quire.map`.

    All that a `Mapping` is, and the calls of the mmap(2) family. Offsets and lengths are bytes of
    the mapping, any; where a call works on pages it takes those around the bytes, but advice that
    takes something away the pages wholly inside.

    A touch of what cannot be had, because the file was truncated, its disk is full or failing, or
    the protection does not allow it, raises in the thread that touched, as with every `Mapping`,
    and nothing else happens: once the cause is gone the mapping is whole again.

    >>> import quire
    >>> with quire.map(size="1 MiB", sharing="private") as mapping:
    ...     mapping.array[:3] = 7
    ...     mapping.read(0, 4)
    b'\x07\x07\x07\x00'
    """

    # In the class, so that opening one sets none of them.
    _raw: RawArray = BYTES
    _recipe: tuple[Any, ...] | None = None
    _live_array: weakref.ref[np.ndarray[Any, Any]] | None = None
    _made_layout: tuple[int, ArrayLayout] | None = None

    # That of the native class, without a step in Python; `Mapping` has one for stores.
    __new__ = _core.KernelMappingBase.__new__  # type: ignore[assignment]

    @property
    def _layout(self) -> ArrayLayout:  # type: ignore[override]
        size, made = self.size_bytes, self._made_layout
        if made is None or made[0] != size:
            raw = self._raw
            dtype = "u1" if raw.dtype is None else raw.dtype
            offset = raw.offset_bytes
            layout = raw_layout(size, self.source, dtype, raw.shape, offset, raw.order)
            self._made_layout = made = size, layout
        return made[1]

    @property
    def mode(self) -> str:
        """As in `numpy.memmap`: "r" read-only, "r+" shared and writable, "c" private."""
        if not self.writable:
            return "r"
        return "c" if self.sharing == "private" else "r+"

    @property
    def sharing(self) -> str:
        """Whether stores are seen by others: "shared" or "private"."""
        return "private" if self.map_flags & MAP_TYPE == MapFlag.PRIVATE else "shared"

    @property
    def protection(self) -> str:
        """What may be done to it, as `protect` has it; parts may have one of their own."""
        return next(name for name, bits in PROTECTIONS.items() if bits == self.prot)

    @property
    def flags(self) -> MapFlag:
        """The flags of mmap(2) it was made with."""
        return MapFlag(self.map_flags)

    @property
    def source(self) -> str:
        """The path or label of what is mapped."""
        return self.label

    @property
    def version(self) -> str | None:
        """None: a mapping by the kernel shows what the file holds now."""
        return None

    def sync(
        self,
        offset: int = 0,
        length: int | None = None,
        *,
        asynchronous: bool = False,
        invalidate: bool = False,
    ) -> None:
        """Writes back what is dirty and makes it durable (msync(2)).

        Args:
            offset: first byte.
            length: bytes; to the end when absent.
            asynchronous: does not wait; Linux writes later in any case, and this does nothing.
            invalidate: has other mappings of the file see it; Linux only checks that nothing is
                locked, as all mappings of a file are one memory.

        After a failure everything is kept in memory that the kernel has not taken before quire saw
        it: `failed` tells of it, nothing is given back to keep a budget, the next sync raises in
        any case, and each writes all again, until one succeeds.

        Raises:
            quire.SyncError: the file could not be written, or something is locked.
        """
        flags = (MS_ASYNC if asynchronous else MS_SYNC) | (MS_INVALIDATE if invalidate else 0)
        self._call(lambda: self.msync(*checked_span(offset, length), flags))

    def set_budget(self, budget: SizeLike | None, *, cache: str = "keep") -> None:
        """Bounds the pages of a file that are resident; None for no bound.

        Many times a second while pages come, those that were touched longest ago, as far as the
        kernel lets one see, are given back. Nothing is lost: dirty pages belong to the file.

        Args:
            budget: bytes, an int or text such as "64 MiB".
            cache: "keep": what goes stays in the page cache, where the kernel can take it at once.
                The budget is exceeded by all that is touched until the next look, half a
                millisecond later while pages come, and up to 32 after none did; of a file that is
                cached already the kernel maps 16 pages at each touch, as fast as memory is, so
                that there is no bound but the file's size. "drop": it leaves the page cache
                too, dirty pages written back first, and no more is read ahead of a walk than the
                budget has room for, so that the memory of the control group does not grow; what
                is cached now is dropped by this very call. What others read of the file meanwhile
                and stores to the holes of a sparse file may exceed it until they are written
                back, and so may reading ahead that the program itself asks for by `advise`.

        Raises:
            ValueError: the mapping is private and is or was writable, of no file, or of a file in
                memory (tmpfs, memfd, hugetlbfs): its pages have no other home than memory.
            quire.PmapError: the kernel does not tell what is touched (before Linux 6.7).
        """
        require_cache(cache)
        size = NO_BUDGET if budget is None else parse_size(budget, name="budget")
        if size == 0:
            raise ValueError("a budget of 0 bytes keeps no page: give some")
        self._call(lambda: self.bound(size, cache == "drop"))

    def protect(self, protection: str, offset: int = 0, length: int | None = None) -> None:
        """Changes what may be done to a part (mprotect(2)): "none", "r", "rw", "rx", "rwx"...

        A touch that is not allowed raises `quire.ProtectionError` in its thread. Arrays and views
        that are alive keep their own flag of being writable.

        Raises:
            quire.Error: the kernel refuses; the message says why.
            ValueError: there is no such protection, or the bytes are not in the mapping; or it
                would make a private mapping writable that has a budget.
        """
        bits = protection_bits(protection)
        self._call(lambda: self.mprotect(*checked_span(offset, length), bits), length, bits)

    def advise(self, advice: str, index: object = None) -> None:
        """Gives any advice of madvise(2), by its name in small letters, to a part of the array.

        As the kernel has it: "dontneed", "free" and "remove" take away what private or anonymous
        memory holds; "guard_install" makes touches raise, and "guard_remove" ends that. See
        `quire.map_flags.ADVICE` for the names.

        Raises:
            quire.Error: it is not for this mapping; the message says why.
            ValueError: there is no such advice.
        """
        number = ADVICE.get(advice)
        if number is None:
            raise ValueError(f"there is no advice {advice!r}; there are: {', '.join(ADVICE)}")
        offset, length = (0, None) if index is None else self._part(index)[1:]
        self._call(lambda: self.madvise(number, offset, length, advice in INWARD), length)

    def pin(self, index: object = None) -> Pin:
        """As `Mapping.pin`, by mlock2(2).

        Raises:
            quire.Error: RLIMIT_MEMLOCK, with its value, or a page that cannot be had.
            quire.PageIOError: the mapping is failed.
            TypeError: the index makes a copy of what it selects.
        """
        self.check()
        part, offset, length = self._part(index)
        return self._call(lambda: Pin(self, part, offset, length), length)

    def _part(self, index: object) -> tuple[np.ndarray[Any, Any], int, int]:
        # No touch: so that advice can mend what has made the mapping fail.
        part, address, length = bytes_of(self._whole(), index)
        return part, max(address - self.address, 0) if length else 0, length

    def lock(self, offset: int = 0, length: int | None = None, *, on_fault: bool = False) -> None:
        """Keeps pages in memory (mlock2(2)), from now or, ``on_fault``, from their first touch.

        Locks do not add up: one `unlock` ends them. `pin` counts.

        Raises:
            quire.Error: RLIMIT_MEMLOCK, with its value, or a page that cannot be had.
        """
        asked = max(self.size_bytes - offset, 0) if length is None else length
        self._call(lambda: self.mlock(*checked_span(offset, length), on_fault), asked)

    def unlock(self, offset: int = 0, length: int | None = None) -> None:
        """Ends `lock` (munlock(2))."""
        self._call(lambda: self.munlock(*checked_span(offset, length)), length)

    def resize(self, size: SizeLike) -> None:
        """Changes how many bytes are mapped (mremap(2)), of the same source from the same offset.

        A shared writable mapping makes its file longer where it must; none makes it shorter.
        While views are alive it grows where it is, or not at all; `quire.map` keeps room for that
        with ``reserve``.

        Raises:
            BufferError: views are alive, and it would have to move or to shrink.
            quire.Error: the kernel refuses; the message says why.
        """
        size_bytes = parse_size(size)
        if size_bytes == 0:
            raise ValueError("a mapping has at least one byte: close it instead")
        more = max(size_bytes - self.size_bytes, 0)
        self._call(lambda: self.change_size(size_bytes), more)
        self._live_array = None

    def drop_descriptor(self) -> None:
        """Closes the descriptor of the source that the mapping keeps for itself.

        When the source must be asked later why a page cannot be had, it is opened again by the
        path that it has now, if the same file is still there; `resize` cannot make it longer.
        """
        self.close_descriptor()

    def split(self, at: int) -> KernelMapping:
        """Keeps the bytes before ``at``; the rest is the mapping that is returned.

        Raises:
            ValueError: the page of that byte holds bytes of both.
            BufferError: views are alive.
        """
        raw = self._raw
        rest = self._call(lambda: self.split_at(at))
        self._raw = RawArray(raw.dtype, None, raw.order, raw.offset_bytes)
        self._recipe = None
        made: KernelMapping = type(self)(rest)
        made._raw = RawArray(raw.dtype, None, raw.order)
        return made

    def unmap(self, offset: int | None = None, length: int | None = None) -> None:
        """Unmaps all (munmap(2)), or the pages of a part, whose addresses stay held.

        A later touch of such a part raises `quire.PageIOError` in its thread.

        Raises:
            ValueError: the part is not made of whole pages.
            BufferError: all of it is to go, and views are alive.
        """
        if offset is None and length is None:
            super().unmap()
        else:
            self._call(lambda: self.unmap_bytes(*checked_span(offset or 0, length)))

    def name(self, name: str | None) -> None:
        """Names anonymous memory in /proc/self/maps (PR_SET_VMA_ANON_NAME); None ends it.

        Raises:
            quire.Error: a character that is not allowed, or memory of a file.
        """
        self._call(lambda: self.set_name(name))

    def bind(self, nodes: Iterable[int], policy: str = "bind", *, move: bool = False) -> None:
        """Says of which NUMA nodes its pages are to be (mbind(2)).

        Args:
            nodes: numbers of nodes, from 0 to 63; none for "default" and "local".
            policy: "bind", "preferred", "interleave", "local" or "default".
            move: also moves the pages that are there.

        Raises:
            quire.Error: no such node here.
            ValueError: no such policy.
        """
        if policy not in POLICIES:
            raise ValueError(f"there is no policy {policy!r}; there are: {', '.join(POLICIES)}")
        numbers = list(nodes)
        if not all(0 <= node < NODES_MAX for node in numbers):
            raise ValueError(f"nodes are numbers from 0 to {NODES_MAX - 1}, not {numbers}")
        mask = sum(1 << node for node in set(numbers))
        self._call(lambda: self.mbind(POLICIES[policy], mask, move))

    def seal(self) -> None:
        """Fixes it for ever (mseal(2), Linux 6.10): no protection or address changes any more.

        It stays mapped to the end of the process, also when it is closed. Only for memory that
        nobody can truncate: anonymous memory, or a memory file with F_SEAL_SHRINK.

        Raises:
            quire.Error: the kernel refuses.
            ValueError: a file that can be truncated.
        """
        self._call(self.mseal)

    def close(self, *, discard: bool = False) -> None:
        """Unmaps; does nothing when that was done before.

        What was written to a file is in the page cache, and so in the file for every reader; call
        `sync` first for it to outlive a loss of power. Only what could not be written back before
        is synced, or given up with ``discard``.

        Raises:
            quire.SyncError: that failed. The mapping stays open: mend what is in the way and close
                it again, or ``discard``.
            BufferError: an array or another view of the mapping is alive.
        """
        if self.unwritten and not discard and not self.closed and self.exports == 0:
            self.sync()
        _unmap(self, discard)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes; while views are alive it leaves that to the last of them."""
        self.unmap_when_idle()

    def _call(
        self, call: Callable[[], Returned], length: int | None = None, prot: int | None = None
    ) -> Returned:
        """Calls; an error of the system's is raised with what is behind it."""
        try:
            return call()
        except (Error, ValueError) as error:
            if self.closed:
                raise self._closed_error() from None
            if type(error) is not Error:
                raise
            size = self.size_bytes if length is None else length
            bits = self.prot if prot is None else prot
            raise explained(error, Asked(size, self.map_flags, bits, self.source)) from None


def require_cache(cache: str) -> None:
    """Raises ValueError for what `KernelMapping.set_budget` does not know."""
    if cache not in ("keep", "drop"):
        raise ValueError(f'cache is "keep" or "drop", not {cache!r}')
