"""Demand paging, copy on write, sharing: which kind of fault resolves which access."""

import pytest

from quire.model import Signalled
from quire.model import flags as f

PAGE = 4096
RW = 3
PRIVATE, SHARED = f.MAP["PRIVATE"], f.MAP["SHARED"]


def test_demand_zero(world):
    w = world()
    at = w.anonymous(4)
    assert w.machine.pageout.policy.__len__() == 0
    assert w.faults(lambda: w.space.load(at, 1)) == ["zero page"]
    assert w.faults(lambda: w.space.store(at, b"x")) == ["zero fill"]
    assert w.faults(lambda: w.space.store(at, b"y")) == []
    assert w.space.mincore(at, 2 * PAGE) == [True, False]


def test_copy_on_write_after_fork(world):
    w = world()
    at = w.anonymous(1)
    w.space.store(at, b"parent")
    child = w.space.fork()
    assert w.faults(lambda: child.load(at, 6)) == []  # fork has copied the translation
    assert w.faults(lambda: child.store(at, b"child")) == ["copy on write"]
    assert w.space.load(at, 6) == b"parent"
    assert child.load(at, 6) == b"childt"
    assert w.faults(lambda: w.space.store(at, b"P")) == ["private page"]  # the last holder keeps it


def test_fork_copies_translations_of_private_mappings(world):
    w = world()
    anonymous, shared = w.anonymous(3), w.anonymous(1, flags=SHARED)
    private = w.mapped(w.file("f", b"a" * 2 * PAGE), 2, flags=PRIVATE)
    for at in (anonymous, shared, private):
        w.space.store(at, b"x")
    w.space.load(anonymous + PAGE, 1)  # the zero page
    w.space.load(private + PAGE, 1)  # a page of the file
    child = w.space.fork()
    places = (anonymous, anonymous + PAGE, private, private + PAGE)
    for at in places:
        entry, form = child.table.leaf(at).entry, child.table.format
        assert not form.may_write(entry)
        assert not entry & form.accessed
        assert w.faults(lambda at=at: child.load(at, 1)) == []
    assert child.table.leaf(anonymous + 2 * PAGE) is None
    assert child.table.leaf(shared) is None  # what an object has, a fault finds


def test_private_file_page_is_copied_at_the_first_store(world):
    w = world()
    file = w.file("f", b"a" * PAGE)
    at = w.mapped(file, 1, flags=PRIVATE)
    assert w.faults(lambda: w.space.load(at, 1)) == ["page cache"]
    file.pwrite(b"bb", 0)
    assert w.space.load(at, 3) == b"bba"
    assert w.faults(lambda: w.space.store(at, b"c")) == ["copy on write"]
    assert file.pread(3, 0) == b"bba"


def test_shared_file_is_read_from_the_disk_when_touched(world):
    w = world(frames=2, swap=0)
    file = w.file("f", b"".join(bytes([65 + i]) * PAGE for i in range(4)))
    at = w.mapped(file, 4)
    assert w.faults(lambda: w.space.load(at, 1)) == ["page in"]
    events = w.traced(lambda: w.space.load(at + PAGE, 1))
    assert "disk read" in [event.kind for event in events]


def test_store_makes_a_clean_page_dirty_once(world):
    w = world()
    file = w.file("f", b"a" * PAGE)
    file.fsync()
    at = w.mapped(file, 1)
    page = file.object.pages[0]
    w.space.load(at, 1)
    assert not page.dirty
    assert w.faults(lambda: w.space.store(at, b"b")) == ["page cache"]
    assert page.dirty
    assert w.faults(lambda: w.space.store(at, b"c")) == []
    w.space.msync(at, PAGE, f.MS["SYNC"])
    assert not page.dirty
    assert w.faults(lambda: w.space.store(at, b"d")) == ["page cache"]


def test_full_disk_is_sigbus_and_loses_nothing(world):
    w = world(disk_blocks=1)
    file = w.file("f", b"")
    file.ftruncate(3 * PAGE)
    at = w.mapped(file, 3)
    w.space.store(at, b"kept")
    with pytest.raises(Signalled) as signal:
        w.space.store(at + PAGE, b"lost")
    assert (signal.value.signal, signal.value.code) == ("SIGBUS", "BUS_ADRERR")
    assert w.space.load(at, 4) == b"kept"
    assert w.space.load(at + PAGE, 4) == bytes(4)  # a hole can still be read


def test_fault_that_fails_is_not_noted(world):
    w = world(disk_blocks=0)
    file = w.file("f", b"")
    file.ftruncate(PAGE)
    at = w.mapped(file, 1)

    def store():
        with pytest.raises(Signalled):
            w.space.store(at, b"x")

    assert w.faults(store) == []
    assert (w.space.minor_faults, w.space.major_faults) == (0, 0)


def test_minor_and_major_faults(world):
    w = world(frames=1, swap=None)
    at = w.anonymous(2)
    w.space.store(at, b"x")
    w.space.store(at + PAGE, b"y")
    assert (w.space.minor_faults, w.space.major_faults) == (2, 0)
    w.space.load(at, 1)
    assert (w.space.minor_faults, w.space.major_faults) == (2, 1)


def test_broken_disk_is_sigbus(world):
    w = world(frames=1, swap=0)
    file = w.file("f", b"a" * 3 * PAGE)
    at = w.mapped(file, 3)
    w.machine.disk.broken.add(("f", 0))
    with pytest.raises(Signalled, match="SIGBUS"):
        w.space.load(at, 1)
    assert w.space.load(at + PAGE, 1) == b"a"


def test_failed_memory_is_sigbus(world):
    w = world(frames=4, swap=None)
    file = w.file("f", b"a" * PAGE)
    shared, private = w.mapped(file, 1), w.anonymous(2)
    w.space.store(shared, b"x")
    w.space.store(private, b"y")
    child = w.space.fork()
    w.machine.poison(file.object.pages[0].frame)
    w.machine.poison(w.space.overlay[private // PAGE].frame)
    for space in (w.space, child):
        for address in (shared, private):
            with pytest.raises(Signalled, match="BUS_MCEERR_AR"):
                space.load(address, 1)
            with pytest.raises(Signalled, match="BUS_MCEERR_AR"):
                space.store(address, b"z")
    w.space.store(private + PAGE, b"fine")
    w.space.madvise(private, PAGE, f.MADV["DONTNEED"])
    assert w.space.load(private, 1) == b"\0"
    child.exit()
    assert len(w.machine.memory.failed) == 2
    assert not w.machine.memory.failed & w.machine.memory.free_frames()
    with pytest.raises(ValueError, match="holds no page"):
        w.machine.poison(0)


def test_partial_access_tells_how_far_it_came(world):
    w = world()
    at = w.anonymous(2)
    w.space.munmap(at + PAGE, PAGE)
    with pytest.raises(Signalled) as signal:
        w.space.store(at + PAGE - 3, b"12345")
    assert (signal.value.done, signal.value.address) == (3, at + PAGE)
    assert w.space.load(at + PAGE - 3, 3) == b"123"


def test_huge_page(world):
    w = world()
    size = 2 << 20
    at = w.anonymous(1024)
    assert at % size == 0
    w.space.madvise(at, 2 * size, f.MADV["HUGEPAGE"])
    assert w.faults(lambda: w.space.store(at + 5 * PAGE, b"x")) == ["huge page"]
    leaf = w.space.table.leaf(at)
    assert (leaf.level, leaf.size) == (1, size)
    assert w.faults(lambda: w.space.store(at + 100 * PAGE, b"y")) == []
    assert w.space.mincore(at, size) == [True] * 512


def test_huge_page_splits_when_part_of_it_goes(world):
    w = world()
    at = w.anonymous(512)
    w.space.madvise(at, 2 << 20, f.MADV["HUGEPAGE"])
    w.space.store(at, b"a" * (2 << 20))
    w.space.madvise(at + 3 * PAGE, PAGE, f.MADV["DONTNEED"])
    assert w.space.load(at + 3 * PAGE - 1, 3) == b"a\0\0"
    assert w.space.table.leaf(at) is None  # the block went as a whole; its pages come back small
    assert w.faults(lambda: w.space.load(at, 1)) == ["private page"]
    assert w.space.table.leaf(at).level == 0
    child = w.space.fork()
    child.store(at, b"b")
    assert w.space.load(at, 2) == b"aa"
    w.space.mprotect(at + PAGE, PAGE, 1)
    with pytest.raises(Signalled, match="SEGV_ACCERR"):
        w.space.store(at + PAGE, b"x")


def test_fork_with_a_huge_page(world):
    w = world()
    at = w.anonymous(512)
    w.space.madvise(at, 2 << 20, f.MADV["HUGEPAGE"])
    w.space.store(at, b"parent")
    child = w.space.fork()
    w.space.store(at, b"P")
    assert child.load(at, 6) == b"parent"
    assert w.space.load(at, 6) == b"Parent"


def test_collapse(world):
    w = world()
    at = w.anonymous(512)
    w.space.store(at + 9 * PAGE, b"nine")
    w.space.madvise(at, 2 << 20, f.MADV["COLLAPSE"])
    assert w.space.table.leaf(at).level == 1
    assert w.space.load(at + 9 * PAGE, 4) == b"nine"
    assert w.space.load(at, 4) == bytes(4)


def test_stores_through_one_cpu_are_not_hidden_by_the_other_ones_tlb(world):
    w = world(cpus=2)
    at = w.anonymous(1)
    w.space.store(at, b"x")
    w.machine.cpu = 1
    w.space.load(at, 1)
    events = w.traced(lambda: w.space.mprotect(at, PAGE, 1))
    assert [e.facts["cpu"] for e in events if e.kind == "shootdown"] == [0]
    w.machine.cpu = 0
    with pytest.raises(Signalled):
        w.space.store(at, b"y")
