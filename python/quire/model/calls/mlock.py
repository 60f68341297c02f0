"""mlock(2), mlock2, munlock, mlockall, munlockall: pages that stay in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.model import flags as f
from quire.model.calls.mmap import may_lock_at_all
from quire.model.calls.populate import populate
from quire.model.checks import Check, refuse_first
from quire.model.errors import CallError
from quire.model.geometry import WORD
from quire.model.page import Page

if TYPE_CHECKING:
    from quire.model.space import Space
    from quire.model.vma import Vma

__all__ = ["CHECKS", "CHECKS_OF_MLOCKALL", "mlock", "mlockall", "munlock", "munlockall"]


@dataclass
class _Request:
    """A range in whole pages, and mlock2's flags."""

    space: Space
    low: int
    size: int
    flags: int


CHECKS: tuple[Check[_Request], ...] = (
    Check("EINVAL", "unknown flags", lambda r: bool(r.flags & ~f.MLOCK_ONFAULT)),
    Check("EPERM", "RLIMIT_MEMLOCK is 0", lambda r: not may_lock_at_all(r.space)),
    Check("ENOMEM", "more locked memory than RLIMIT_MEMLOCK",
          lambda r: not _within_limit(r.space, r.low, r.size)),
)  # fmt: skip


def mlock(space: Space, start: int, length: int, flags: int = 0) -> None:
    """See `AddressSpace.mlock2`."""
    low, size = _whole_pages(space, start, length)
    refuse_first(CHECKS, _Request(space, low, size, flags))
    bits = f.LOCKED_MASK if flags & f.MLOCK_ONFAULT else f.LOCKED
    _apply(space, low, size, bits)
    try:
        populate(space, low, low + size, ignore_errors=False)
    except CallError as error:
        errno = "ENOMEM" if error.errno == "EFAULT" else "EAGAIN"
        raise CallError(errno, f"locked, but not all pages can be had: {error.why}") from None


def munlock(space: Space, start: int, length: int) -> None:
    """See `AddressSpace.munlock`."""
    low, size = _whole_pages(space, start, length)
    _apply(space, low, size, 0)


CHECKS_OF_MLOCKALL: tuple[Check[tuple[Space, int]], ...] = (
    Check("EINVAL", "no flag, an unknown one, or MCL_ONFAULT alone",
          lambda r: r[1] in (0, f.MCL["ONFAULT"]) or bool(r[1] & ~sum(f.MCL.values()))),
    Check("EPERM", "RLIMIT_MEMLOCK is 0", lambda r: not may_lock_at_all(r[0])),
    Check("ENOMEM", "more mapped memory than RLIMIT_MEMLOCK",
          lambda r: bool(r[1] & f.MCL["CURRENT"]) and _over_limit(r[0])),
)  # fmt: skip


def mlockall(space: Space, flags: int) -> None:
    """See `AddressSpace.mlockall`."""
    refuse_first(CHECKS_OF_MLOCKALL, (space, flags))
    bits = f.LOCKED_MASK if flags & f.MCL["ONFAULT"] else f.LOCKED
    space.future_flags = bits if flags & f.MCL["FUTURE"] else 0
    if flags & f.MCL["CURRENT"]:
        _apply_to_all(space, bits)
        populate(space, 0, space.geometry.user_top, ignore_errors=True)


def munlockall(space: Space) -> None:
    """See `AddressSpace.munlockall`."""
    space.future_flags = 0
    _apply_to_all(space, 0)


def _whole_pages(space: Space, start: int, length: int) -> tuple[int, int]:
    """The start rounded down and the length up, in 64 bits."""
    page = space.geometry.page_size
    return start & -page, space.geometry.page_up((length + start % page) % WORD)


def _within_limit(space: Space, low: int, size: int) -> bool:
    """Pages that are locked already do not count twice."""
    limit = space.limits["MEMLOCK"]
    if space.may_lock_beyond_limit or limit is None:
        return True
    already = sum(
        min(vma.end, low + size) - max(vma.start, low)
        for vma in space.vmas.overlapping(low, low + size)
        if vma.flags & f.LOCKED
    )
    page = space.geometry.page_size
    return space.locked_bytes() + size - already <= limit // page * page


def _over_limit(space: Space) -> bool:
    limit = space.limits["MEMLOCK"]
    if space.may_lock_beyond_limit or limit is None:
        return False
    return space.mapped_pages() > limit >> space.page_bits


def _apply(space: Space, low: int, size: int, bits: int) -> None:
    """Sets the lock flags VMA by VMA, up to a hole (`apply_vma_lock_flags`)."""
    high = (low + size) % WORD
    if high < low:
        raise CallError("EINVAL", "the range wraps")
    at = low
    for vma in space.vmas.overlapping(low, high):
        if vma.start > at:
            break
        end = min(vma.end, high)
        _set(space, vma, at, end, bits)
        at = end
    if at < high:
        raise CallError("ENOMEM", f"nothing is mapped at {at:#x}; what precedes it was changed")


def _apply_to_all(space: Space, bits: int) -> None:
    for vma in space.vmas:
        current = space.vmas.find(vma.start)  # an earlier change may have joined it
        if current is not None:
            _set(space, current, vma.start, vma.end, bits)


def _set(space: Space, vma: Vma, start: int, end: int, bits: int) -> None:
    flags = vma.flags & ~f.LOCKED_MASK | bits
    if flags == vma.flags or vma.flags & (f.DEVICE | f.DROPPABLE | f.HUGETLB):
        return
    space.vmas.change(vma, start, end, flags)
    if not bits:
        _release(space, start, end)


def _release(space: Space, start: int, end: int) -> None:
    """Unlocked pages may be evicted again."""
    memory = space.machine.memory
    for leaf in space.table.leaves(start, end):
        page = memory.pages[space.table.frame(leaf, max(leaf.start, start))]
        if page is not None:
            space.machine.pageout.rescue(page)
    for number in space.held(start >> space.page_bits, end >> space.page_bits):
        held = space.overlay[number]
        if isinstance(held, Page):
            space.machine.pageout.rescue(held)
