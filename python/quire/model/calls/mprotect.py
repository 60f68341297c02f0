"""mprotect(2): the protection of mapped pages changes, VMA by VMA, until one refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.model import flags as f
from quire.model.calls.munmap import Range
from quire.model.calls.populate import populate
from quire.model.checks import Check, refuse_first
from quire.model.errors import CallError

if TYPE_CHECKING:
    from quire.model.space import Space
    from quire.model.vma import Vma

__all__ = ["CHECKS_AFTER_LENGTH", "CHECKS_BEFORE_LENGTH", "mprotect"]

_GROWS = f.PROT_GROWSDOWN | f.PROT_GROWSUP


@dataclass
class _Request(Range):
    prot: int


CHECKS_BEFORE_LENGTH: tuple[Check[_Request], ...] = (
    Check("EINVAL", "PROT_GROWSDOWN and PROT_GROWSUP", lambda r: r.prot & _GROWS == _GROWS),
    Check("EINVAL", "the address is no multiple of the page size", lambda r: r.unaligned),
)
"""These come before length 0, which succeeds."""

CHECKS_AFTER_LENGTH: tuple[Check[_Request], ...] = (
    Check("ENOMEM", "the range wraps", lambda r: r.end <= r.start),
    Check("EINVAL", "unknown protection bits",
          lambda r: bool(r.prot & ~(f.ACCESS | f.PROT_SEM | _GROWS))),
)  # fmt: skip


def mprotect(space: Space, start: int, length: int, prot: int) -> None:
    """See `AddressSpace.mprotect`."""
    r = _Request(space, start, length, prot & 0xFFFF_FFFF)
    refuse_first(CHECKS_BEFORE_LENGTH, r)
    if length == 0:
        return
    refuse_first(CHECKS_AFTER_LENGTH, r)
    at = _first_address(r)
    for vma in space.vmas.overlapping(at, r.end):
        if vma.start > at:
            break
        end = min(vma.end, r.end)
        _protect(space, vma, at, end, r.prot & f.ACCESS)
        at = end
    if at < r.end:
        raise CallError("ENOMEM", f"nothing is mapped at {at:#x}; what precedes it was changed")


def _first_address(r: _Request) -> int:
    """Where to begin: PROT_GROWSDOWN reaches down to the start of a stack."""
    vma = r.space.vmas.at_or_after(r.start)
    if vma is None:
        raise CallError("ENOMEM", "nothing is mapped there")
    if r.prot & f.PROT_GROWSDOWN:
        if vma.start >= r.end:
            raise CallError("ENOMEM", "nothing is mapped there")
        if not vma.flags & f.GROWSDOWN:
            raise CallError("EINVAL", "PROT_GROWSDOWN of a mapping that does not grow")
        return vma.start
    if vma.start > r.start:
        raise CallError("ENOMEM", "nothing is mapped there")
    if r.prot & f.PROT_GROWSUP:
        raise CallError("EINVAL", "PROT_GROWSUP of a mapping that does not grow")
    return r.start


def _protect(space: Space, vma: Vma, start: int, end: int, prot: int) -> None:
    """One VMA's part (`mprotect_fixup`)."""
    if prot & ~(vma.flags >> f.MAY_SHIFT) & f.ACCESS:
        raise CallError("EACCES", "more than the mapping can ever allow (a read-only descriptor)")
    if vma.flags & f.SEALED:
        raise CallError("EPERM", "the mapping is sealed")
    old = vma.flags
    new = old & ~f.ACCESS | prot
    if new == old:
        return
    new = _promise(space, vma, new, (end - start) >> space.page_bits)
    space.vmas.change(vma, start, end, new)
    space.restrict_range(start >> space.page_bits, end >> space.page_bits, new)
    if old & (f.WRITE | f.SHARED | f.LOCKED) == f.LOCKED and new & f.WRITE:
        populate(space, start, end, ignore_errors=True)  # a locked page must not fault again


def _promise(space: Space, vma: Vma, new: int, pages: int) -> int:
    """A private mapping that becomes writable is promised its pages."""
    machine = space.machine
    if new & f.WRITE:
        if not machine.may_grow(space, new, pages) and machine.may_grow(space, vma.flags, pages):
            raise CallError("ENOMEM", "RLIMIT_DATA")
        if not vma.flags & (f.ACCOUNT | f.WRITE | f.SHARED | f.NORESERVE | f.HUGETLB):
            if not machine.may_promise(pages):
                raise CallError("ENOMEM", "more memory than may be promised")
            return new | f.ACCOUNT
    elif vma.flags & f.ACCOUNT and vma.anonymous and vma.lineage is None:
        return new & ~f.ACCOUNT
    return new
