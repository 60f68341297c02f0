"""Where a mapping goes when it is not told: `get_unmapped_area`, from the top down."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.model import flags as f
from quire.model.errors import CallError
from quire.model.geometry import GUARD_GAP_PAGES

if TYPE_CHECKING:
    from quire.model.space import Space
    from quire.model.vma import Vma

__all__ = ["find_place", "gap_start", "hint_is_free"]

_LOW_32BIT_PAGES = 0x4_0000, 0x8_0000
"""With pages of 4 KiB the second GiB, where x86 puts MAP_32BIT."""
_PAGES_BELOW_4GIB = 0x10_0000


def find_place(
    space: Space,
    length: int,
    hint: int,
    *,
    align: int = 0,
    phase: int = 0,
    low: bool = False,
    high: bool = False,
) -> int:
    """An address for `length` free bytes: at `hint` if all of it is free, else the highest hole.

    `align` asks for a place that is `phase` beyond a multiple of it (huge pages), if there is one.
    `low` is MAP_32BIT, `high` MAP_ABOVE4G, which binds no hint.

    Raises:
        CallError: ENOMEM, there is no hole.
    """
    bottom, top = space.machine.lowest_address, space.machine.mmap_base
    highest = space.geometry.window_top
    if hint > highest:
        top, highest = top + space.geometry.user_top - highest, space.geometry.user_top
    if high:
        bottom = _PAGES_BELOW_4GIB << space.page_bits
    if low:
        bottom, top = (pages << space.page_bits for pages in _LOW_32BIT_PAGES)
    far = low and hint + length > top
    if hint and not far and hint_is_free(space, hint, length):
        return hint
    if align:
        place = _highest(space, length + align, bottom, top)
        if place is not None:
            end = place + align
            return end - (end - phase) % align
    for upper in (top, highest):
        place = _highest(space, length, bottom, upper)
        if place is not None:
            return place
    raise CallError("ENOMEM", f"no hole of {length} bytes in the address space")


def hint_is_free(space: Space, hint: int, length: int) -> bool:
    """Whether a hint can be honoured whole, the guard gap of a stack above it included."""
    if hint < space.machine.lowest_address or hint + length > space.geometry.user_top:
        return False
    above = space.vmas.at_or_after(hint)
    return above is None or hint + length <= gap_start(space, above)


def gap_start(space: Space, vma: Vma) -> int:
    """Where a VMA begins, its stack guard gap included (`vm_start_gap`)."""
    if not vma.flags & f.GROWSDOWN:
        return vma.start
    return max(0, vma.start - GUARD_GAP_PAGES * space.geometry.page_size)


def _highest(space: Space, length: int, low: int, high: int) -> int | None:
    for start, end in space.vmas.gaps(low, high):
        above = space.vmas.at_or_after(end)
        if above is not None and above.start == end:
            end = gap_start(space, above)
        if end - start >= length:
            return end - length
    return None
