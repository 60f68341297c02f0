"""`Arena`: addresses that are reserved, and mappings placed in them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quire import _core
from quire._map import OFFSET_END, mapped
from quire.errors import Error
from quire.layout import ArrayLayout, raw_layout
from quire.limits import Asked, explained
from quire.map_flags import MAP_TYPE, PROTECTIONS, MapFlag
from quire.mapping import Mapping
from quire.sizes import SizeLike, format_size, parse_size

if TYPE_CHECKING:
    import weakref
    from types import TracebackType
    from typing import Self

    import numpy as np
    import numpy.typing as npt

    from quire._map import Mappable
    from quire.kernel_mapping import KernelMapping
    from quire.layout import Order, ShapeLike
    from quire.residency import Pin

__all__ = ["Arena", "Placed"]

PLACING = MapFlag.FIXED | MapFlag.FIXED_NOREPLACE | MapFlag.BIT32 | MapFlag.GROWSDOWN


@dataclass(frozen=True)
class Placed:
    """A mapping in an arena.

    Attributes:
        offset: byte of the arena at which it begins.
        size_bytes: bytes of it.
        source: what is mapped.
        sharing: "shared" or "private".
        protection: what may be done to it, as in `KernelMapping.protect`.
    """

    offset: int
    size_bytes: int
    source: str
    sharing: str
    protection: str


class Arena(Mapping, _core.ArenaBase):
    r"""A range of reserved addresses in which mappings are placed where you say.

    The answer to MAP_FIXED, which takes away whatever another thread has just mapped there: within
    an arena nothing is ever replaced, and outside of it nothing is touched. A range is reserved,
    placed and reserved again in single system calls, so that there is never a hole in between that
    another mmap(2) of the process could fall into.

    It takes no memory, whatever its size. It is itself a `Mapping`: `array` is all of its bytes,
    one array across everything that is placed. A touch where nothing is placed raises
    `quire.PageIOError` in that thread, one of what is placed what `quire.map` says.

    Threads: any number may place, unmap and touch at once.

    >>> import quire
    >>> with quire.Arena("1 MiB") as arena:
    ...     left = arena.map(0, size=4096, sharing="private")
    ...     right = arena.map(4096, size=4096, sharing="private")
    ...     left.array[-1], right.array[0] = 7, 8
    ...     arena.read(4095, 2)
    b'\x07\x08'
    """

    _recipe: tuple[Any, ...] | None = None
    _live_array: weakref.ref[np.ndarray[Any, Any]] | None = None
    _made_layout: ArrayLayout | None = None
    _held: dict[int, KernelMapping]

    def __new__(cls, size: SizeLike, *, label: str = "arena", writable: bool = True) -> Self:
        """Reserves ``size`` bytes of addresses.

        Args:
            size: bytes, an int or text such as "1 TiB"; more than the machine has memory is fine.
            label: what errors call it.
            writable: whether `array` and other views of the whole may be written, where what is
                placed may be.

        Raises:
            quire.Error: the kernel refuses; the message says which limit was hit.
        """
        size_bytes = parse_size(size)
        if size_bytes == 0:
            raise ValueError("an arena has at least one byte")
        try:
            self = _core.ArenaBase.__new__(cls, size_bytes, label, writable)
        except Error as error:
            flags = int(MapFlag.PRIVATE | MapFlag.NORESERVE)
            asked = Asked(flags=flags, source=label, reserve=size_bytes)
            raise explained(error, asked) from None
        self._held = {}
        return self

    def map(
        self,
        at: int,
        source: Mappable = None,
        size: SizeLike | None = None,
        *,
        sharing: str | None = None,
        protection: str | None = None,
        offset: int = 0,
        dtype: npt.DTypeLike | None = None,
        shape: ShapeLike | None = None,
        order: Order = "C",
        flags: int = 0,
        reserve: SizeLike | None = None,
        budget: SizeLike | None = None,
        cache: str = "keep",
    ) -> KernelMapping:
        """Places a mapping so that its first byte is byte ``at`` of the arena.

        The arena keeps it until `unmap`, the mapping's own `close`, or its end. Whole pages are
        taken; divided by the page size, ``at`` and ``offset`` must leave the same rest.

        Args:
            at: byte of the arena.
            source: as in `quire.map`, and so the other arguments.
            size: bytes.
            sharing: "shared", "private" or "shared-validate".
            protection: "rw" for anonymous memory and "r" for anything else when absent.
            offset: byte of the source.
            dtype: of the mapping's own array.
            shape: of the mapping's own array.
            order: of the mapping's own array.
            flags: others of `quire.MapFlag`, but for those that say where.
            reserve: bytes of the arena that are the mapping's, to grow in place.
            budget: as in `KernelMapping.set_budget`.
            cache: as in `KernelMapping.set_budget`.

        Raises:
            ValueError: it would overlap another (the message names both), does not fit, or is not
                aligned. Nothing has changed then.
            quire.SourceError, quire.Error: as `quire.map`; nothing has changed.
        """
        at = operator.index(at)
        if at < 0:
            raise ValueError(f"byte {at}: it counts from the start of the arena")
        if at >= OFFSET_END:  # more than the core could say it of
            raise ValueError(f"bytes from {at} on do not lie in an arena of {self.size_bytes}")
        if flags & PLACING:
            raise ValueError("the arena says where: leave out FIXED, BIT32 and GROWSDOWN")
        how = (sharing, protection, offset, dtype, shape, order, at, flags, reserve, budget, cache)
        mapping = mapped(self.place, source, size, *how)
        mapping._recipe = None
        self._hold(mapping.address, mapping)
        return mapping

    def _hold(self, address: int, mapping: KernelMapping) -> None:
        self._held[address] = mapping
        if len(self._held).bit_count() == 1:  # now and then
            for key, other in list(self._held.items()):
                if other.closed:
                    self._held.pop(key, None)

    @property
    def entries(self) -> tuple[Placed, ...]:
        """What is placed now, by offset."""
        names = {bits: name for name, bits in PROTECTIONS.items()}
        return tuple(
            Placed(
                offset,
                size_bytes,
                source,
                "private" if flags & MAP_TYPE == MapFlag.PRIVATE else "shared",
                names[prot],
            )
            for offset, size_bytes, source, prot, flags in self.placed()
        )

    def unmap(self, offset: int | None = None, length: int | None = None) -> None:
        """Unmaps what is placed in a part, which is reserved again; or all, arena included.

        Args:
            offset: first byte of the part.
            length: bytes of it; when absent, those of the mapping that begins there.

        Raises:
            ValueError: nothing is placed there, or a mapping lies there with only a part of it.
            BufferError: views of a mapping there are alive, or another thread is at work there:
                its `map` has not returned. Nothing was unmapped then. Views of the arena itself may
                live on: touching that part of them raises.
        """
        if offset is None and length is None:
            self.close()
            return
        first = operator.index(offset or 0)
        mappings = self._within(first, length)
        _require_idle(mappings)
        for mapping in mappings:
            mapping.close()
            self._forget(mapping)

    def _within(self, first: int, length: int | None) -> list[KernelMapping]:
        entries = self.entries
        if length is None:
            inside = [entry for entry in entries if entry.offset == first]
        else:
            end = first + operator.index(length)
            inside = [e for e in entries if e.offset < end and first < e.offset + e.size_bytes]
            for entry in inside:
                if entry.offset < first or entry.offset + entry.size_bytes > end:
                    raise ValueError(
                        f"{entry.source} has bytes {entry.offset} to "
                        f"{entry.offset + entry.size_bytes} of the arena, which are not all among "
                        f"{first} to {end}: unmap it as a whole"
                    )
        if not inside:
            raise ValueError(f"nothing is placed at byte {first} of the arena")
        held = [self._held.get(self.address + entry.offset) for entry in inside]
        found = [mapping for mapping in held if mapping is not None and not mapping.closed]
        if len(found) < len(held):
            # Between its placing and the return of `map`; or another thread has unmapped it by now.
            raise BufferError(
                f"another thread is placing or unmapping at byte {first} of the arena: unmap what "
                "it places when its `map` has returned"
            )
        return found

    def _forget(self, mapping: KernelMapping) -> None:
        for address, other in list(self._held.items()):
            if other is mapping:
                self._held.pop(address, None)

    def pin(self, index: object = None) -> Pin:
        """As `Mapping.pin`; all of the part must be placed.

        Raises:
            quire.Error: RLIMIT_MEMLOCK, with its value, or a page that cannot be had.
            quire.PageIOError: something that is placed has failed.
            TypeError: the index makes a copy of what it selects.
        """
        try:
            return super().pin(index)
        except Error as error:
            if type(error) is not Error:
                raise
            length = self._part(index)[2]
            raise explained(error, Asked(length, int(MapFlag.SHARED), 0, self.label)) from None

    def close(self, *, discard: bool = False) -> None:
        """Unmaps everything and gives the addresses back; does nothing when that was done before.

        ``discard`` as in `KernelMapping.close`.

        Raises:
            BufferError: views of the arena or of a mapping in it are alive. Nothing was unmapped.
        """
        if self.closed:
            return
        if self.exports:
            raise BufferError(
                f"cannot close: {self.exports} view(s) of the arena are alive; delete them first"
            )
        mappings = list(self._held.values())
        _require_idle(mappings)
        for mapping in mappings:
            mapping.close(discard=discard)
        self._held.clear()
        super().unmap()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes; what views are alive of stays until the last of them goes.

        A view of the whole arena keeps all that is placed in it, until the arena itself goes.
        """
        if not self.exports:
            for mapping in list(self._held.values()):
                mapping.unmap_when_idle()
        self.unmap_when_idle()

    @property
    def _layout(self) -> ArrayLayout:  # type: ignore[override]
        if self._made_layout is None:
            self._made_layout = raw_layout(self.size_bytes, self.label, "u1", None, 0, "C")
        return self._made_layout

    @property
    def mode(self) -> str:
        """As in `numpy.memmap`: "r+", or "r" where views of the whole may not be written."""
        return "r+" if self.writable else "r"

    @property
    def source(self) -> str:
        """What errors call it."""
        return self.label

    @property
    def version(self) -> str | None:
        """None: the sources that are placed are shown as they are now."""
        return None

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self.placed())} placed"
        return f"<quire.Arena {format_size(self.size_bytes)}, {state}>"


def _require_idle(mappings: list[KernelMapping]) -> None:
    for mapping in mappings:
        if not mapping.closed and mapping.exports:
            raise BufferError(
                f"cannot unmap: {mapping.exports} view(s) of {mapping.source} are alive; delete "
                "them first"
            )
