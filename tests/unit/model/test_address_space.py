import pytest

from quire.model import (
    GEOMETRIES,
    AddressSpace,
    CallError,
    Machine,
    ModelError,
    OpenFile,
    Signalled,
)
from quire.model import flags as f
from quire.model.checks import Check, refuse_first
from quire.model.invariants import check
from quire.model.views import maps

PAGE = 4096
RW = 3
PRIVATE_ANON = f.MAP["PRIVATE"] | f.MAP["ANON"]
FIXED = PRIVATE_ANON | f.MAP["FIXED"]


def refused(errno, call, *arguments):
    with pytest.raises(CallError) as error:
        call(*arguments)
    assert error.value.errno == errno
    return error.value.why


def test_first_wrong_thing_decides(world):
    """Several things are wrong at once: the kernel's order says which errno comes."""
    space = world().space
    refused("EINVAL", space.mmap, 1, 0, RW, f.MAP["FIXED"], None, 5)  # offset before descriptor
    refused("EBADF", space.mmap, 1, 0, RW, f.MAP["FIXED"], None, 0)  # descriptor before length
    refused("EINVAL", space.mmap, 1, 0, RW, FIXED, None, 0)  # length before address
    refused("ENOMEM", space.mmap, 1, 1 << 62, RW, FIXED, None, 0)
    refused("EINVAL", space.mprotect, 1, 0, RW)  # alignment before length 0
    space.mprotect(0, 0, 0x800)  # length 0 before unknown bits
    refused("EINVAL", space.madvise, 1, 0, 1234)
    refused("EINVAL", space.mremap, 1, PAGE, PAGE, 0, 0)


def test_the_first_check_that_refuses_decides():
    checks = (
        Check("EINVAL", "odd", lambda number: number % 2 == 1),
        Check("EPERM", "large", lambda number: number > 10),
    )
    refuse_first(checks, 4)
    for number, why in ((11, "EINVAL: odd"), (12, "EPERM: large")):
        with pytest.raises(CallError) as caught:
            refuse_first(checks, number)
        assert str(caught.value) == why


def test_brk(world):
    space = world().space
    start = space.brk(0)
    assert space.brk(start + 3 * PAGE + 5) == start + 3 * PAGE + 5
    space.store(start + 3 * PAGE, b"heap")
    assert space.brk(start + PAGE) == start + PAGE
    refused("EFAULT", space.read_into, OpenFile("zero", "zero"), start + 3 * PAGE, 1, 0)
    assert space.brk(start - 1) == start + PAGE  # below its start: nothing changes
    space.mmap(start + 2 * PAGE, PAGE, RW, FIXED)
    assert space.brk(start + 4 * PAGE) == start + PAGE  # a mapping is in the way
    space.limits["DATA"] = PAGE
    assert space.brk(start + 2 * PAGE) == start + PAGE
    child = space.fork()
    assert child.brk(0) == start + PAGE


def test_locked_heap_is_populated(world):
    space = world().space
    space.mlockall(f.MCL["FUTURE"])
    start = space.brk(0)
    space.brk(start + 2 * PAGE)
    assert space.mincore(start, 2 * PAGE) == [True, True]


def test_overcommit(world):
    size = 64 << 20
    never = world(overcommit=2, memory_bytes=size * 2, swap=0)
    at = never.anonymous(size // 2 // PAGE)
    refused("ENOMEM", never.anonymous, size // PAGE)
    child = never.space.fork()
    refused("ENOMEM", never.space.fork)
    child.exit()
    never.space.munmap(at, size // 2)
    never.anonymous(size // PAGE)
    always = world(overcommit=1, memory_bytes=size)
    always.anonymous(1 << 30)


def test_refused_fork_leaves_nothing(world):
    w = world(memory_bytes=1 << 20)
    flags = f.MAP["PRIVATE"]
    for _ in range(3):
        w.anonymous(100, flags=flags)
    refused("ENOMEM", w.space.fork)
    assert w.machine.spaces == [w.space]


def test_wide_range_costs_nothing(world):
    w = world(overcommit=1)
    at = w.space.mmap(0, 1 << 44, RW, f.MAP["PRIVATE"] | f.MAP["ANON"])
    w.space.store(at + (1 << 43), b"x")
    w.space.mprotect(at, 1 << 44, 1)
    w.space.madvise(at, 1 << 44, f.MADV["DONTNEED"])
    assert w.space.load(at + (1 << 43), 1) == b"\0"
    w.space.munmap(at, 1 << 44)
    assert w.space.table.table_frames() == {w.space.table.root}


def test_five_levels_are_used_by_wish_alone(world):
    w = world(geometry=GEOMETRIES["x86-64-5level"])
    assert w.anonymous(1) < 1 << 47
    private = f.MAP["PRIVATE"] | f.MAP["ANON"]
    high = w.space.mmap(1 << 50, PAGE, RW, private)
    assert high == 1 << 50
    assert w.space.mmap(1 << 50, PAGE, RW, private) > 1 << 55  # the wish is taken: the top of all
    w.space.store(high, b"x")
    assert w.anonymous(1) < 1 << 47


def test_no_room(world):
    space = world(overcommit=1).space
    noreserve = f.MAP["PRIVATE"] | f.MAP["ANON"]
    for size in (1 << 46, 1 << 45, 1 << 44):
        space.mmap(0, size, 0, noreserve)
    refused("ENOMEM", space.mmap, 0, 1 << 45, 0, noreserve, None, 0)


def test_exec(world):
    space = world().space
    at = space.mmap(0, PAGE, RW, f.MAP["PRIVATE"] | f.MAP["ANON"])
    space.store(at, b"\xc3")
    with pytest.raises(Exception, match="SEGV_ACCERR"):
        space.fetch(at)
    space.mprotect(at, PAGE, f.PROT_READ | f.PROT_EXEC)
    assert space.fetch(at) == 0xC3


def test_moved_pages_keep_their_frames(world):
    w = world()
    at = w.anonymous(2)
    w.space.store(at, b"moved")
    frame = w.space.overlay[at // PAGE].frame
    to = w.space.mremap(at, 2 * PAGE, 4 * PAGE, 3, 0x10_0000)
    assert w.space.load(to, 5) == b"moved"
    assert w.space.overlay[to // PAGE].frame == frame
    assert len(maps(w.space)) == 1


def test_address_spaces_of_one_machine_have_their_own_numbers():
    machine = Machine()
    spaces = [AddressSpace(machine) for _ in range(3)]
    assert len({space.asid for space in spaces}) == 3


def test_an_ended_address_space_says_so():
    machine = Machine()
    space, other = AddressSpace(machine), AddressSpace(machine)
    at = space.mmap(0, PAGE, RW, PRIVATE_ANON)
    space.store(at, b"x")
    space.exit()
    for call in (
        space.exit,
        space.fork,
        lambda: space.mmap(0, PAGE, RW, PRIVATE_ANON),
        lambda: space.munmap(at, PAGE),
        lambda: space.madvise(at, PAGE, 4),
        lambda: space.load(at, 1),
        lambda: space.store(at, b"x"),
        lambda: maps(space),
    ):
        with pytest.raises(ModelError, match="address space 1 has ended"):
            call()
    assert machine.spaces == [other]
    check(machine)


@pytest.mark.parametrize("call", ["pipe_write_from", "read_into", "write_from"])
def test_a_call_that_kills_its_process_does_not_go_on(call):
    machine = Machine(frames=2)
    space = AddressSpace(machine)
    at = space.mmap(0, 4 * PAGE, RW, PRIVATE_ANON)
    file = OpenFile("f", "regular", machine.file("f", b"abc", on_disk=False))
    space.store(at, b"a")
    swapless = space.mmap(0, PAGE, RW, f.MAP["SHARED"] | f.MAP["ANON"])
    arguments = (
        (OpenFile("pipe", "pipe"), swapless, 3)
        if call == "pipe_write_from"
        else (file, swapless, 3, 0)
    )
    with pytest.raises(Signalled, match="SIGKILL OOM"):
        getattr(space, call)(*arguments)
    assert not space.alive
    check(machine)


def test_fork_asks_for_each_mapping_that_is_inherited(world):
    space = world(memory_bytes=1 << 30).space
    large = 600 << 20
    first = space.mmap(0, large, RW, PRIVATE_ANON)
    space.mmap(0, large, f.PROT_WRITE, PRIVATE_ANON)
    space.fork().exit()
    space.mmap(first + large, large, RW, FIXED)  # one mapping with the first
    refused("ENOMEM", space.fork)
    assert space.machine.spaces == [space]
    space.madvise(first, 2 * large, f.MADV["DONTFORK"])
    space.fork().exit()


def test_shared_memory_is_promised_until_nobody_maps_it(world):
    space = world(memory_bytes=64 * PAGE, overcommit=2).space
    shared = f.MAP["SHARED"] | f.MAP["ANON"]
    at = space.mmap(0, 24 * PAGE, RW, shared | f.MAP["NORESERVE"])  # means nothing in this mode
    refused("ENOMEM", space.mmap, 0, 9 * PAGE, RW, PRIVATE_ANON)
    child = space.fork()
    assert space.machine.promised_pages() == 24
    space.munmap(at, 24 * PAGE)
    child.munmap(at, 23 * PAGE)
    refused("ENOMEM", space.mmap, 0, 9 * PAGE, RW, shared)
    child.exit()
    assert space.machine.promised_pages() == 0
    space.mmap(0, 32 * PAGE, RW, shared)


def test_mappings_above_4_gib():
    for geometry in GEOMETRIES.values():
        machine = Machine(geometry)
        space = AddressSpace(machine)
        page = geometry.page_size
        limit = page << 20
        above = PRIVATE_ANON | f.MAP["ABOVE4G"]
        space.mmap(limit, geometry.user_top - limit, 0, FIXED | f.MAP["NORESERVE"])
        refused("ENOMEM", space.mmap, 0, page, RW, above)
        assert space.mmap(limit // 2, page, RW, above) == limit // 2  # a free hint holds
        assert space.mmap(0, page, RW, PRIVATE_ANON) == limit - page


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"frames": 0}, "frames=0 is too small: at least 1"),
        ({"swap": -1}, "swap=-1 is too small: at least 0"),
        ({"tlb": -4}, "tlb=-4"),
        ({"tlb_ways": 0}, "tlb_ways=0 is too small: at least 1"),
        ({"tlb": 6, "tlb_ways": 4}, "6 entries cannot be divided into sets of 4"),
        ({"cpus": 0}, "cpus=0 is too small: at least 1"),
        ({"huge_pages": -1}, "huge_pages=-1"),
        ({"disk_blocks": -1}, "disk_blocks=-1"),
        ({"memory_bytes": -1}, "memory_bytes=-1"),
        ({"max_map_count": -1}, "max_map_count=-1"),
        ({"overcommit": 3}, "overcommit=3: 0, 1 or 2"),
    ],
)
def test_machines_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        Machine(**options)


def test_time_does_not_go_back():
    with pytest.raises(ValueError, match="seconds=-9 is too small: at least 0"):
        Machine().advance(-9)


def test_read_ahead_ends_quietly_at_a_broken_block(world):
    w = world()
    file = w.file("f", b"x" * 4 * PAGE)
    at = w.mapped(file, 4)
    file.object.sync(0, 4)
    w.space.madvise(at, 4 * PAGE, f.MADV["PAGEOUT"])
    w.machine.disk.broken.add(("f", 2))
    w.space.madvise(at, 4 * PAGE, f.MADV["WILLNEED"])
    assert sorted(file.object.pages) == [0, 1]
    with pytest.raises(Signalled, match="SIGBUS"):
        w.space.load(at + 2 * PAGE, 1)


def test_collapse_of_shared_memory_without_frames(world):
    w = world(frames=8)
    block = w.space.geometry.block_size
    at = w.space.mmap(2 * block, block, RW, f.MAP["SHARED"] | f.MAP["ANON"])
    w.space.store(at, b"x")
    refused("ENOMEM", w.space.madvise, at, block, f.MADV["COLLAPSE"])
    assert w.space.load(at, 1) == b"x"


def test_an_errno_is_said_once(world):
    w = world(disk_blocks=1)
    with pytest.raises(CallError) as caught:
        w.file("f", b"x" * PAGE).pwrite(b"y", 2 * PAGE)
    assert str(caught.value) == "ENOSPC: all 1 blocks of the disk are in use"
