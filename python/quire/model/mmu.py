"""The memory management unit: turns a virtual address into a physical one, or raises a page fault.

In the order of the hardware: is the address canonical; does the TLB know the page; walk the page
table; are the rights enough; set the accessed and dirty bits; remember. (Intel SDM 3A, 4.6 and 4.7;
on Arm the walker of FEAT_HAFDBS.)

Simplified: the kernel may do whatever a page's rights allow, whosever page it is (as without SMAP
and SMEP), and a page that is read-only is so for the kernel too (as with CR0.WP).
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from quire.model.tlb import Tlb, TlbEntry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.model.geometry import EntryFormat
    from quire.model.page_table import Leaf, PageTable, Step
    from quire.model.trace import Trace

__all__ = ["Access", "Mmu", "NonCanonicalAddress", "PageFault"]


class Access(Enum):
    """What an instruction wants to do with a byte."""

    READ = "read"
    WRITE = "write"
    EXECUTE = "execute"


class NonCanonicalAddress(Exception):  # noqa: N818 - it is no error of anybody
    """The address has bits that no translation knows: a general protection fault on x86."""


class PageFault(Exception):  # noqa: N818 - it is no error of anybody
    """No translation, or not the right. `error_code` has the bits that x86 pushes (SDM 3A, 4.7).

    Bit 3, a reserved bit that is set in an entry, cannot come about here.
    """

    PRESENT, WRITE, USER, FETCH = 1 << 0, 1 << 1, 1 << 2, 1 << 4

    def __init__(self, address: int, access: Access, present: bool, user: bool = True) -> None:
        self.address = address
        self.access = access
        self.error_code = (
            (self.USER if user else 0)
            | (self.PRESENT if present else 0)
            | (self.WRITE if access is Access.WRITE else 0)
            | (self.FETCH if access is Access.EXECUTE else 0)
        )
        super().__init__(f"page fault at {address:#x}, error code {self.error_code:#x}")


class Mmu:
    """One CPU's unit with its TLB."""

    def __init__(self, tlb: Tlb, trace: Trace) -> None:
        self.tlb = tlb
        self.trace = trace

    def translate(
        self, table: PageTable, asid: int, address: int, access: Access, *, user: bool = True
    ) -> int:
        """The physical address of `address`, for a program, or for the kernel if not `user`.

        Raises:
            PageFault: there is no translation, or it does not allow the access.
            NonCanonicalAddress: the upper bits are not copies of the highest translated one. (So
                with every geometry; Arm would raise an ordinary page fault, SEGV_MAPERR.)
        """
        geometry = table.geometry
        page = address >> geometry.page_bits
        offset = address & geometry.page_size - 1
        known = self.tlb.lookup(asid, page)
        if (
            known is not None
            and (known.user or not user)
            and (
                access is Access.READ
                or (known.writable if access is Access.WRITE else known.executable)
            )
        ):
            self.tlb.hits += 1
            if self.trace.on:
                self.trace.add("tlb hit", address=address, page=page, frame=known.frame)
            return known.frame << geometry.page_bits | offset
        if not geometry.canonical(address):
            raise NonCanonicalAddress(hex(address))
        if address >= geometry.half:
            raise PageFault(address, access, False, user)  # the kernel's own half
        self.tlb.misses += 1
        steps = list(table.steps(address))
        if self.trace.on:
            self.trace.add("tlb miss", address=address, page=page)
            self._note_walk(table, steps)
        leaf = table.leaf_of(steps, address)
        if leaf is None:
            raise PageFault(address, access, False, user)
        form, rights = table.format, table.format.granted([step.entry for step in steps])
        if not _allowed(form, rights, access, user):
            raise PageFault(address, access, True, user)
        dirty = self._mark(table, leaf, access)
        frame = table.frame(leaf, address)
        writable = form.may_write(rights) and dirty
        known = TlbEntry(frame, writable, form.may_execute(rights), form.for_programs(rights))
        gone = self.tlb.insert(asid, page, known)
        if gone is not None:
            self.trace.add("tlb evict", asid=gone[0], page=gone[1])
        if self.trace.on and self.tlb.size:
            self.trace.add("tlb insert", asid=asid, page=page, frame=frame, writable=writable)
        return frame << geometry.page_bits | offset

    def _mark(self, table: PageTable, leaf: Leaf, access: Access) -> bool:
        """Sets the accessed and dirty bits of a leaf; says whether it is dirty."""
        form = table.format
        marked = leaf.entry | form.accessed | (form.dirty if access is Access.WRITE else 0)
        if marked != leaf.entry:
            table.update(leaf, marked)
        return bool(marked & form.dirty)

    def _note_walk(self, table: PageTable, steps: Sequence[Step]) -> None:
        for step in steps:
            self.trace.add(
                "walk",
                level=step.level,
                table=step.table,
                index=step.index,
                entry=step.entry,
                valid=bool(step.entry & table.format.valid),
            )


def _allowed(form: EntryFormat, rights: int, access: Access, user: bool) -> bool:
    if user and not form.for_programs(rights):
        return False
    if access is Access.WRITE:
        return form.may_write(rights)
    return access is Access.READ or form.may_execute(rights)
