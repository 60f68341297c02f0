"""madvise(2): hints, and some orders that are called hints.

The orders change what a program reads: DONTNEED and its kin drop private pages, REMOVE punches a
hole, GUARD_INSTALL forbids access, DONTFORK and WIPEONFORK decide what a child gets, POPULATE_*
touch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.model import fault
from quire.model import flags as f
from quire.model.calls.munmap import Range
from quire.model.calls.populate import touch
from quire.model.checks import Check, refuse_first
from quire.model.errors import CallError, DiskError, as_call_error
from quire.model.file_object import FileObject
from quire.model.huge_fault import free_private
from quire.model.page import Marker, Page
from quire.model.policy import TwoLists

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.model.space import Space
    from quire.model.vma import Vma

__all__ = ["CHECKS", "madvise"]

_NAMES = {number: name for name, number in f.MADV.items()}


@dataclass
class _Request(Range):
    advice: int


CHECKS: tuple[Check[_Request], ...] = (
    Check("EINVAL", "unknown advice", lambda r: r.advice not in _NAMES),
    Check("EINVAL", "the address is no multiple of the page size", lambda r: r.unaligned),
    Check("EINVAL", "the length wraps", lambda r: r.length != 0 and r.size == 0),
    Check("EINVAL", "the range wraps", lambda r: r.end < r.start),
)

_SET_AND_CLEAR = {
    "NORMAL": (0, f.RANDOM | f.SEQUENTIAL),
    "RANDOM": (f.RANDOM, f.SEQUENTIAL),
    "SEQUENTIAL": (f.SEQUENTIAL, f.RANDOM),
    "DONTFORK": (f.DONTFORK, 0),
    "DOFORK": (0, f.DONTFORK),
    "WIPEONFORK": (f.WIPEONFORK, 0),
    "KEEPONFORK": (0, f.WIPEONFORK),
    "DONTDUMP": (f.DONTDUMP, 0),
    "DODUMP": (0, f.DONTDUMP),
    "HUGEPAGE": (f.HUGEPAGE, f.NOHUGEPAGE),
    "NOHUGEPAGE": (f.NOHUGEPAGE, f.HUGEPAGE),
    "MERGEABLE": (f.MERGEABLE, 0),
    "UNMERGEABLE": (0, f.MERGEABLE),
}
"""Advice that only changes the flags of a VMA."""

_DISCARDS = ("DONTNEED", "DONTNEED_LOCKED", "FREE", "REMOVE", "DONTFORK", "WIPEONFORK",
             "GUARD_INSTALL")  # fmt: skip
"""Advice by which a sealed read-only mapping would lose data."""


def madvise(space: Space, start: int, length: int, advice: int) -> None:
    """See `AddressSpace.madvise`."""
    r = _Request(space, start, length, advice)
    refuse_first(CHECKS, r)
    if r.size == 0:
        return
    name = _NAMES[advice]
    if name in ("HWPOISON", "SOFT_OFFLINE"):
        raise CallError("EPERM", "not allowed to break memory")
    if name.startswith("POPULATE"):
        _populate(r, write=name == "POPULATE_WRITE")
        return
    at, hole = r.start, False
    for old in space.vmas.overlapping(r.start, r.end):
        hole |= at < old.start
        low, at = max(old.start, r.start), min(old.end, r.end)
        vma = space.vmas.find(low)
        assert vma is not None
        _advise(space, vma, low, at, name)
    if hole or at < r.end:
        raise CallError("ENOMEM", "part of the range is not mapped; the rest was advised")


def _advise(space: Space, vma: Vma, start: int, end: int, name: str) -> None:
    """One VMA's part (`madvise_vma_behavior`)."""
    if vma.flags & f.SEALED and name in _DISCARDS and _loses_by(vma):
        raise CallError("EPERM", "the mapping is sealed and read-only")
    if name in _SET_AND_CLEAR:
        _change_flags(space, vma, start, end, name)
    elif name in _ORDERS:
        _ORDERS[name](space, vma, start, end)


def _loses_by(vma: Vma) -> bool:
    """Whether dropping pages changes what a reader sees that nobody may write. Files show again."""
    return vma.anonymous and not vma.flags & f.WRITE


def _change_flags(space: Space, vma: Vma, start: int, end: int, name: str) -> None:
    if name == "WIPEONFORK" and (vma.file is not None or not vma.private):
        raise CallError("EINVAL", "MADV_WIPEONFORK of memory that is not private and anonymous")
    if name == "KEEPONFORK" and vma.flags & f.DROPPABLE:
        raise CallError("EINVAL", "MADV_KEEPONFORK of droppable memory")
    if name in ("DOFORK", "DODUMP") and vma.flags & f.DEVICE:
        raise CallError("EINVAL", f"MADV_{name} of a device")
    if name == "DODUMP" and vma.flags & f.DROPPABLE:
        raise CallError("EINVAL", "MADV_DODUMP of droppable memory")
    if name == "MERGEABLE" and (not vma.private or vma.flags & f.HUGETLB):
        return  # nothing that could be merged: accepted and forgotten
    to_set, to_clear = _SET_AND_CLEAR[name]
    flags = (vma.flags | to_set) & ~to_clear
    if flags == vma.flags:
        return
    try:
        space.vmas.change(vma, start, end, flags)
    except CallError as error:
        errno = "EAGAIN" if error.errno == "ENOMEM" else error.errno
        raise CallError(errno, error.why) from None


def _dontneed(space: Space, vma: Vma, start: int, end: int) -> None:
    if vma.flags & f.LOCKED:
        raise CallError("EINVAL", "MADV_DONTNEED of locked memory")
    _dontneed_locked(space, vma, start, end)


def _dontneed_locked(space: Space, vma: Vma, start: int, end: int) -> None:
    if vma.flags & f.DEVICE:
        raise CallError("EINVAL", "MADV_DONTNEED of a device")
    if vma.flags & f.HUGETLB:
        _dontneed_huge(space, vma, start, end)
        return
    first, last = start >> space.page_bits, end >> space.page_bits
    space.forget_range(first, last)
    space.drop_range(first, last)


def _dontneed_huge(space: Space, vma: Vma, start: int, end: int) -> None:
    """Whole huge pages alone: a part at the end is left, lest more be lost than was meant."""
    block = space.geometry.block_size
    if start % block:
        raise CallError("EINVAL", "MADV_DONTNEED from within a huge page")
    end -= end % block
    space.forget_range(start >> space.page_bits, end >> space.page_bits)
    if vma.private:
        free_private(space, vma, start, end)


def _free(space: Space, vma: Vma, start: int, end: int) -> None:
    """Pages that need not be kept; a store before they are evicted keeps them after all."""
    if vma.flags & f.LOCKED or not vma.anonymous:
        raise CallError("EINVAL", "MADV_FREE of memory that is locked, shared or of a file")
    first, last = start >> space.page_bits, end >> space.page_bits
    space.forget_range(first, last)
    for number in space.held(first, last):
        held = space.overlay[number]
        if not isinstance(held, Page):
            continue
        if held.frame is None:
            if not space.machine.pageout.acts_ample:
                space.drop_private(number)
        elif len(held.holders) == 1:
            held.lazily_free, held.dirty = True, False
            space.machine.swap.discard(held)  # it may be older than the page


def _remove(space: Space, vma: Vma, start: int, end: int) -> None:
    if vma.flags & f.LOCKED:
        raise CallError("EINVAL", "MADV_REMOVE of locked memory")
    if vma.object is None and vma.file is None:
        raise CallError("EINVAL", "MADV_REMOVE of memory without an object")
    if not vma.writes_object or vma.object is None:
        raise CallError("EACCES", "MADV_REMOVE of a mapping that can never write its file")
    if not isinstance(vma.object, FileObject):
        raise CallError("EOPNOTSUPP", "a device has no holes")
    offset = vma.index(start, space.page_bits) << space.page_bits
    if offset >= 1 << 63:
        raise CallError("EINVAL", "MADV_REMOVE at an offset that is negative as a signed number")
    if offset + end - start > vma.object.largest:
        raise CallError("EFBIG", "beyond what a file can be")
    vma.object.punch(offset, end - start)


def _cold(space: Space, vma: Vma, start: int, end: int) -> None:
    if vma.flags & (f.LOCKED | f.DEVICE | f.HUGETLB):
        raise CallError("EINVAL", "MADV_COLD or MADV_PAGEOUT of memory that is never evicted")
    policy = space.machine.pageout.policy
    if isinstance(policy, TwoLists):
        for page in _known_pages(space, vma, start, end):
            if page in policy:
                policy.deactivate(page)


def _pageout(space: Space, vma: Vma, start: int, end: int) -> None:
    """Evicts pages that nobody else holds."""
    _cold(space, vma, start, end)
    pageout = space.machine.pageout
    for page in _known_pages(space, vma, start, end):
        alone = len(page.mappings) <= 1 and len(page.holders) <= 1
        if not alone or page.frame is None or page.poisoned or page.wired:
            continue
        pageout.withdraw(page)
        if page.droppable:
            pageout.forget(page)
        elif not pageout.evict(page):
            pageout.policy.insert(page)


def _willneed(space: Space, vma: Vma, start: int, end: int) -> None:
    """Reads ahead, if there is room: a hint does not evict. It ends at a block that is broken."""
    pageout = space.machine.pageout
    waiting = [page for page in _known_pages(space, vma, start, end) if page.frame is None]
    for page in waiting:
        if pageout.has_room:
            pageout.bring_in(page)
    if not isinstance(vma.object, FileObject) or vma.object.backing is None:
        return
    last = min(vma.index(end, space.page_bits), vma.object.page_count())
    for index in range(vma.index(start, space.page_bits), last):
        if pageout.has_room:
            try:
                vma.object.page(index)
            except DiskError:
                return


def _collapse(space: Space, vma: Vma, start: int, end: int) -> None:
    """MADV_COLLAPSE: whole aligned blocks become huge pages, as many as can; the rest is said."""
    block = space.geometry.block_size
    low, high = -(-vma.start // block) * block, vma.end // block * block
    shared = isinstance(vma.object, FileObject) and vma.object.backing is None
    aligned = vma.anonymous or vma.index(low, space.page_bits) << space.page_bits & block - 1 == 0
    if low >= high or vma.flags & f.NOHUGEPAGE or not (vma.anonymous or shared) or not aligned:
        raise CallError("EINVAL", "no aligned block of memory that may be huge in the mapping")
    first = max(low, -(-start // block) * block)
    refused = None
    for base in range(first, min(high, end // block * block), block):
        try:
            with as_call_error():
                fault.collapse(space, vma, base)
        except CallError as error:
            refused = error
    if refused is not None:
        raise refused


def _guard_install(space: Space, vma: Vma, start: int, end: int) -> None:
    if vma.flags & (f.LOCKED | f.DEVICE | f.HUGETLB):
        raise CallError("EINVAL", "MADV_GUARD_INSTALL in locked or huge memory or a device")
    fault.find_family(space, vma)  # so that a child inherits the markers
    first, last = start >> space.page_bits, end >> space.page_bits
    space.forget_range(first, last)
    space.drop_range(first, last)
    for number in range(first, last):
        space.overlay[number] = Marker.GUARD


def _guard_remove(space: Space, vma: Vma, start: int, end: int) -> None:
    if vma.flags & (f.DEVICE | f.HUGETLB):
        raise CallError("EINVAL", "MADV_GUARD_REMOVE in a device or huge memory")
    for number in space.held(start >> space.page_bits, end >> space.page_bits):
        if space.overlay[number] is Marker.GUARD:
            del space.overlay[number]


_ORDERS: dict[str, Callable[[Space, Vma, int, int], None]] = {
    "DONTNEED": _dontneed,
    "DONTNEED_LOCKED": _dontneed_locked,
    "FREE": _free,
    "REMOVE": _remove,
    "COLD": _cold,
    "PAGEOUT": _pageout,
    "WILLNEED": _willneed,
    "COLLAPSE": _collapse,
    "GUARD_INSTALL": _guard_install,
    "GUARD_REMOVE": _guard_remove,
}


def _known_pages(space: Space, vma: Vma, start: int, end: int) -> list[Page]:
    """Pages that exist in a range, wherever they are: private ones, else the object's."""
    bits = space.page_bits
    held = [space.overlay[number] for number in space.held(start >> bits, end >> bits)]
    pages = [page for page in held if isinstance(page, Page)]
    if vma.object is not None:
        first, last = vma.index(start, bits), vma.index(end, bits)
        pages += [page for index, page in vma.object.pages.items() if first <= index < last]
    return pages


def _populate(r: _Request, *, write: bool) -> None:
    """Touches every page, up to the first that cannot be had."""
    space, at = r.space, r.start
    needed = f.WRITE if write else f.READ
    for vma in space.vmas.overlapping(r.start, r.end):
        if vma.start > at:
            break
        if not vma.flags & needed or vma.flags & f.DEVICE:
            raise CallError("EINVAL", "the mapping does not allow it")
        for address in range(at, min(vma.end, r.end), space.geometry.page_size):
            touch(space, vma, address, write=write)
        at = vma.end
    if at < r.end:
        raise CallError("ENOMEM", f"nothing is mapped at {at:#x}")
