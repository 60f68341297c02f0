from quire.model import flags as f
from quire.model.views import maps, pagemap, smaps

PAGE = 4096
PRIVATE, SHARED = f.MAP["PRIVATE"], f.MAP["SHARED"]


def test_maps_read_like_proc(world):
    w = world()
    file = w.file("data", b"a" * 3 * PAGE)
    at = w.space.mmap(0x1000_0000, 2 * PAGE, 1, SHARED | f.MAP["FIXED"], file, PAGE)
    w.space.mmap(0x2000_0000, PAGE, 7, PRIVATE | f.MAP["ANON"] | f.MAP["FIXED"])
    assert [str(line) for line in maps(w.space)] == [
        "10000000-10002000 r--s 00001000 data",
        "20000000-20001000 rwxp 00000000",
    ]
    assert maps(w.space)[0].start == at


def test_smaps_share_out_what_is_shared(world):
    w = world()
    at = w.anonymous(3)
    w.space.store(at, b"x")
    w.space.store(at + PAGE, b"y")
    w.space.load(at + 2 * PAGE, 1)  # the zero page belongs to nobody
    (alone,) = smaps(w.space)
    assert (alone.rss, alone.pss, alone.private, alone.anonymous) == (2 * PAGE,) * 4
    child = w.space.fork()
    child.load(at, PAGE)
    child.store(at + PAGE, b"z")
    (parent,) = smaps(w.space)
    assert (parent.rss, parent.shared, parent.private) == (2 * PAGE, PAGE, PAGE)
    assert parent.pss == 1.5 * PAGE


def test_smaps_count_swap_and_locks(world):
    w = world(frames=2, swap=None)
    at = w.anonymous(4)
    w.space.store(at, b"x" * 4 * PAGE)
    (entry,) = smaps(w.space)
    assert (entry.rss, entry.swap, entry.locked) == (2 * PAGE, 2 * PAGE, 0)
    w.space.mlock(at, 4 * PAGE)
    (entry,) = smaps(w.space)
    assert (entry.rss, entry.swap, entry.locked) == (4 * PAGE, 0, 4 * PAGE)


def test_smaps_share_out_what_is_locked(world):
    w = world()
    at = w.anonymous(4, flags=SHARED)
    w.space.store(at, b"x" * 4 * PAGE)
    w.space.fork().load(at, 2 * PAGE)
    w.space.mlock(at, 4 * PAGE)
    (entry,) = smaps(w.space)
    assert (entry.rss, entry.pss, entry.locked) == (4 * PAGE, 3 * PAGE, 3 * PAGE)


def test_smaps_of_shared_memory_in_swap(world):
    w = world(frames=2, swap=None)
    at = w.anonymous(4, flags=SHARED)
    w.space.store(at, b"x" * 4 * PAGE)
    (entry,) = smaps(w.space)
    assert (entry.size, entry.rss, entry.swap, entry.swap_pss) == (4 * PAGE, *[2 * PAGE] * 2, 0)


def test_smaps_share_out_swap_and_tell_clean_from_dirty(world):
    w = world(frames=2, swap=None)
    file = w.file("f", b"a" * PAGE)
    file.fsync()
    at = w.anonymous(2)
    w.space.store(at, b"x")
    child = w.space.fork()
    w.space.store(at + PAGE, b"y")
    shown = w.mapped(file, 1)
    w.space.load(shown, 1)
    private, mapped = smaps(w.space)[:: 1 if at < shown else -1]
    assert (private.swap, private.swap_pss) == (PAGE, PAGE / 2)
    assert (private.private_dirty, private.private_clean) == (PAGE, 0)
    assert (mapped.private_dirty, mapped.private_clean) == (0, PAGE)
    child.exit()


def test_pagemap(world):
    w = world(frames=1, swap=None)
    at = w.anonymous(3)
    w.space.store(at, b"x")
    w.space.store(at + PAGE, b"y")
    w.space.madvise(at + 2 * PAGE, PAGE, f.MADV["GUARD_INSTALL"])
    swapped, present, guard = (pagemap(w.space, at + n * PAGE) for n in range(3))
    assert (swapped["present"], swapped["swap_slot"]) == (False, 0)
    assert present["swap_slot"] is None
    assert (present["present"], present["map_count"], present["file"]) == (True, 1, False)
    assert guard["guard"]
