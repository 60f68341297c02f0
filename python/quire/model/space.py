"""The state of an address space, and the primitives that its system calls are made of.

Three layers, each of which follows from the one above:

1. `vmas`: what was asked.
2. `overlay` and memory objects: what the answer was. The overlay holds the private pages of this
   space by page number, over whatever the VMA's object shows (UVM's amap; Cranor, "Design and
   implementation of the UVM virtual memory system", 1998). Fork shares its pages until one side
   stores. No shadow chains.
3. `table` and the TLBs: what the hardware has. Any translation may be forgotten; a fault brings it
   back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.model import fault
from quire.model import flags as f
from quire.model.errors import DiskError, ModelError, OutOfMemory, Signalled
from quire.model.huge_fault import free_private
from quire.model.mmu import Access, NonCanonicalAddress, PageFault
from quire.model.page import Marker, Page
from quire.model.page_table import PageTable
from quire.model.physical_memory import ZERO_FRAME
from quire.model.vma_set import VmaSet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quire.model.geometry import Geometry
    from quire.model.machine import Machine
    from quire.model.memory_object import MemoryObject
    from quire.model.page_table import Leaf
    from quire.model.vma import Vma

__all__ = ["Space"]


class Space:
    """See the module.

    Addresses and lengths are bytes; `number` is an address divided by the page size.
    """

    def __init__(self, machine: Machine, asid: int) -> None:
        self.machine = machine
        self.asid = asid
        self.geometry: Geometry = machine.geometry
        self.page_bits = machine.geometry.page_bits
        block_pages = self.geometry.block_size >> self.page_bits
        self._vmas = VmaSet(self, self.page_bits, block_pages, machine.max_map_count)
        self.overlay: dict[int, Page | Marker] = {}
        self._table = PageTable(machine.geometry, machine.memory)
        self.limits: dict[str, int | None] = {
            "AS": None,
            "DATA": None,
            "MEMLOCK": 8 << 20,
            "STACK": 8 << 20,
        }
        self.may_lock_beyond_limit = True
        """CAP_IPC_LOCK."""
        self.may_map_low = True
        """CAP_SYS_RAWIO: below vm.mmap_min_addr."""
        self.future_flags = 0
        """Lock flags of mappings to come (mlockall MCL_FUTURE)."""
        self.brk_start = self.brk_end = machine.brk_start
        self.locked_drift = 0
        """Bytes that MREMAP_DONTUNMAP unlocked without uncounting them, as Linux does."""
        self.minor_faults = self.major_faults = 0
        """Faults resolved without I/O, and with it (getrusage(2))."""
        self._volatile: list[int] = []
        self.alive = True

    @property
    def vmas(self) -> VmaSet:
        """What is mapped. Raises `ModelError` when the address space has ended."""
        if not self.alive:
            raise ModelError(f"address space {self.asid} has ended")
        return self._vmas

    @property
    def table(self) -> PageTable:
        """Its page table. Raises as `vmas`."""
        if not self.alive:
            raise ModelError(f"address space {self.asid} has ended")
        return self._table

    # Accesses, as the instructions of a program make them.

    def load(self, address: int, count: int) -> bytes:
        """Reads bytes. Raises `Signalled`, whose `done` says how many could be read before it."""
        parts: list[bytes] = []
        for start, length in self._by_page(address, count):
            try:
                physical = self.translate(start, Access.READ)
            except Signalled as signal:
                signal.done = start - address
                raise
            parts.append(self.machine.memory.read(physical, length))
            self._settle()
        return b"".join(parts)

    def store(self, address: int, content: bytes) -> None:
        """Writes bytes in ascending order. Raises `Signalled`, as `load`."""
        for start, length in self._by_page(address, len(content)):
            try:
                physical = self.translate(start, Access.WRITE)
            except Signalled as signal:
                signal.done = start - address
                raise
            done = start - address
            self.machine.memory.write(physical, content[done : done + length])
            try:
                self._settle()
            except DiskError:
                refused = Signalled("SIGBUS", "BUS_OBJERR", start)
                refused.done = done
                raise refused from None

    def fetch(self, address: int) -> int:
        """Fetches an instruction byte."""
        byte = self.machine.memory.read(self.translate(address, Access.EXECUTE), 1)[0]
        self._settle()
        return byte

    def translate(self, address: int, access: Access) -> int:
        """The physical address, after the faults that it takes.

        Raises:
            Signalled: the access is not allowed, or the page cannot be had.
        """
        while True:
            try:
                return self.machine.mmu.translate(self.table, self.asid, address, access)
            except NonCanonicalAddress:
                raise Signalled("SIGSEGV", "SI_KERNEL", 0) from None
            except PageFault as missing:
                self.machine.trace.add(
                    "page fault",
                    address=address,
                    access=access.value,
                    error_code=missing.error_code,
                )
            try:
                fault.resolve(self, address, access)
            except OutOfMemory:
                self.machine.kill_largest()
                if not self.alive:
                    raise Signalled("SIGKILL", "OOM", address) from None

    # What pages and objects ask (`Mapper`).

    def invalidate(self, target: MemoryObject, first: int, last: int, even_private: bool) -> None:
        """Takes away translations of an object's pages `[first, last)`, and private copies."""
        for vma in self.vmas:
            if vma.object is not target:
                continue
            low = max(first, vma.offset)
            high = min(last, vma.index(vma.end, self.page_bits))
            if low >= high:
                continue
            base = (vma.start >> self.page_bits) - vma.offset
            self.forget_range(base + low, base + high)
            if even_private:
                self.drop_range(base + low, base + high)

    def forget_translation(self, page_number: int) -> None:
        """Takes away one translation (a block goes as a whole); the page stays."""
        leaf = self.table.leaf(page_number << self.page_bits)
        if leaf is not None:
            self._forget(leaf)

    def protect_translation(self, page_number: int) -> None:
        """Makes one translation read-only, so that the next store is noticed."""
        leaf = self.table.leaf(page_number << self.page_bits)
        if leaf is not None:
            self._restrict(leaf, f.READ | f.EXEC)

    def take_reference(self, page_number: int) -> bool:
        """Whether the page was accessed since last asked."""
        leaf = self.table.leaf(page_number << self.page_bits)
        if leaf is None:
            return False
        accessed = self.table.format.accessed
        self.table.update(leaf, leaf.entry & ~accessed)
        self.machine.shootdown(self.asid, page_number, 1)
        return bool(leaf.entry & accessed)

    def wires(self, page_number: int) -> bool:
        """Whether the page is locked in memory here."""
        vma = self.vmas.find(page_number << self.page_bits)
        return vma is not None and bool(vma.flags & f.LOCKED)

    def may_write(self, target: MemoryObject) -> bool:
        """Whether some mapping of the object here may ever store into it."""
        return any(vma.object is target and vma.writes_object for vma in self.vmas)

    def drop_private(self, page_number: int) -> None:
        """Gives up a private page: zeros, or the object's page, show again."""
        self.forget_translation(page_number)
        held = self.overlay.pop(page_number, None)
        if isinstance(held, Page):
            held.holders.discard((self, page_number))
            if held.holders:
                self.machine.pageout.rescue(held)  # perhaps it was locked here alone
            else:
                self.machine.pageout.free(held)

    def shows(self, target: MemoryObject, index: int) -> bool:
        """Whether a mapping of the object here has its page `index`."""
        return any(
            vma.object is target and vma.offset <= index < vma.index(vma.end, self.page_bits)
            for vma in self.vmas
        )

    # Translations.

    def install(self, page_number: int, page: Page | None, vma: Vma, *, writable: bool) -> None:
        """Makes a page (None: the zero page) visible, in the place of what was."""
        self.forget_translation(page_number)
        frame = ZERO_FRAME if page is None else page.frame
        assert frame is not None
        address = page_number << self.page_bits
        executable = bool(vma.flags & f.EXEC)
        self.table.map(address, frame, writable=writable, executable=executable)
        if page is not None:
            self._shown(page, page_number)
            if page.owner is not None and page.owner.volatile:
                self._volatile.append(page_number)

    def install_block(
        self, page_number: int, pages: list[Page], vma: Vma, *, writable: bool = True
    ) -> None:
        """Makes adjoining frames visible by one entry, at an aligned page number."""
        assert pages[0].frame is not None
        address = page_number << self.page_bits
        executable = bool(vma.flags & f.EXEC)
        self.forget_range(page_number, page_number + len(pages))
        frame = pages[0].frame
        self.table.map(address, frame, writable=writable, executable=executable, level=1)
        for step, page in enumerate(pages):
            self._shown(page, page_number + step)

    def forget_range(self, first: int, last: int) -> None:
        """Takes away the translations of pages `[first, last)`."""
        for leaf in self.table.leaves(first << self.page_bits, last << self.page_bits):
            self._forget(leaf)

    def restrict_range(self, first: int, last: int, flags: int) -> None:
        """Takes rights from translations: what `flags` forbid. New rights come by a fault."""
        for leaf in self.table.leaves(first << self.page_bits, last << self.page_bits):
            whole = leaf.start >> self.page_bits >= first and (
                leaf.start + leaf.size <= last << self.page_bits
            )
            if whole and flags & f.ACCESS:
                self._restrict(leaf, flags)
            else:
                self._forget(leaf)

    # Private pages.

    def hold(self, page_number: int, page: Page) -> None:
        """Puts a private page into the overlay, in the place of what was there."""
        self.drop_private(page_number)
        self.overlay[page_number] = page
        page.holders.add((self, page_number))

    def held(self, first: int, last: int) -> list[int]:
        """Page numbers in `[first, last)` at which the overlay holds something."""
        if last - first < len(self.overlay):
            return [number for number in range(first, last) if number in self.overlay]
        return sorted(number for number in self.overlay if first <= number < last)

    def drop_range(self, first: int, last: int, *, guards: bool = False) -> None:
        """Drops the overlay of a range; guard markers stay unless told."""
        for number in self.held(first, last):
            if guards or self.overlay[number] is not Marker.GUARD:
                self.drop_private(number)

    def unmap(self, start: int, end: int) -> None:
        """Removes mappings, pages and translations of whole pages; the caller has checked."""
        removed = self.vmas.overlapping(start, end)
        for vma in removed:
            low, high = max(vma.start, start), min(vma.end, end)
            self.forget_range(low >> self.page_bits, high >> self.page_bits)
            if vma.flags & f.HUGETLB and vma.private:
                free_private(self, vma, low, high)
            self.vmas.cut(vma, low, high)
        self.drop_range(start >> self.page_bits, end >> self.page_bits, guards=True)
        for vma in removed:
            if vma.object is not None:
                vma.object.unmapped()

    def mapped_pages(self) -> int:
        """Pages of all mappings (VmSize, RLIMIT_AS)."""
        return sum(vma.size for vma in self.vmas) >> self.page_bits

    def data_pages(self) -> int:
        """Pages of private writable mappings (VmData, RLIMIT_DATA)."""
        return sum(vma.size for vma in self.vmas if vma.holds_data) >> self.page_bits

    def locked_bytes(self) -> int:
        """Bytes of locked mappings (VmLck)."""
        locked = sum(vma.size for vma in self.vmas if vma.flags & f.LOCKED)
        return locked + self.locked_drift

    def _shown(self, page: Page, page_number: int) -> None:
        assert page.frame is not None
        page.mappings.add((self, page_number))
        self.machine.memory.map_counts[page.frame] += 1

    def _forget(self, leaf: Leaf) -> None:
        first, count = leaf.start >> self.page_bits, leaf.size >> self.page_bits
        frame = self.table.frame(leaf, leaf.start)
        self.table.unmap(leaf)
        self.machine.shootdown(self.asid, first, count)
        memory = self.machine.memory
        for step in range(count):
            page = memory.pages[frame + step]
            if page is None:
                continue  # the zero page
            page.mappings.discard((self, first + step))
            memory.map_counts[frame + step] -= 1
            page.dirty |= bool(leaf.entry & self.table.format.dirty)
            self.machine.pageout.rescue(page)

    def _restrict(self, leaf: Leaf, flags: int) -> None:
        form = self.table.format
        writable = form.may_write(leaf.entry) and bool(flags & f.WRITE)
        executable = form.may_execute(leaf.entry) and bool(flags & f.EXEC)
        self.table.update(leaf, form.with_protection(leaf.entry, writable, executable))
        self.machine.shootdown(self.asid, leaf.start >> self.page_bits, leaf.size >> self.page_bits)

    def _settle(self) -> None:
        """Ends the access to pages of volatile objects."""
        while self._volatile:
            number = self._volatile.pop()
            vma = self.vmas.find(number << self.page_bits)
            if vma is not None and vma.object is not None:
                page = vma.object.pages.get(vma.index(number << self.page_bits, self.page_bits))
                self.forget_translation(number)
                if page is not None:
                    vma.object.finish(page)

    def _by_page(self, address: int, count: int) -> Iterator[tuple[int, int]]:
        end = address + count
        while address < end:
            length = min(end - address, self.geometry.page_size - address % self.geometry.page_size)
            yield address, length
            address += length
