"""mremap(2): a mapping shrinks, grows, moves, or is shown a second time.

After mm/mremap.c of Linux 6.18.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quire.model import flags as f
from quire.model.calls.munmap import munmap
from quire.model.calls.placement import find_place
from quire.model.calls.populate import populate
from quire.model.checks import Check, refuse_first
from quire.model.errors import CallError
from quire.model.geometry import WORD
from quire.model.page import Page

if TYPE_CHECKING:
    from quire.model.space import Space
    from quire.model.vma import Vma

__all__ = ["CHECKS", "mremap"]

_MAYMOVE, _FIXED, _DONTUNMAP = (f.MREMAP[name] for name in ("MAYMOVE", "FIXED", "DONTUNMAP"))
_MAPS_FOR_A_MOVE = 6
"""A move may cut source and target; the kernel asks for this much room below vm.max_map_count."""


@dataclass
class _Request:
    """The arguments, sizes in whole pages, and `target`: the wished or the found place."""

    space: Space
    start: int
    old: int
    new: int
    flags: int
    target: int

    @property
    def names_target(self) -> bool:
        """Whether the mapping gets a new address in any case."""
        return bool(self.flags & (_FIXED | _DONTUNMAP))

    @property
    def delta(self) -> int:
        """Bytes by which it grows."""
        return self.new - self.old

    @property
    def overlaps(self) -> bool:
        """Whether source and target touch. Linux lets the end of the source wrap."""
        end = (self.start + self.old) % WORD
        return self.start < self.target + self.new and self.target < end


@dataclass
class _Source:
    """A request beside the mapping that it is about."""

    space: Space
    start: int
    old: int
    new: int
    keeps_source: bool
    vma: Vma | None

    @property
    def known(self) -> Vma:
        """The mapping, which is there."""
        assert self.vma is not None
        return self.vma

    @property
    def flags(self) -> int:
        """Those of the mapping."""
        return self.known.flags

    @property
    def rest(self) -> int:
        """Bytes from the start of the range to the end of its mapping."""
        return self.known.end - self.start


def _aligned(r: _Request, address: int) -> bool:
    return address % r.space.geometry.page_size == 0


CHECKS: tuple[Check[_Request], ...] = (
    Check("EINVAL", "unknown flags", lambda r: bool(r.flags & ~(_MAYMOVE | _FIXED | _DONTUNMAP))),
    Check("EINVAL", "the address is no multiple of the page size",
          lambda r: not _aligned(r, r.start)),
    Check("EINVAL", "new size 0", lambda r: r.new == 0),
    Check("EINVAL", "new size beyond user space", lambda r: r.new > r.space.geometry.user_top),
    Check("EINVAL", "the target leaves user space",
          lambda r: r.names_target and r.target > r.space.geometry.user_top - r.new),
    Check("EINVAL", "the target is no multiple of the page size",
          lambda r: r.names_target and not _aligned(r, r.target)),
    Check("EINVAL", "MREMAP_FIXED or MREMAP_DONTUNMAP without MREMAP_MAYMOVE",
          lambda r: r.names_target and not r.flags & _MAYMOVE),
    Check("EINVAL", "MREMAP_DONTUNMAP with another size",
          lambda r: bool(r.flags & _DONTUNMAP) and r.old != r.new),
    Check("EINVAL", "source and target overlap", lambda r: r.names_target and r.overlaps),
    Check("ENOMEM", "too near vm.max_map_count for a move",
          lambda r: r.names_target
          and len(r.space.vmas) + 2 >= r.space.vmas.limit - (_MAPS_FOR_A_MOVE - 3)),
)  # fmt: skip


def mremap(space: Space, start: int, old: int, new: int, flags: int, target: int) -> int:
    """See `AddressSpace.mremap`."""
    page_up = space.geometry.page_up
    r = _Request(space, start, page_up(old), page_up(new), flags, target)
    refuse_first(CHECKS, r)
    if flags & _FIXED and r.old == r.new:
        return _move_all(r)
    r, vma = check_source(r, space.vmas.find(start))
    if r.names_target:
        return _to_target(r, vma)
    if r.new == r.old:
        return start
    if r.new < r.old:
        munmap(space, start + r.new, r.old - r.new)
        return start
    return _grow(r, vma)


CHECKS_OF_SOURCE: tuple[Check[_Source], ...] = (
    Check("EFAULT", "nothing is mapped at the address", lambda r: r.vma is None),
    Check("EPERM", "the mapping is sealed", lambda r: bool(r.flags & f.SEALED)),
)
CHECKS_OF_MOVE: tuple[Check[_Source], ...] = (
    Check("EINVAL", "only a shared mapping can be shown twice (old size 0)",
          lambda r: r.old == 0 and not r.flags & (f.SHARED | f.MAY_SHARE)),
    Check("EINVAL", "MREMAP_DONTUNMAP of a device or of huge pages",
          lambda r: r.keeps_source and bool(r.flags & (f.DEVICE | f.HUGETLB))),
    Check("EFAULT", "the range to keep crosses the end of its mapping",
          lambda r: min(r.old, r.new) > r.rest),
)  # fmt: skip
"""When it may get a new address: by a wish, or because it grows."""
CHECKS_OF_GROWTH: tuple[Check[_Source], ...] = (
    Check("EFAULT", "the range crosses the end of its mapping", lambda r: r.old > r.rest),
    Check("EFAULT", "a device's mapping does not grow", lambda r: bool(r.flags & f.DEVICE)),
    Check("EAGAIN", "more locked memory than RLIMIT_MEMLOCK",
          lambda r: not r.space.machine.may_lock(r.space, r.flags, r.new - r.old)),
    Check("ENOMEM", "RLIMIT_AS or RLIMIT_DATA",
          lambda r: not r.space.machine.may_grow(
              r.space, r.flags, (r.new - r.old) >> r.space.page_bits)),
)  # fmt: skip


def check_source(r: _Request, vma: Vma | None) -> tuple[_Request, Vma]:
    """Whether the mapping at `start` may be changed like that (`check_prep_vma`).

    Of huge pages the sizes are rounded up to theirs.
    """
    if vma is not None and vma.flags & f.HUGETLB and not vma.flags & f.SEALED:
        r = _in_huge_pages(r)
    source = _Source(r.space, r.start, r.old, r.new, bool(r.flags & _DONTUNMAP), vma)
    refuse_first(CHECKS_OF_SOURCE, source)
    if r.names_target or r.new > r.old:
        refuse_first(CHECKS_OF_MOVE, source)
    if r.new > r.old:
        refuse_first(CHECKS_OF_GROWTH, source)
    return r, source.known


def _in_huge_pages(r: _Request) -> _Request:
    """Sizes in whole huge pages, whose promises cannot be divided (`align_hugetlb`)."""
    block = r.space.geometry.block_size
    r = replace(r, old=-(-r.old // block) * block, new=-(-r.new // block) * block)
    if r.start % block or (r.names_target and r.target % block) or r.new > r.old:
        raise CallError("EINVAL", "huge pages are moved whole, and do not grow")
    return r


def _move_all(r: _Request) -> int:
    """MREMAP_FIXED without a new size: every mapping of the range moves, and the gaps are kept.

    What lies at the target under a gap stays (since Linux 6.17).
    """
    space, first = r.space, True
    for vma in space.vmas.overlapping(r.start, r.start + r.old):
        low, high = max(vma.start, r.start), min(vma.end, r.start + r.old)
        if first and low > r.start:
            raise CallError("EFAULT", "the range begins in a hole")
        if not _moves_with_others(vma) and not (first and vma.end >= r.start + r.old):
            raise CallError("EFAULT", "a mapping that can only be moved alone")
        part = replace(
            r, start=low, old=high - low, new=high - low, target=r.target + low - r.start
        )
        part, _ = check_source(part, vma)
        _to_target(part, vma)
        first = False
    if first:
        raise CallError("EFAULT", f"nothing is mapped at {r.start:#x}")
    return r.target


def _moves_with_others(vma: Vma) -> bool:
    """`vma_multi_allowed`: not where the file itself chooses addresses."""
    return not vma.flags & f.DEVICE and not (vma.anonymous and vma.file is not None)


def _to_target(r: _Request, vma: Vma) -> int:
    """Moves a part of one VMA, perhaps with a new size, to the place that was named."""
    space = r.space
    if r.flags & _FIXED:
        munmap(space, r.target, r.new)
        vma = _source(r)
    if r.new < r.old:
        munmap(space, r.start + r.new, r.old - r.new)
        r = replace(r, old=r.new)
        vma = _source(r)
    pages = r.old >> space.page_bits
    if r.flags & _DONTUNMAP and not space.machine.may_grow(space, vma.flags, pages):
        raise CallError("ENOMEM", "RLIMIT_AS or RLIMIT_DATA")
    if r.flags & _FIXED and r.target < space.machine.lowest_address and not space.may_map_low:
        raise CallError("EPERM", "below vm.mmap_min_addr without CAP_SYS_RAWIO")
    if not r.flags & _FIXED:
        r = replace(r, target=find_place(space, r.new, r.target & -space.geometry.page_size))
    return _move(r, vma)


def _source(r: _Request) -> Vma:
    """The mapping to move, after something beside it was unmapped: perhaps it is another, or gone.

    Only a source that wraps can overlap what was unmapped.
    """
    vma = r.space.vmas.find(r.start)
    if vma is None:
        raise CallError("EFAULT", "the source is gone")
    return vma


def _grow(r: _Request, vma: Vma) -> int:
    """In place if there is room, else elsewhere if that is allowed."""
    space, end = r.space, r.start + r.old
    above = space.vmas.after(vma)
    room = space.geometry.user_top if above is None else above.start
    if vma.end == end and r.old and end + r.delta <= room:
        _promise(r, vma, r.delta)
        grown = space.vmas.resize(vma, vma.start, end + r.delta)
        if grown.flags & f.LOCKED:
            populate(space, end, end + r.delta, ignore_errors=True)
        return r.start
    if not r.flags & _MAYMOVE:
        raise CallError("ENOMEM", "no room above, and MREMAP_MAYMOVE was not given")
    return _move(replace(r, target=find_place(space, r.new, 0)), vma)


def _move(r: _Request, vma: Vma) -> int:
    """Shows a range at `target` with the new size; the old place ends (`move_vma`)."""
    space, bits = r.space, r.space.page_bits
    if len(space.vmas) >= space.vmas.limit - 3:
        raise CallError("ENOMEM", "too near vm.max_map_count for a move")
    _promise(r, vma, r.new if r.flags & _DONTUNMAP else r.delta)
    moved = replace(vma, start=r.target, end=r.target + r.new, offset=vma.index(r.start, bits))
    if vma.anonymous and vma.lineage is None:
        moved.offset = r.target >> bits  # untouched: it may as well have been born there
    whole = vma.start == r.start and vma.end == r.start + r.old
    space.vmas.add(moved)
    _move_pages(space, r.start, r.old, r.target)
    if r.flags & _DONTUNMAP:
        left = space.vmas.find(r.start)
        assert left is not None
        if left.flags & f.LOCKED:
            space.locked_drift += left.size
            left = space.vmas.change(left, left.start, left.end, left.flags & ~f.LOCKED_MASK)
        if whole:
            left.lineage = None
    elif r.old:
        space.unmap(r.start, r.start + r.old)
    if vma.flags & f.LOCKED and r.delta > 0:
        populate(space, r.target + r.old, r.target + r.new, ignore_errors=True)
    space.machine.trace.add("mremap", start=r.target, end=r.target + r.new)
    return r.target


def _move_pages(space: Space, start: int, size: int, target: int) -> None:
    """Private pages and markers go along; translations come back by faults (`move_page_tables`)."""
    bits = space.page_bits
    first, last, shift = start >> bits, (start + size) >> bits, (target - start) >> bits
    space.forget_range(first, last)
    for number in space.held(first, last):
        held = space.overlay.pop(number)
        space.overlay[number + shift] = held
        if isinstance(held, Page):
            held.holders.discard((space, number))
            held.holders.add((space, number + shift))


def _promise(r: _Request, vma: Vma, size: int) -> None:
    if vma.flags & f.ACCOUNT and not r.space.machine.may_promise(size >> r.space.page_bits):
        raise CallError("ENOMEM", "more memory than may be promised")
