"""munmap(2): mappings end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.model import flags as f
from quire.model.checks import Check, refuse_first
from quire.model.errors import CallError
from quire.model.geometry import WORD

if TYPE_CHECKING:
    from quire.model.space import Space

__all__ = ["CHECKS", "Range", "check_removal", "munmap"]


@dataclass
class Range:
    """A range of addresses as a call got it."""

    space: Space
    start: int
    length: int

    @property
    def size(self) -> int:
        """Bytes in whole pages; 0 if that wraps."""
        return self.space.geometry.page_up(self.length)

    @property
    def end(self) -> int:
        """The end, in 64 bits: may lie below the start."""
        return (self.start + self.size) % WORD

    @property
    def unaligned(self) -> bool:
        """Whether the start is no multiple of the page size."""
        return self.start % self.space.geometry.page_size != 0


CHECKS: tuple[Check[Range], ...] = (
    Check("EINVAL", "the address is no multiple of the page size", lambda r: r.unaligned),
    Check("EINVAL", "the range leaves user space",
          lambda r: r.start > r.space.geometry.user_top
          or r.length > r.space.geometry.user_top - r.start),
    Check("EINVAL", "length 0", lambda r: r.size == 0),
)  # fmt: skip


def munmap(space: Space, start: int, length: int) -> None:
    """See `AddressSpace.munmap`."""
    r = Range(space, start, length)
    refuse_first(CHECKS, r)
    check_removal(space, r.start, r.end)
    space.unmap(r.start, r.end)
    space.machine.trace.add("munmap", start=r.start, end=r.end)


def check_removal(space: Space, start: int, end: int) -> None:
    """Whether what lies in a range may be removed (`vms_gather_munmap_vmas`): all or nothing.

    VMAs that reach over its ends are cut there, and stay cut if the removal comes to nothing: both
    sides are alike, but mremap no longer takes them for one.

    Raises:
        CallError: ENOMEM, one VMA would become two at vm.max_map_count; EPERM, a VMA is sealed;
            EINVAL, a huge page of the pool would be cut.
    """
    for vma in space.vmas.overlapping(start, end):
        if vma.start < start and end < vma.end and len(space.vmas) >= space.vmas.limit:
            raise CallError("ENOMEM", "a mapping would be cut in two at vm.max_map_count")
        if vma.flags & f.SEALED:
            raise CallError("EPERM", "the mapping is sealed")
        inside = vma
        if vma.start < start:
            inside = space.vmas.divide(vma, start)[1]
        if end < vma.end:
            space.vmas.divide(inside, end)
