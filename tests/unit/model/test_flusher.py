"""Dirty pages are written when they are old, or too many; time passes when it is told to."""

import pytest

from quire.model.invariants import check

PAGE = 4096


def dirty(file):
    return sorted(index for index, page in file.object.pages.items() if page.dirty)


def clean_file(one, name, pages):
    file = one.file(name, bytes(pages * PAGE))
    file.fsync()
    return file


def test_a_file_that_has_been_dirty_for_thirty_seconds_is_written_at_the_next_waking(world):
    one = world()
    file = clean_file(one, "f", 2)
    one.machine.advance(2)
    one.space.store(one.mapped(file, 2), b"new")
    one.machine.advance(30)
    assert dirty(file) == [0]
    one.machine.advance(3)
    assert dirty(file) == []
    assert file.object.backing.blocks[0][:3] == b"new"
    check(one.machine)


def test_the_age_counts_from_the_first_store_since_the_file_was_clean(world):
    one = world()
    file = clean_file(one, "f", 2)
    file.pwrite(b"a", 0)
    one.machine.advance(25)
    file.pwrite(b"b", PAGE)
    one.machine.advance(5)
    assert dirty(file) == []
    file.pwrite(b"c", 0)
    file.fsync()
    one.machine.advance(4)
    file.pwrite(b"d", 0)
    one.machine.advance(29)
    assert dirty(file) == [0]
    one.machine.advance(2)
    assert dirty(file) == []


def test_a_store_through_a_mapping_is_noticed_again_after_the_flush(world):
    one = world()
    file = clean_file(one, "f", 1)
    at = one.mapped(file, 1)
    one.space.store(at, b"a")
    one.machine.advance(30)
    assert one.faults(lambda: one.space.store(at, b"b")) == ["page cache"]
    one.machine.advance(30)
    assert file.object.backing.blocks[0][:1] == b"b"


def test_more_than_a_tenth_dirty_is_written_when_the_flusher_wakes_oldest_first(world):
    one = world(memory_bytes=40 * PAGE)
    old, new = clean_file(one, "z", 3), clean_file(one, "a", 3)
    old.pwrite(bytes(3 * PAGE), 0)
    new.pwrite(bytes(1), 0)
    one.machine.advance(5)
    assert (dirty(old), dirty(new)) == ([0, 1, 2], [0])
    new.pwrite(bytes(1), PAGE)
    one.machine.advance(5)
    assert (dirty(old), dirty(new)) == ([], [0, 1])


def test_who_stores_when_more_than_a_fifth_is_dirty_waits(world):
    one = world(memory_bytes=20 * PAGE)
    file = clean_file(one, "f", 8)
    at = one.mapped(file, 8)
    for page in range(5):
        one.space.store(at + page * PAGE, b"x")
    assert dirty(file) == [0, 1, 2, 3, 4]
    events = one.traced(lambda: one.space.store(at + 5 * PAGE, b"y"))
    assert [e.facts["file"] for e in events if e.kind == "throttle"] == ["f"]
    assert dirty(file) == [5]
    assert one.space.load(at + 5 * PAGE, 1) == b"y"
    check(one.machine)


def test_memory_without_a_disk_is_not_counted_and_not_written(world):
    one = world(memory_bytes=10 * PAGE)
    shm = one.file("shm", bytes(8 * PAGE), on_disk=False)
    shm.pwrite(bytes(8 * PAGE), 0)
    events = one.traced(lambda: one.machine.advance(100))
    assert events == []


def test_what_cannot_be_written_is_tried_again_when_it_is_old_again(world):
    one = world()
    file = clean_file(one, "f", 1)
    file.pwrite(b"x", 0)
    one.machine.disk.broken.add(("f", 0))
    errors = [e.kind for e in one.traced(lambda: one.machine.advance(59)) if e.kind != "flush"]
    assert errors == ["disk error"]
    one.machine.disk.broken.clear()
    one.machine.advance(1)
    assert dirty(file) == []


@pytest.mark.parametrize("seconds", [0, 4, 10**12])
def test_time_that_nothing_waits_for_passes_at_once(world, seconds):
    one = world()
    one.machine.advance(seconds)
    assert one.machine.pageout.flusher.now_s == seconds
