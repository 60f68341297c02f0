"""mincore(2): which pages are in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.model import flags as f
from quire.model.calls.munmap import Range
from quire.model.checks import Check, refuse_first
from quire.model.errors import CallError
from quire.model.page import Marker, Page

if TYPE_CHECKING:
    from quire.model.space import Space
    from quire.model.vma import Vma

__all__ = ["CHECKS", "mincore"]

CHECKS: tuple[Check[Range], ...] = (
    Check("EINVAL", "the address is no multiple of the page size", lambda r: r.unaligned),
    Check("ENOMEM", "the range leaves user space",
          lambda r: r.start + r.length > r.space.geometry.user_top),
)  # fmt: skip


def mincore(space: Space, start: int, length: int) -> list[bool]:
    """See `AddressSpace.mincore`."""
    r = Range(space, start, length)
    refuse_first(CHECKS, r)
    answer = []
    vma: Vma | None = None
    for address in range(start, start + r.size, space.geometry.page_size):
        if vma is None or address >= vma.end:
            vma = space.vmas.find(address)
        if vma is None:
            raise CallError("ENOMEM", f"nothing is mapped at {address:#x}")
        answer.append(_resident(space, vma, address))
    return answer


def _resident(space: Space, vma: Vma, address: int) -> bool:
    """A private page in a frame; the zero page; else what the object's cache says.

    Shared huge pages of the pool are in memory where they were touched here. (Simplified: and not
    moved, nor forbidden, since.)
    """
    held = space.overlay.get(address >> space.page_bits)
    if isinstance(held, Page):
        return held.frame is not None
    if held is Marker.ZERO:
        return True
    if vma.flags & f.HUGETLB:
        return space.table.leaf(address) is not None
    return vma.object is not None and vma.object.resident(vma.index(address, space.page_bits))
