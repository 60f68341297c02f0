"""Bounded frames: eviction, swap, locked pages, out of memory."""

import pytest

from quire.model import Signalled
from quire.model import flags as f
from quire.model.invariants import check
from quire.model.policy import Clock, Fifo, Lru

PAGE = 4096
PRIVATE, SHARED = f.MAP["PRIVATE"], f.MAP["SHARED"]


@pytest.mark.parametrize("policy", [None, Fifo, Lru, Clock])
def test_more_memory_than_frames(world, policy):
    w = world(frames=4, swap=None, policy=policy and policy())
    at = w.anonymous(16)
    for number in range(16):
        w.space.store(at + number * PAGE, bytes([number]) * PAGE)
    assert len(w.machine.pageout.policy) <= 4
    for number in range(16):
        assert w.space.load(at + number * PAGE, PAGE) == bytes([number]) * PAGE
    assert w.machine.swap.reads > 0
    assert w.machine.pageout.evictions >= 12


def test_pages_only_read_are_written_to_swap_once(world):
    w = world(frames=1, swap=None)
    at = w.anonymous(2)
    w.space.store(at, b"a")
    w.space.store(at + PAGE, b"b")
    for _ in range(4):
        assert (w.space.load(at, 1), w.space.load(at + PAGE, 1)) == (b"a", b"b")
    assert (w.machine.swap.writes, w.machine.swap.reads) == (2, 8)


def test_dirty_bit_tells_that_a_slot_is_old(world):
    """A page alone in its space comes back writable: only its entry tells of the next store."""
    w = world(frames=1, swap=None)
    at = w.anonymous(2)
    w.space.store(at, b"old")
    w.space.store(at + PAGE, b"other")
    assert w.space.load(at, 3) == b"old"
    assert w.faults(lambda: w.space.store(at, b"new")) == []
    w.space.load(at + PAGE, 1)
    assert w.machine.swap.writes == 3
    assert w.space.load(at, 3) == b"new"


def test_freed_lazily_after_swap_and_stored_again(world):
    w = world(frames=2, swap=None)
    at = w.anonymous(4)
    w.space.store(at, b"old")
    w.space.store(at + PAGE, bytes(PAGE * 3))
    w.space.load(at, 1)
    w.space.madvise(at, PAGE, f.MADV["FREE"])
    w.space.load(at, 1)
    w.space.store(at, b"new")
    for _ in range(2):
        w.space.load(at + PAGE, PAGE * 3)
        assert w.space.load(at, 3) == b"new"


def test_freed_lazily_while_its_slot_is_old(world):
    """With memory to spare nothing is forgotten: what is saved is the page, not the old slot."""
    w = world(frames=1, swap=None)
    w.machine.pageout.acts_ample = True
    at = w.anonymous(2)
    w.space.store(at, b"old")
    w.space.store(at + PAGE, b"x")
    w.space.store(at, b"new")
    w.space.madvise(at, PAGE, f.MADV["FREE"])
    w.space.load(at + PAGE, 1)
    assert w.space.load(at, 3) == b"new"


def test_full_swap_still_takes_pages_that_have_a_slot(world):
    w = world(frames=2, swap=2)
    at = w.anonymous(4)
    w.space.store(at, b"a" * 4 * PAGE)
    assert w.machine.swap.full
    w.space.munmap(at, PAGE)
    w.space.munmap(at + 3 * PAGE, PAGE)
    for number in (1, 2, 1, 2):
        assert w.space.load(at + number * PAGE, 1) == b"a"


@pytest.mark.parametrize("mapped", [False, True])
def test_a_scan_does_not_push_out_what_is_used_often(world, mapped):
    w = world(frames=8, swap=0)
    hot, cold = w.file("hot", b"h" * 3 * PAGE), w.file("cold", b"c" * 40 * PAGE)
    hot.fsync()
    cold.fsync()
    places = {file.name: w.mapped(file, pages, prot=1) for file, pages in ((hot, 3), (cold, 40))}

    def use(file, page):
        if mapped:
            w.space.load(places[file.name] + page * PAGE, 1)
        else:
            file.pread(1, page * PAGE)

    for page in range(12):
        use(cold, page)
        for often in range(3):
            use(hot, often)
    for page in range(12, 40):
        use(cold, page)
    assert all(hot.object.resident(page) for page in range(3))


def test_clean_file_pages_are_dropped_and_dirty_ones_written(world):
    w = world(frames=2, swap=0)
    file = w.file("f", b"a" * 4 * PAGE)
    file.fsync()
    writes = w.machine.disk.writes
    at = w.mapped(file, 4)
    for number in range(4):
        w.space.load(at + number * PAGE, 1)
    assert w.machine.disk.writes == writes
    w.space.store(at, b"b")
    for number in range(1, 4):
        w.space.load(at + number * PAGE, 1)
    assert w.machine.disk.writes == writes + 1
    assert w.space.load(at, 2) == b"ba"


def test_stores_past_the_end_survive_eviction(world):
    w = world(frames=1, swap=0)
    file = w.file("f", b"a" * 100 + bytes(PAGE))
    file.ftruncate(100)
    at = w.mapped(file, 1)
    w.space.store(at + 200, b"tail")
    w.file("g", b"b" * 3 * PAGE)
    assert w.space.load(at + 200, 4) == b"tail"
    w.space.msync(at, PAGE, f.MS["SYNC"])
    assert w.space.load(at + 200, 4) == bytes(4)


def test_shared_memory_goes_to_swap(world):
    w = world(frames=2, swap=None)
    at = w.anonymous(6, flags=SHARED)
    child = w.space.fork()
    for number in range(6):
        child.store(at + number * PAGE, bytes([number + 1]))
    assert [w.space.load(at + n * PAGE, 1)[0] for n in range(6)] == [1, 2, 3, 4, 5, 6]
    assert w.machine.swap.writes > 0


def test_page_shared_by_fork_is_swapped_once(world):
    w = world(frames=3, swap=None)
    at = w.anonymous(1)
    w.space.store(at, b"both")
    child = w.space.fork()
    other = w.anonymous(3)
    for number in range(3):
        w.space.store(other + number * PAGE, b"x")
    assert w.machine.swap.writes == 1
    assert (w.space.load(at, 4), child.load(at, 4)) == (b"both", b"both")
    assert w.machine.swap.reads == 1


def test_locked_pages_stay(world):
    w = world(frames=4, swap=None)
    at = w.anonymous(3)
    w.space.store(at, b"locked")
    w.space.mlock(at, 3 * PAGE)
    other = w.anonymous(10)
    for number in range(10):
        w.space.store(other + number * PAGE, b"x")
    assert w.space.mincore(at, 3 * PAGE) == [True] * 3
    assert w.faults(lambda: w.space.load(at, 6)) == []
    assert len(w.machine.pageout.unevictable) == 3
    w.space.munlock(at, 3 * PAGE)
    assert w.machine.pageout.unevictable == set()
    for number in range(10):
        w.space.store(other + number * PAGE, b"y")
    assert w.space.mincore(at, 3 * PAGE) == [False] * 3


def test_locked_file_pages_are_freed_with_their_mapping(world):
    w = world(frames=2, swap=0)
    file = w.file("f", b"a" * 4 * PAGE)
    at = w.mapped(file, 2)
    w.space.mlock(at, 2 * PAGE)
    other = w.file("g", b"b" * 4 * PAGE)
    other.pread(4 * PAGE, 0)
    assert w.machine.pageout.unevictable  # found locked while frames were sought
    w.space.munmap(at, 2 * PAGE)
    assert w.machine.pageout.unevictable == set()


def test_out_of_memory_kills_the_largest(world):
    w = world(frames=6, swap=0)
    at = w.anonymous(8)
    small = w.anonymous(1)
    child = w.space.fork()
    child.store(small, b"small")
    for number in range(4):
        w.space.store(at + number * PAGE, b"x")
    events = w.traced(lambda: [child.store(at + n * PAGE, b"y") for n in range(4)])
    assert [e.facts["asid"] for e in events if e.kind == "oom kill"] == [w.space.asid]
    assert not w.space.alive
    assert child.load(small, 5) == b"small"


def test_out_of_memory_may_hit_the_one_who_asks(world):
    w = world(frames=2, swap=1)
    at = w.anonymous(8)
    with pytest.raises(Signalled) as signal:
        w.space.store(at, b"x" * 8 * PAGE)
    assert (signal.value.signal, signal.value.done) == ("SIGKILL", 3 * PAGE)
    assert not w.space.alive


def test_populate_without_memory_is_enomem(world):
    from quire.model import CallError

    w = world(frames=2, swap=0)
    at = w.anonymous(8)
    with pytest.raises(CallError, match="ENOMEM"):
        w.space.madvise(at, 8 * PAGE, f.MADV["POPULATE_WRITE"])


def test_lazily_freed_pages_go_first_and_without_io(world):
    w = world(frames=4, swap=None)
    at = w.anonymous(2)
    w.space.store(at, b"old")
    w.space.store(at + PAGE, b"new")
    w.space.madvise(at, 2 * PAGE, f.MADV["FREE"])
    w.space.store(at + PAGE, b"kept")
    other = w.anonymous(8)
    for number in range(8):
        w.space.store(other + number * PAGE, b"x")
    assert w.space.load(at, 3) == bytes(3)
    assert w.space.load(at + PAGE, 4) == b"kept"


def test_cold_pages_go_first_and_pageout_at_once(world):
    w = world(frames=3, swap=None)
    at = w.anonymous(3)
    for number in range(3):
        w.space.store(at + number * PAGE, b"x")
    w.space.madvise(at + 2 * PAGE, PAGE, f.MADV["COLD"])
    w.space.madvise(at, PAGE, f.MADV["PAGEOUT"])
    assert w.space.mincore(at, 3 * PAGE) == [False, True, True]
    other = w.anonymous(2)
    w.space.store(other, b"y")
    w.space.store(other + PAGE, b"y")
    assert w.space.mincore(at, 3 * PAGE)[0] is False


def test_willneed_reads_ahead_but_evicts_nothing(world):
    w = world(frames=3, swap=0)
    file = w.file("f", b"a" * 8 * PAGE)
    file.fsync()
    for number in range(8):
        file.object.drop(number)
    at = w.mapped(file, 8)
    w.space.madvise(at, 8 * PAGE, f.MADV["WILLNEED"])
    assert w.space.mincore(at, 8 * PAGE) == [True] * 3 + [False] * 5
    assert w.faults(lambda: w.space.load(at, 1)) == ["page cache"]


def test_eviction_that_fails_keeps_the_page(world):
    w = world(frames=2, swap=0)
    file = w.file("f", b"a" * PAGE)
    at = w.mapped(file, 1)
    w.space.store(at, b"dirty")
    w.machine.disk.broken.add(("f", 0))
    other = w.file("g", b"b" * 4 * PAGE)
    assert other.pread(4 * PAGE, 0) == b"b" * 4 * PAGE
    assert w.space.load(at, 5) == b"dirty"


def test_a_page_that_was_locked_where_it_is_given_up_can_be_evicted_again(world):
    w = world(frames=2, swap=None, policy=Fifo())
    at = w.anonymous(8)
    w.space.store(at, b"x")
    w.space.mlock(at, PAGE)
    child = w.space.fork()
    w.space.store(at + PAGE, b"y" * 5 * PAGE)
    page = child.overlay[at // PAGE]
    assert page in w.machine.pageout.unevictable
    w.space.munmap(at, PAGE)
    assert page not in w.machine.pageout.unevictable
    check(w.machine)
    w.space.store(at + PAGE, b"z" * 5 * PAGE)
    assert page.frame is None
