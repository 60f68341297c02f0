import pytest

from quire.model import CallError, OpenFile
from quire.model import flags as f

PAGE = 4096


def test_read_and_write_share_pages_with_mappings(world):
    w = world()
    file = w.file("f", b"a" * 100)
    at = w.mapped(file, 1)
    assert file.pwrite(b"bbb", 98) == 3
    assert w.space.load(at + 97, 5) == b"abbb\0"
    w.space.store(at, b"cc")
    assert file.pread(4, 0) == b"ccaa"
    assert file.pread(10, 99) == b"bb"
    assert file.pread(10, 101) == b""


def test_append(world):
    w = world()
    file = w.file("f", b"abc")
    file.appends = True
    assert file.pwrite(b"d", 0) == 1
    assert file.pread(9, 0) == b"abcd"


def test_holes_cost_no_blocks(world):
    w = world()
    file = w.file("f", b"")
    file.ftruncate(100 * PAGE)
    assert file.pread(8, 50 * PAGE) == bytes(8)
    assert (w.machine.disk.used, w.machine.disk.reads) == (0, 0)
    file.pwrite(b"x", 50 * PAGE)
    assert w.machine.disk.used == 1
    file.punch(50 * PAGE, PAGE)
    assert w.machine.disk.used == 0
    assert file.pread(1, 50 * PAGE) == b"\0"
    assert file.size == 100 * PAGE


def test_full_disk(world):
    w = world(disk_blocks=2)
    file = w.file("f", b"")
    assert file.pwrite(b"x" * 5 * PAGE, 0) == 2 * PAGE
    with pytest.raises(CallError, match="ENOSPC"):
        file.pwrite(b"y", 3 * PAGE)
    file.ftruncate(PAGE)
    assert file.pwrite(b"y", 3 * PAGE) == 1


def test_failed_sync_keeps_pages_dirty(world):
    w = world()
    file = w.file("f", b"a" * 2 * PAGE)
    at = w.mapped(file, 2)
    w.machine.disk.broken.add(("f", 1))
    with pytest.raises(CallError, match="EIO"):
        w.space.msync(at, 2 * PAGE, f.MS["SYNC"])
    assert [file.object.pages[n].dirty for n in (0, 1)] == [False, True]
    w.machine.disk.broken.clear()
    w.space.msync(at, 2 * PAGE, f.MS["SYNC"])
    assert file.object.backing.blocks[1] == b"a" * PAGE


def test_sync_of_a_clean_file_writes_nothing(world):
    w = world(disk_blocks=1)
    file = w.file("f", b"a" * 100)
    at = w.mapped(file, 1)
    file.fsync()
    writes = w.machine.disk.writes
    file.fsync()
    w.space.msync(at, PAGE, f.MS["SYNC"])
    assert w.machine.disk.writes == writes
    hole = w.file("hole", b"")
    hole.ftruncate(PAGE + 100)
    assert hole.pread(1, PAGE) == b"\0"  # the page is in the cache, and has no block
    hole.fsync()
    assert w.machine.disk.used == 1


def test_cutting_a_hole_takes_no_block(world):
    w = world(disk_blocks=1)
    w.file("full", b"a")
    file = w.file("hole", b"")
    file.ftruncate(3 * PAGE)
    assert file.pread(3 * PAGE, 0) == bytes(3 * PAGE)
    file.punch(10, PAGE)
    file.ftruncate(PAGE + 100)
    file.ftruncate(2 * PAGE)
    assert (w.machine.disk.used, file.size) == (1, 2 * PAGE)


def test_cutting_a_file_clears_what_is_on_the_disk_alone(world):
    w = world(frames=1, swap=0)
    file = w.file("f", b"a" * 2 * PAGE)
    w.file("g", b"b" * PAGE)
    file.ftruncate(100)
    file.ftruncate(PAGE)
    assert file.pread(PAGE, 0) == b"a" * 100 + bytes(PAGE - 100)


def test_broken_blocks_give_calls_their_errno(world):
    w = world()
    file = w.file("f", b"a" * 3 * PAGE)
    file.fsync()
    w.machine.disk.broken.add(("f", 1))
    for number in range(3):
        file.object.drop(number)
    assert file.pread(3 * PAGE, 5) == b"a" * (PAGE - 5)  # short, up to the bad block
    at = w.mapped(file, 3)
    for call in (
        lambda: file.pread(1, PAGE),
        lambda: file.pwrite(b"x", PAGE),
        lambda: file.punch(PAGE + 10, 10),
        lambda: w.space.read_into(file, at, 10, PAGE),
        lambda: file.ftruncate(PAGE + 10),
    ):
        with pytest.raises(CallError, match="EIO"):
            call()


def test_sync_writes_what_it_can(world):
    w = world()
    files = [w.file(name, b"a" * 2 * PAGE) for name in "fg"]
    w.machine.disk.broken.add(("f", 0))
    with pytest.raises(CallError, match="EIO"):
        files[0].fsync()
    assert [files[0].object.pages[n].dirty for n in (0, 1)] == [True, False]
    events = w.traced(w.machine.write_back)
    assert [e.facts["errno"] for e in events if e.kind == "disk error"] == ["EIO"]
    assert not any(page.dirty for page in files[1].object.pages.values())


def test_reading_without_a_frame_is_enomem(world):
    w = world(frames=2, swap=0)
    file = w.file("f", b"a" * 2 * PAGE)
    at = w.anonymous(2)
    w.space.store(at, b"x")
    assert file.pread(2 * PAGE, 0) == b"a" * 2 * PAGE
    w.space.store(at + PAGE, b"y")
    for call in (lambda: file.pread(1, 0), lambda: file.pwrite(b"b", 0)):
        with pytest.raises(CallError, match="ENOMEM"):
            call()
    assert w.space.alive


def test_periodic_writeback(world):
    w = world()
    files = [w.file(name, b"a" * PAGE) for name in "fg"]
    assert w.machine.disk.writes == 0
    w.machine.write_back()
    assert w.machine.disk.writes == 2
    assert not any(file.object.pages[0].dirty for file in files)
    w.machine.write_back()
    assert w.machine.disk.writes == 2


def test_asynchronous_msync_does_no_io(world):
    w = world()
    at = w.mapped(w.file("f", b"a" * PAGE), 1)
    w.space.msync(at, PAGE, f.MS["ASYNC"])
    w.space.msync(at, PAGE, 0)
    assert w.machine.disk.writes == 0


def test_descriptor_rights(world):
    w = world()
    file = w.file("f", b"abc")
    file.readable = file.writable = False
    for call in (
        lambda: file.pread(1, 0),
        lambda: file.pwrite(b"x", 0),
        lambda: file.punch(0, 1),
    ):
        with pytest.raises(CallError, match="EBADF"):
            call()
    with pytest.raises(CallError, match="EINVAL"):
        file.ftruncate(1)


def test_seals(world):
    w = world()
    file = w.file("f", b"abc", on_disk=False)
    with pytest.raises(CallError, match="EINVAL"):
        w.file("g", b"").add_seals({"SEAL"})
    with pytest.raises(CallError, match="EPERM"):
        OpenFile("f", "regular", file.object, writable=False).add_seals({"SEAL"})
    at = w.mapped(file, 1)
    with pytest.raises(CallError, match="EBUSY"):
        file.add_seals({"WRITE"})
    w.space.munmap(at, PAGE)
    file.add_seals({"WRITE", "GROW", "SHRINK", "SEAL"})
    for call in (
        lambda: file.pwrite(b"x", 0),
        lambda: file.ftruncate(1),
        lambda: file.ftruncate(9),
        lambda: file.punch(0, 1),
        lambda: file.add_seals({"GROW"}),
        lambda: w.mapped(file, 1),
    ):
        with pytest.raises(CallError, match="EPERM"):
            call()


def test_shared_memory_ends_with_its_last_mapping(world):
    w = world()
    at = w.anonymous(2, flags=f.MAP["SHARED"])
    w.space.store(at, b"x")
    child = w.space.fork()
    w.space.munmap(at, 2 * PAGE)
    assert child.load(at, 1) == b"x"
    used = w.machine.memory.used()
    child.munmap(at, PAGE)
    assert child.load(at + PAGE, 1) == b"\0"
    child.munmap(at + PAGE, PAGE)
    assert w.machine.memory.used() < used


def test_write_out_of_a_mapping_of_the_same_file(world):
    """The copy runs forward: what it wrote is read again, and a file that grows is read on."""
    w = world()
    file = w.file("f", bytes(range(128)) * 32)
    at = w.mapped(file, 3)
    assert w.space.write_from(file, at, 2 * PAGE, 1024) == 2 * PAGE
    assert file.pread(2 * PAGE + 1024, 0) == (bytes(range(128)) * 80)[: 2 * PAGE + 1024]
    w.space.munmap(at + PAGE, 2 * PAGE)
    assert w.space.write_from(file, at + PAGE - 10, 100, 0) == 10
    with pytest.raises(CallError, match="EFAULT"):
        w.space.write_from(file, at + PAGE, 100, 20 * PAGE)
    assert file.size == 20 * PAGE
