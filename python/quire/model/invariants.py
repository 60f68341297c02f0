"""What must be true after every operation, checked from the hardware up.

A model that teaches must be right in the parts that no program sees: a frame that is leaked, a
translation that outlives its mapping, a count that is off by one. `check` looks at everything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.model import flags as f
from quire.model.huge_pool import HugeObject
from quire.model.page import Page
from quire.model.physical_memory import ZERO_FRAME

if TYPE_CHECKING:
    from quire.model.machine import Machine
    from quire.model.space import Space

__all__ = ["check"]


def check(machine: Machine) -> None:
    """Raises AssertionError for the first thing that is not as it must be."""
    for space in machine.spaces:
        _vmas(space)
        _overlay(space)
    _translations(machine)
    _tlbs(machine)
    _frames(machine)
    _queues(machine)
    _huge_pages(machine)


def _vmas(space: Space) -> None:
    page = space.geometry.page_size
    below = None
    for vma in space.vmas:
        assert vma.start < vma.end, "an empty VMA"
        assert vma.start % page == vma.end % page == 0, "a VMA that is not of whole pages"
        if below is not None:
            assert below.end <= vma.start, "VMAs overlap"
        below = vma


def _overlay(space: Space) -> None:
    for number, held in space.overlay.items():
        assert space.vmas.find(number << space.page_bits), "a private page outside every mapping"
        if isinstance(held, Page):
            assert (space, number) in held.holders, "a private page does not know its holder"
            assert held.frame is not None or held.slot is not None, "a private page is lost"


def _translations(machine: Machine) -> None:
    """Every translation lies in a VMA, within its rights, shows the right page, and is counted."""
    counts = [0] * len(machine.memory.frames)
    for space in machine.spaces:
        for leaf in space.table.leaves(0, space.geometry.user_top):
            for address in range(leaf.start, leaf.start + leaf.size, space.geometry.page_size):
                frame = space.table.frame(leaf, address)
                counts[frame] += frame != ZERO_FRAME
                _translation(space, address, frame, space.table.format.may_write(leaf.entry))
    assert counts == machine.memory.map_counts, "map counts are not the number of translations"
    for number, page in enumerate(machine.memory.pages):
        if page is not None:
            assert page.frame == number, "frame and page do not agree"
            assert len(page.mappings) == counts[number], "the reverse map is wrong"


def _translation(space: Space, address: int, frame: int, writable: bool) -> None:
    vma = space.vmas.find(address)
    assert vma is not None, "a translation outside every mapping"
    assert vma.accessible, "a translation of PROT_NONE"
    assert not writable or vma.flags & f.WRITE, "a writable translation of a read-only mapping"
    number = address >> space.page_bits
    page = space.machine.memory.pages[frame]
    if frame == ZERO_FRAME:
        assert vma.anonymous, "the zero page outside anonymous memory"
        assert not writable, "a writable zero page"
        return
    assert page is not None, "a translation shows a free frame"
    held = space.overlay.get(number)
    if isinstance(held, Page):
        assert held is page, "a translation hides the private page"
        assert not writable or len(page.holders) == 1, "a shared private page can be written"
        return
    assert held is None, "a translation of a guard page"
    assert page.owner is not None, "a translation shows a private page that is not held here"
    assert page.owner is vma.object, "a translation shows another object"
    assert page.index == vma.index(address, space.page_bits), "a translation shows another page"
    assert not (writable and vma.private), "a store would reach the object of a private mapping"
    assert not writable or page.dirty, "a clean page of a file can be written unseen"


def _tlbs(machine: Machine) -> None:
    """No CPU remembers what is not, or no longer, in the page table."""
    by_asid = {space.asid: space for space in machine.spaces}
    for cpu in machine.cpus:
        for asid, number, entry in cpu.tlb.entries():
            space = by_asid.get(asid)
            assert space is not None, "a TLB entry of an address space that has ended"
            leaf = space.table.leaf(number << space.page_bits)
            assert leaf is not None, "a TLB entry without a translation"
            form = space.table.format
            assert entry.frame == space.table.frame(leaf, number << space.page_bits), "stale frame"
            assert not entry.writable or form.may_write(leaf.entry), "stale right to write"
            assert not entry.user or form.for_programs(leaf.entry), "stale right of programs"
            assert not entry.executable or form.may_execute(leaf.entry), "stale right to execute"


def _frames(machine: Machine) -> None:
    """Every frame is free, a table, or a page's that is still held; tables are not empty."""
    memory = machine.memory
    tables: set[int] = set()
    live: set[Page] = set()
    for space in machine.spaces:
        frames = space.table.table_frames()
        tables |= frames
        for frame in frames - {space.table.root}:
            assert any(memory.frames[frame]), "an empty page table was not freed"
        live |= {held for held in space.overlay.values() if isinstance(held, Page)}
    assert tables == memory.tables, "a page table is leaked or lost"
    free = (
        memory.free_frames()
        | machine.huge_pool.free_frames()
        | {frame for frame in memory.failed if not memory.pages[frame]}
    )
    for number, page in enumerate(memory.pages):
        if number == ZERO_FRAME or number in free or number in tables:
            assert page is None, "a frame has two uses"
            continue
        assert page is not None, "a frame is leaked"
        if page.owner is not None:
            assert page.owner.pages.get(page.index) is page, "a leaked page of an object"
        else:
            assert page in live, "a leaked private page"
    _slots(machine, live)


def _slots(machine: Machine, live: set[Page]) -> None:
    """Every slot in use belongs to a page that is still held; every page that has one owns it."""
    swap = machine.swap
    assert swap.slots.keys() == swap.owners.keys(), "a slot without its page"
    for slot, page in swap.owners.items():
        assert page.slot == slot, "a slot is leaked"
        kept = page in live if page.owner is None else page.owner.pages.get(page.index) is page
        assert kept, "a slot of a page that is gone"
    for page in live | {page for page in machine.memory.pages if page is not None}:
        assert page.slot is None or swap.owners.get(page.slot) is page, "a page's slot is free"


def _queues(machine: Machine) -> None:
    """Every page in a frame can be chosen as a victim, is locked, huge, or is of failed memory."""
    pageout = machine.pageout
    pages = {page for page in machine.memory.pages if page is not None and page.pool is None}
    resident = {page for page in pages if not page.poisoned}
    assert pageout.unevictable <= resident, "a page without a frame is held to be unevictable"
    assert all(page.wired for page in pageout.unevictable), "a page that nobody locks is stuck"
    queued = len(resident) - len(pageout.unevictable)
    assert len(pageout.policy) == queued, "a page that no victim search will find, or a lost one"


def _huge_pages(machine: Machine) -> None:
    """Every huge page is free or in use as a whole; what is promised is there, and to somebody."""
    pool = machine.huge_pool
    used = sum(page is not None and page.pool is pool for page in machine.memory.pages)
    assert used == pool.used * pool.block_pages, "a huge page is in use in part"
    promises = {
        vma.object: len(vma.object.promises)
        for space in machine.spaces
        for vma in space.vmas
        if isinstance(vma.object, HugeObject)
    }
    assert sum(promises.values()) == pool.promised + pool.outstanding, (
        "a promise is lost, or kept for nobody"
    )
    assert pool.available >= 0, "more huge pages are promised than there are"
