"""msync(2): what was stored through shared mappings goes to the disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.model import flags as f
from quire.model.calls.munmap import Range
from quire.model.checks import Check, refuse_first
from quire.model.errors import CallError, as_call_error

if TYPE_CHECKING:
    from quire.model.space import Space

__all__ = ["CHECKS", "msync"]

_ALL = sum(f.MS.values())
_BOTH = f.MS["SYNC"] | f.MS["ASYNC"]


@dataclass
class _Request(Range):
    flags: int


CHECKS: tuple[Check[_Request], ...] = (
    Check("EINVAL", "unknown flags", lambda r: bool(r.flags & ~_ALL)),
    Check("EINVAL", "the address is no multiple of the page size", lambda r: r.unaligned),
    Check("EINVAL", "MS_SYNC and MS_ASYNC", lambda r: r.flags & _BOTH == _BOTH),
    Check("ENOMEM", "the range wraps", lambda r: r.end < r.start),
)


@as_call_error()
def msync(space: Space, start: int, length: int, flags: int) -> None:
    """See `AddressSpace.msync`. MS_ASYNC and 0 do no I/O; MS_INVALIDATE checks for locks alone."""
    r = _Request(space, start, length, flags)
    refuse_first(CHECKS, r)
    at, hole = r.start, False
    for vma in space.vmas.overlapping(r.start, r.end):
        if at < vma.start:
            if flags == f.MS["ASYNC"]:
                raise CallError("ENOMEM", "part of the range is not mapped")
            hole = True
        if flags & f.MS["INVALIDATE"] and vma.flags & f.LOCKED:
            raise CallError("EBUSY", "MS_INVALIDATE of locked memory")
        if flags & f.MS["SYNC"] and vma.flags & f.SHARED and vma.object is not None:
            low, high = max(vma.start, r.start), min(vma.end, r.end)
            vma.object.sync(vma.index(low, space.page_bits), vma.index(high, space.page_bits))
        at = vma.end
    if hole or at < r.end:
        raise CallError("ENOMEM", "part of the range is not mapped; the rest was synced")
