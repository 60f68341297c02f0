"""Each invariant fires when its rule is broken."""

import pytest

from quire.model import flags as f
from quire.model.invariants import check
from quire.model.page import Page
from quire.model.tlb import TlbEntry

PAGE = 4096


@pytest.fixture
def space():
    from quire.model import AddressSpace, Machine

    space = AddressSpace(Machine())
    at = space.mmap(0, 4 * PAGE, 3, f.MAP["PRIVATE"] | f.MAP["ANON"])
    space.store(at, b"x")
    space.load(at + PAGE, 1)
    check(space.machine)
    space.at = at
    return space


def broken(space, match):
    with pytest.raises(AssertionError, match=match):
        check(space.machine)


def test_translation_outside_every_mapping(space):
    space.vmas.remove(space.vmas.find(space.at))
    space.overlay.clear()
    broken(space, "outside every mapping")


def test_private_page_outside_every_mapping(space):
    space.overlay[5] = Page()
    broken(space, "private page outside")


def test_page_that_does_not_know_its_holder(space):
    space.overlay[space.at // PAGE].holders.clear()
    broken(space, "holder")


def test_lost_page(space):
    number = space.at // PAGE + 3
    space.overlay[number] = Page(holders={(space, number)})
    broken(space, "lost")


def test_writable_translation_of_a_read_only_mapping(space):
    space.vmas.find(space.at).flags &= ~f.WRITE
    broken(space, "writable translation")


def test_stale_tlb_entry(space):
    space.machine.mmu.tlb.insert(space.asid, space.at // PAGE, TlbEntry(77, False, False))
    broken(space, "stale frame")


def test_tlb_entry_without_a_translation(space):
    space.machine.mmu.tlb.insert(space.asid, 3, TlbEntry(1, False, False))
    broken(space, "without a translation")


def test_tlb_entry_with_a_right_that_was_taken(space):
    number = (space.at + PAGE) // PAGE
    space.machine.mmu.tlb.insert(space.asid, number, TlbEntry(0, True, False))
    broken(space, "stale right to write")


def test_tlb_entry_of_an_ended_space(space):
    space.machine.mmu.tlb.insert(99, 3, TlbEntry(1, False, False))
    broken(space, "has ended")


def test_map_count(space):
    space.machine.memory.map_counts[space.overlay[space.at // PAGE].frame] += 1
    broken(space, "map counts")


def test_reverse_map(space):
    space.overlay[space.at // PAGE].mappings.clear()
    broken(space, "reverse map")


def test_leaked_frame(space):
    page = Page()
    page.frame = space.machine.memory.allocate(page)
    broken(space, "leaked private page")


def test_leaked_table(space):
    space.machine.memory.allocate_table(PAGE)
    broken(space, "page table is leaked")


def test_leaked_slot(space):
    page = Page()
    space.machine.swap.size = 1
    space.machine.swap.store(page, bytes(PAGE))
    broken(space, "slot of a page that is gone")
    space.machine.swap.discard(page)
    check(space.machine)
    space.overlay[space.at // PAGE].slot = 5
    broken(space, "slot is free")


def test_page_that_no_victim_search_will_find(space):
    space.machine.pageout.policy.remove(space.overlay[space.at // PAGE])
    broken(space, "no victim search")


def test_translation_of_a_page_that_is_not_held(space):
    page = space.overlay.pop(space.at // PAGE)
    assert page.frame is not None
    broken(space, "not held here")


def test_page_that_is_stuck_though_nobody_locks_it(space):
    page = space.overlay[space.at // PAGE]
    space.machine.pageout.withdraw(page)
    space.machine.pageout.unevictable.add(page)
    broken(space, "nobody locks")
