"""A VMA (virtual memory area; a *map entry* in BSD): one run of addresses mapped in one way.

The first of the three layers: *what was asked*. Pages and translations follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quire.model import flags as f

if TYPE_CHECKING:
    from quire.model.files import OpenFile
    from quire.model.memory_object import MemoryObject

__all__ = ["Lineage", "Vma", "holds_data"]


class Lineage:
    """The family of private pages that a VMA may hold: Linux's `anon_vma`.

    A VMA gets one with its first private page. VMAs of different families do not merge, for then
    one list could no longer find all who share a page. `inherited`: it came by fork, with a
    parent's pages.
    """

    __slots__ = ("inherited",)

    def __init__(self, inherited: bool = False) -> None:
        self.inherited = inherited


@dataclass(slots=True, eq=False)
class Vma:
    """Addresses `[start, end)`, their flags, and what they show.

    `object` is None where private pages are born as zeros. `offset` counts pages: in the object,
    or, for anonymous memory, from address 0, so that neighbours continue each other. `file` is the
    open file description that was mapped; it gives the name, and it keeps apart what two `open`
    calls mapped.
    """

    start: int
    end: int
    flags: int
    offset: int
    object: MemoryObject | None = None
    file: OpenFile | None = None
    lineage: Lineage | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start

    @property
    def private(self) -> bool:
        """Whether stores make private copies.

        (So does /dev/zero, shared by a read-only descriptor.)
        """
        return self.object is None or not self.flags & f.MAY_SHARE

    @property
    def anonymous(self) -> bool:
        """Private memory that begins as zeros (a private mapping of /dev/zero is that, too)."""
        return self.object is None

    @property
    def accessible(self) -> bool:
        """Whether any access is allowed: not PROT_NONE."""
        return bool(self.flags & f.ACCESS)

    @property
    def holds_data(self) -> bool:
        """Whether RLIMIT_DATA counts it."""
        return holds_data(self.flags)

    @property
    def writes_object(self) -> bool:
        """May ever store into its object: such a mapping forbids F_SEAL_WRITE."""
        return self.flags & (f.SHARED | f.MAY_WRITE) == f.SHARED | f.MAY_WRITE

    def index(self, address: int, page_bits: int) -> int:
        """The page of the object (or of the line of anonymous pages) that stands at `address`."""
        return self.offset + ((address - self.start) >> page_bits)

    def piece(self, start: int, end: int, page_bits: int) -> Vma:
        """A VMA like this one, of a part of its addresses."""
        return replace(self, start=start, end=end, offset=self.index(start, page_bits))

    def continued_by(self, right: Vma, page_bits: int) -> bool:
        """The merge rule: whether `right`, which follows, may become one VMA with this one.

        Same kind and same file, offsets that continue, and at most one family of private pages; a
        family that came by fork does not take in others (`is_mergeable_vma`,
        `is_mergeable_anon_vma` in mm/vma.c).
        """
        return (
            self.end == right.start
            and self.flags == right.flags
            and self.file is right.file
            and self.object is right.object
            and self.index(right.start, page_bits) == right.offset
            and not self.flags & (f.DEVICE | f.HUGETLB)
            and _one_family(self.lineage, right.lineage)
        )

    def may_share_family(self, right: Vma, page_bits: int) -> bool:
        """Whether a first private page may join the neighbour's family (`anon_vma_compatible`)."""
        return (
            self.end == right.start
            and (self.flags ^ right.flags) & ~f.ACCESS == 0
            and self.file is right.file
            and self.index(right.start, page_bits) == right.offset
        )


def holds_data(flags: int) -> bool:
    """Whether a VMA with such flags is counted by RLIMIT_DATA: private, writable, no stack."""
    return flags & (f.WRITE | f.SHARED | f.GROWSDOWN) == f.WRITE


def _one_family(left: Lineage | None, right: Lineage | None) -> bool:
    if left is right:
        return True
    if left is not None and right is not None:
        return False
    only = left or right
    return only is not None and not only.inherited
