"""brk(2): the end of the heap moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.model import flags as f
from quire.model.calls.munmap import check_removal
from quire.model.calls.placement import gap_start
from quire.model.calls.populate import populate
from quire.model.errors import CallError
from quire.model.vma import Vma

if TYPE_CHECKING:
    from quire.model.space import Space

__all__ = ["brk"]


def brk(space: Space, end: int) -> int:
    """See `AddressSpace.brk`: the new end, or the old one if it could not be moved."""
    if end < space.brk_start or not _fits_data_limit(space, end):
        return space.brk_end
    page_up = space.geometry.page_up
    old, new = page_up(space.brk_end), page_up(end)
    try:
        if new < old:
            check_removal(space, new, old)
            space.unmap(new, old)
        elif new > old:
            _grow(space, old, new)
    except CallError:
        return space.brk_end
    space.brk_end = end
    return end


def _fits_data_limit(space: Space, end: int) -> bool:
    limit = space.limits["DATA"]
    return limit is None or end - space.brk_start <= limit


def _grow(space: Space, old: int, new: int) -> None:
    above = space.vmas.at_or_after(old)
    if new > space.geometry.user_top:
        raise CallError("ENOMEM", "the heap would leave user space")
    if above is not None and new + space.geometry.page_size > gap_start(space, above):
        raise CallError("ENOMEM", "a mapping is in the way")
    if len(space.vmas) > space.vmas.limit:
        raise CallError("ENOMEM", "more than vm.max_map_count mappings")
    flags = f.READ | f.WRITE | f.MAY_READ | f.MAY_WRITE | f.MAY_EXEC | f.ACCOUNT
    flags |= space.future_flags
    pages = (new - old) >> space.page_bits
    machine = space.machine
    if not machine.may_grow(space, flags, pages, locks=True) or not machine.may_promise(pages):
        raise CallError("ENOMEM", "a limit")
    space.vmas.add(Vma(old, new, flags, old >> space.page_bits))
    if flags & f.LOCKED:
        populate(space, old, new, ignore_errors=True)
