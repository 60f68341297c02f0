"""The pool of huge pages: promises, copies, what is lost; the rows in `huge_cases` say the rest."""

import pytest

from quire.model import GEOMETRIES, AddressSpace, CallError, Machine, Signalled
from quire.model import flags as f
from quire.model.invariants import check
from quire.model.session import Session
from quire.model.views import pagemap, smaps

HUGE = 2 << 20
PRIVATE = f.MAP["PRIVATE"] | f.MAP["ANON"] | f.MAP["HUGETLB"]
SHARED = f.MAP["SHARED"] | f.MAP["ANON"] | f.MAP["HUGETLB"]


def machine_of(pages, **more):
    machine = Machine(huge_pages=pages, **more)
    return machine, AddressSpace(machine)


def numbers(machine):
    pool = machine.huge_pool
    return pool.used, pool.promised, pool.available


def test_mmap_promises_and_a_touch_takes():
    machine, space = machine_of(3)
    at = space.mmap(0, HUGE + 1, 3, PRIVATE)
    assert at % HUGE == 0
    assert numbers(machine) == (0, 2, 1)
    space.store(at + HUGE - 2, b"over")
    assert numbers(machine) == (2, 0, 1)
    assert space.load(at + HUGE - 2, 4) == b"over"
    with pytest.raises(CallError, match="ENOMEM"):
        space.mmap(0, 2 * HUGE, 3, SHARED)
    space.munmap(at, 2 * HUGE)
    assert numbers(machine) == (0, 0, 3)
    check(machine)


@pytest.mark.parametrize("geometry", ["x86-64", "x86-64-5level", "aarch64-4k", "aarch64-16k"])
def test_a_huge_page_is_one_entry_of_the_page_table_in_every_geometry(geometry):
    machine = Machine(GEOMETRIES[geometry], huge_pages=1)
    space = AddressSpace(machine)
    block = machine.geometry.block_size
    at = space.mmap(0, block, 3, PRIVATE)
    space.store(at + block // 2, b"x")
    (leaf,) = space.table.leaves(at, at + block)
    assert (leaf.level, leaf.size) == (1, block)
    check(machine)


def test_the_page_daemon_leaves_the_pool_alone():
    machine, space = machine_of(1, frames=2, swap=None)
    huge, small = space.mmap(0, HUGE, 3, PRIVATE), space.mmap(0, 1 << 16, 3, PRIVATE - 0x4_0000)
    space.store(huge, b"kept")
    for page in range(16):
        space.store(small + page * 4096, b"x")
        check(machine)
    assert pagemap(space, huge)["present"]
    assert space.load(huge, 4) == b"kept"


def test_the_owner_takes_from_its_children_what_the_pool_has_not():
    machine, space = machine_of(1)
    at = space.mmap(0, HUGE, 3, PRIVATE)
    space.store(at, b"old")
    child = space.fork()
    assert child.load(at, 3) == b"old"
    with pytest.raises(Signalled, match="SIGBUS BUS_ADRERR"):
        child.store(at, b"new")
    machine.trace.on = True
    space.store(at, b"own")
    assert "take" in [event.kind for event in machine.trace.take()]
    with pytest.raises(Signalled, match="SIGBUS BUS_ADRERR"):
        child.load(at, 1)
    check(machine)
    child.exit()
    assert space.load(at, 3) == b"own"
    check(machine)


def test_a_page_that_two_have_is_copied_whole():
    machine, space = machine_of(2)
    at = space.mmap(0, HUGE, 3, PRIVATE)
    space.store(at + 5, b"old")
    child = space.fork()
    child.store(at + HUGE - 3, b"end")
    assert space.load(at + HUGE - 3, 3) == bytes(3)
    assert child.load(at + 5, 3) == b"old"
    assert numbers(machine) == (2, 0, 0)
    check(machine)


def test_what_the_owner_gives_up_is_promised_again_when_the_child_has_it_no_more():
    machine, space = machine_of(2)
    at = space.mmap(0, HUGE, 3, PRIVATE)
    space.store(at, b"old")
    child = space.fork()
    space.madvise(at, HUGE, f.MADV["DONTNEED"])
    assert numbers(machine) == (1, 0, 1)
    child.exit()
    assert numbers(machine) == (0, 1, 1)
    check(machine)
    assert space.load(at, 3) == bytes(3)


def test_a_failed_frame_takes_its_huge_page_out_of_the_pool():
    machine, space = machine_of(2)
    at = space.mmap(0, HUGE, 3, PRIVATE)
    space.store(at, b"x")
    frame = pagemap(space, at + 4096)["frame"]
    machine.poison(frame)
    with pytest.raises(Signalled, match="BUS_MCEERR_AR"):
        space.load(at + 4096, 1)
    check(machine)
    space.munmap(at, HUGE)
    assert machine.huge_pool.size == 1
    check(machine)
    space.store(space.mmap(0, HUGE, 3, PRIVATE), b"x")
    with pytest.raises(CallError, match="ENOMEM"):
        space.mmap(0, HUGE, 3, PRIVATE)


def test_smaps_counts_huge_pages():
    machine, space = machine_of(1)
    space.store(space.mmap(0, HUGE, 3, SHARED), b"x")
    (entry,) = smaps(space)
    assert (entry.rss, entry.line.name) == (HUGE, "/anon_hugepage")
    assert machine.huge_pool.used == 1


def test_a_session_has_a_pool_and_says_what_came_of_it():
    session = Session()
    session.do("machine huge=2")
    session.do("mmap 2M rw HUGETLB as=big")
    step = session.do("store big+4K text")
    faults = [event.facts for event in step.events if event.kind == "fault"]
    assert [fact["by"] for fact in faults] == ["huge page"]
    assert "huge pages: 2, of them 1 in use, 0 promised" in session.do("statistics").result
    assert session.do("mmap 4M rw HUGETLB").error.startswith("ENOMEM")
