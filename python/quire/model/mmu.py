"""The memory management unit: turns a virtual address into a physical one, or raises a page fault.

In the order of the hardware: is the address canonical; does the TLB know the page; walk the page
table; are the rights enough; set the accessed and dirty bits; remember. (Intel SDM 3A, 4.6 and 4.7;
on Arm the walker of FEAT_HAFDBS.)
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from quire.model.tlb import Tlb, TlbEntry

if TYPE_CHECKING:
    from quire.model.page_table import Leaf, PageTable
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
    """No translation, or not the right. `error_code` has the bits that x86 pushes (SDM 3A, 4.7)."""

    PRESENT, WRITE, USER, FETCH = 1 << 0, 1 << 1, 1 << 2, 1 << 4

    def __init__(self, address: int, access: Access, present: bool) -> None:
        self.address = address
        self.access = access
        self.error_code = (
            self.USER
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

    def translate(self, table: PageTable, asid: int, address: int, access: Access) -> int:
        """The physical address of `address`.

        Raises:
            PageFault: there is no translation, or it does not allow the access.
            NonCanonicalAddress: the upper bits are not copies of the highest translated one.
        """
        geometry = table.geometry
        page = address >> geometry.page_bits
        offset = address & geometry.page_size - 1
        known = self.tlb.lookup(asid, page)
        if known is not None and (
            access is Access.READ
            or (known.writable if access is Access.WRITE else known.executable)
        ):
            if self.trace.on:
                self.trace.add("tlb hit", address=address, page=page, frame=known.frame)
            return known.frame << geometry.page_bits | offset
        if not geometry.canonical(address):
            raise NonCanonicalAddress(hex(address))
        if address >= geometry.half:
            raise PageFault(address, access, present=False)  # the kernel's own half
        if self.trace.on:
            self.trace.add("tlb miss", address=address, page=page)
            self._note_walk(table, address)
        leaf = table.leaf(address)
        if leaf is None:
            raise PageFault(address, access, present=False)
        entry = self._grant(table, leaf, address, access)
        frame = table.frame(leaf, address)
        form = table.format
        writable = form.may_write(entry) and bool(entry & form.dirty)
        self.tlb.insert(asid, page, TlbEntry(frame, writable, form.may_execute(entry)))
        return frame << geometry.page_bits | offset

    def _grant(self, table: PageTable, leaf: Leaf, address: int, access: Access) -> int:
        """Checks the rights of a leaf and sets its accessed and dirty bits."""
        form, entry = table.format, leaf.entry
        if access is Access.WRITE and not form.may_write(entry):
            raise PageFault(address, access, present=True)
        if access is Access.EXECUTE and not form.may_execute(entry):
            raise PageFault(address, access, present=True)
        marked = entry | form.accessed | (form.dirty if access is Access.WRITE else 0)
        if marked != entry:
            table.update(leaf, marked)
        return marked

    def _note_walk(self, table: PageTable, address: int) -> None:
        for step in table.steps(address):
            self.trace.add(
                "walk",
                level=step.level,
                table=step.table,
                index=step.index,
                entry=step.entry,
                valid=bool(step.entry & table.format.valid),
            )
