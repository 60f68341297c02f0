"""remap_file_pages(2): other pages of the same file in part of a mapping, by mapping over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.model import flags as f
from quire.model.calls.mmap import may_lock_at_all
from quire.model.calls.munmap import check_removal
from quire.model.calls.populate import populate
from quire.model.checks import Check, refuse_first
from quire.model.errors import CallError
from quire.model.file_object import FileObject
from quire.model.geometry import WORD

if TYPE_CHECKING:
    from quire.model.space import Space
    from quire.model.vma import Vma

__all__ = ["CHECKS", "remap_file_pages"]


@dataclass
class _Request:
    space: Space
    start: int
    size: int
    prot: int
    page: int

    @property
    def end(self) -> int:
        """The end, in 64 bits."""
        return (self.start + self.size) % WORD


CHECKS: tuple[Check[_Request], ...] = (
    Check("EINVAL", "prot must be 0", lambda r: r.prot != 0),
    Check("EINVAL", "an empty or wrapping range", lambda r: r.end <= r.start),
    Check("EINVAL", "the page offset wraps",
          lambda r: r.page + (r.size >> r.space.page_bits) >= WORD),
    Check("EINVAL", "not inside one shared mapping of a writable descriptor",
          lambda r: not _shared_run(r)),
)  # fmt: skip


def remap_file_pages(space: Space, start: int, size: int, prot: int, page: int) -> None:
    """See `AddressSpace.remap_file_pages`."""
    mask = -space.geometry.page_size
    r = _Request(space, start & mask, size & mask, prot, page)
    refuse_first(CHECKS, r)
    vma = space.vmas.find(r.start)
    assert vma is not None
    if len(space.vmas) > space.vmas.limit:
        raise CallError("ENOMEM", "more than vm.max_map_count mappings")
    flags = _flags_of_new(space, vma)
    if vma.flags & f.LOCKED and not may_lock_at_all(space):
        raise CallError("EPERM", "the mapping is locked, and RLIMIT_MEMLOCK is 0")
    if not space.machine.may_lock(space, flags, r.size):
        raise CallError("EAGAIN", "more locked memory than RLIMIT_MEMLOCK")
    _refuse_far_offset(r)
    if vma.flags & f.WRITE and isinstance(vma.object, FileObject) and vma.object.write_sealed:
        raise CallError("EPERM", "the file is sealed against writing")
    check_removal(space, r.start, r.end)
    new = vma.piece(r.start, min(r.end, vma.end), space.page_bits)
    new.end, new.offset, new.lineage = r.end, r.page, None
    new.flags = flags
    assert vma.object is not None
    vma.object.attach(space)  # it must not end while its only mapping is replaced
    space.unmap(r.start, r.end)
    space.vmas.add(new)
    vma.object.detach(space)
    populate(space, r.start, r.end, ignore_errors=True)


def _flags_of_new(space: Space, vma: Vma) -> int:
    """As mmap gives them: protection, kind, locks; advice is forgotten."""
    kept = f.ACCESS | f.SHARED | f.MAY_SHARE | f.LOCKED
    allowed = vma.flags & (f.MAY_READ | f.MAY_WRITE | f.MAY_EXEC)
    return vma.flags & kept | allowed | space.future_flags


def _refuse_far_offset(r: _Request) -> None:
    limit = (1 << 63) - 1
    if r.page > (limit - r.size) >> r.space.page_bits:
        raise CallError("EOVERFLOW", "the offset is beyond what a file can have")


def _shared_run(r: _Request) -> bool:
    """Whether mappings alike in file and flags cover the range without a hole."""
    at, first = r.start, None
    for vma in r.space.vmas.overlapping(r.start, r.end):
        first = first or vma
        alike = vma.object is first.object and vma.file is first.file and vma.flags == first.flags
        if vma.start > at or not vma.flags & f.SHARED or not alike:
            return False
        at = vma.end
    return first is not None and at >= r.end
