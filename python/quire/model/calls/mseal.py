"""mseal(2): mappings that can be neither removed, moved nor changed any more (Linux 6.10)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.model import flags as f
from quire.model.calls.munmap import Range
from quire.model.checks import Check, refuse_first
from quire.model.errors import CallError

if TYPE_CHECKING:
    from quire.model.space import Space

__all__ = ["CHECKS", "mseal"]


@dataclass
class _Request(Range):
    flags: int


CHECKS: tuple[Check[_Request], ...] = (
    Check("EINVAL", "flags must be 0", lambda r: r.flags != 0),
    Check("EINVAL", "the address is no multiple of the page size", lambda r: r.unaligned),
    Check("EINVAL", "the length wraps", lambda r: r.length != 0 and r.size == 0),
    Check("EINVAL", "the range wraps", lambda r: r.end < r.start),
)


def mseal(space: Space, start: int, length: int, flags: int) -> None:
    """See `AddressSpace.mseal`."""
    r = _Request(space, start, length, flags)
    refuse_first(CHECKS, r)
    at = r.start
    found = space.vmas.overlapping(r.start, r.end)
    for vma in found:
        if vma.start > at:
            break
        at = vma.end
    if at < r.end:
        raise CallError("ENOMEM", "part of the range is not mapped; nothing was sealed")
    for vma in found:
        if not vma.flags & f.SEALED:
            low, high = max(vma.start, start), min(vma.end, r.end)
            space.vmas.change(vma, low, high, vma.flags | f.SEALED)
