"""Arenas: placing, overlaps, races with other threads, the end; nothing is ever clobbered."""

from __future__ import annotations

import errno
import gc
import mmap
import random
import resource
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
from quire import arena as arena_module
from quire.testing import children
from quire.testing.census import is_mapped
from quire.testing.content import new_seed
from quire.testing.touches import touch

PAGE = mmap.PAGESIZE


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "pages.bin"
    found.write_bytes(b"".join(bytes([number]) * PAGE for number in range(1, 17)))
    return found


def test_one_array_across_what_is_placed(path: Path) -> None:
    with quire.Arena(8 * PAGE) as arena:
        array = arena.array
        assert (array.shape, array.dtype, array.flags.writeable) == ((8 * PAGE,), np.uint8, True)
        file = arena.map(PAGE, path, 2 * PAGE, sharing="shared", offset=3 * PAGE)
        memory = arena.map(3 * PAGE, size=PAGE, sharing="private")
        memory.array[:] = 77
        assert file.address == arena.address + PAGE
        assert np.array_equal(array[PAGE : 4 * PAGE : PAGE], [4, 5, 77])
        assert arena.read(3 * PAGE - 1, 2) == bytes([5, 77])
        array[3 * PAGE] = 1
        assert memory.array[0] == 1
        assert arena.entries == (
            quire.Placed(PAGE, 2 * PAGE, str(path), "shared", "r"),
            quire.Placed(3 * PAGE, PAGE, "anonymous memory", "private", "rw"),
        )
        assert "2 placed" in repr(arena)
        assert arena.statistics().resident_bytes >= PAGE
        with pytest.raises(TypeError, match="an arena or what is placed in one"):
            arena.__reduce__()
        del array


def test_any_offset_that_leaves_the_same_rest(path: Path) -> None:
    with quire.Arena(4 * PAGE) as arena:
        mapping = arena.map(PAGE + 54, path, 100, sharing="shared", offset=2 * PAGE + 54)
        assert arena.entries[0].offset == PAGE + 54
        assert set(mapping.array) == {3}
        with pytest.raises(ValueError, match="same rest"):
            arena.map(2 * PAGE, path, 100, sharing="shared", offset=54)
        with pytest.raises(ValueError, match="do not lie"):
            arena.map(0, path, 100, sharing="shared", offset=54)
        with pytest.raises(ValueError, match="has bytes"):
            arena.map(PAGE, path, 1, sharing="shared")
        arena.unmap(PAGE + 54)


def test_overlaps_name_both(path: Path) -> None:
    with quire.Arena(16 * PAGE) as arena:
        kept = arena.map(4 * PAGE, path, 4 * PAGE, sharing="shared")
        for at, pages in ((4, 4), (3, 2), (7, 1), (7, 5), (0, 16)):
            with pytest.raises(ValueError, match="anonymous memory would take") as caught:
                arena.map(at * PAGE, size=pages * PAGE, sharing="private")
            assert f"{path} has bytes {4 * PAGE} to {8 * PAGE}" in str(caught.value)
        assert len(arena.entries) == 1
        assert kept.array[0] == 1
        arena.map(0, size=4 * PAGE, sharing="private")
        arena.map(8 * PAGE, size=8 * PAGE, sharing="private")


def test_what_does_not_fit_is_refused(path: Path) -> None:
    with quire.Arena(2 * PAGE + 1) as arena:
        for at, size in ((0, 4 * PAGE), (3 * PAGE, 1), (1 << 60, 1), (1 << 70, 1), (0, 1 << 45)):
            with pytest.raises(ValueError, match="do not lie in an arena"):
                arena.map(at, size=size, sharing="private", flags=quire.MapFlag.NORESERVE)
        with pytest.raises(ValueError, match="counts from the start"):
            arena.map(-1, size=1, sharing="private")
        for flag in ("FIXED", "FIXED_NOREPLACE", "BIT32", "GROWSDOWN"):
            with pytest.raises(ValueError, match="says where"):
                arena.map(0, size=1, sharing="private", flags=quire.MapFlag[flag])
        with pytest.raises(quire.Error) as caught:
            arena.map(0, "/no/such/file", sharing="shared")
        assert caught.value.errno == errno.ENOENT
        with pytest.raises(ValueError):
            arena.map(0, path, PAGE, sharing="shared", dtype="f8", shape=PAGE)
        assert arena.entries == ()
        arena.map(2 * PAGE, size=PAGE, sharing="private")  # to the end of the last page
    with pytest.raises(ValueError, match="at least one byte"):
        quire.Arena(0)
    with pytest.raises(quire.Error, match=r"2\*\*47"):
        quire.Arena(1 << 50)


def test_touches_where_nothing_is_placed_raise(path: Path) -> None:
    with quire.Arena(4 * PAGE) as arena:
        array = arena.array
        for _ in range(3):
            with pytest.raises(quire.PageIOError, match="nothing is placed") as caught:
                touch(array, PAGE + 9)
            assert (caught.value.offset, caught.value.source) == (PAGE + 9, "arena")
            with pytest.raises(quire.PageIOError, match="nothing is placed"):
                touch(array, 0, 1)
            with pytest.raises(quire.PageIOError, match="nothing is placed"):
                arena.read(PAGE, 1)
        arena.check()
        arena.map(PAGE, path, PAGE, sharing="shared")
        assert touch(array, PAGE + 9) == 1
        with pytest.raises(quire.ProtectionError) as refused:
            touch(array, PAGE + 9, 5)
        assert refused.value.source == str(path)
        assert arena.statistics().errors > 3
        arena.unmap(PAGE)
        with pytest.raises(quire.PageIOError, match="nothing is placed"):
            touch(array, PAGE + 9)
        del array, caught, refused


def test_a_truncated_file_raises_with_its_own_name_and_offset(path: Path) -> None:
    with quire.Arena(8 * PAGE, label="mine") as arena:
        arena.map(2 * PAGE, path, 4 * PAGE, sharing="shared", offset=PAGE)
        array = arena.array
        with path.open("r+b") as file:
            file.truncate(2 * PAGE)
        with pytest.raises(quire.TruncatedError) as caught:
            touch(array, 3 * PAGE + 5)
        assert (caught.value.source, caught.value.offset) == (str(path), 2 * PAGE + 5)
        with pytest.raises(quire.TruncatedError) as read:
            arena.read(3 * PAGE, 8)
        assert read.value.source == str(path)
        assert isinstance(arena.failed, quire.TruncatedError)
        with path.open("r+b") as file:
            file.truncate(16 * PAGE)
        assert arena.failed is None
        assert touch(array, 3 * PAGE + 5) == 0
        del array, caught, read


def test_growth_stays_inside(path: Path) -> None:
    with quire.Arena(4 * PAGE) as arena:
        memory = arena.map(0, size=PAGE, sharing="private", reserve=2 * PAGE)
        with pytest.raises(ValueError, match="would take"):
            arena.map(PAGE, size=PAGE, sharing="private")
        last = arena.map(3 * PAGE, size=PAGE, sharing="private")
        memory.resize(2 * PAGE)
        memory.array[:] = 1
        for mapping, size in ((memory, 3 * PAGE), (last, 2 * PAGE)):
            with pytest.raises(BufferError, match=r"used up|cannot stay"):
                mapping.resize(size)
        memory.resize(1)
        assert is_mapped(memory.address + PAGE)
        with pytest.raises(quire.PageIOError):
            arena.read(PAGE, 1)
        for refused in (lambda: memory.split(1), memory.seal):
            with pytest.raises(ValueError, match="placed in an arena cannot be"):
                refused()
        memory.close()
        assert is_mapped(arena.address)
        arena.map(0, size=3 * PAGE, sharing="private").array[:] = 9
        assert arena.read(0, 1) == b"\t"


def test_unmap(path: Path) -> None:
    with quire.Arena(16 * PAGE) as arena:
        first = arena.map(0, path, 2 * PAGE, sharing="shared")
        arena.map(2 * PAGE, path, 2 * PAGE, sharing="shared")
        arena.map(8 * PAGE, path, 2 * PAGE, sharing="shared")
        with pytest.raises(ValueError, match=f"{path} has bytes 0 to {2 * PAGE}"):
            arena.unmap(PAGE, 2 * PAGE)
        with pytest.raises(ValueError, match="nothing is placed"):
            arena.unmap(5 * PAGE)
        view = first.array
        with pytest.raises(BufferError, match="view"):
            arena.unmap(0, 16 * PAGE)
        assert len(arena.entries) == 3
        del view
        arena.unmap(0, 4 * PAGE)
        assert first.closed
        assert [entry.offset for entry in arena.entries] == [8 * PAGE]
        assert all(is_mapped(arena.address + page * PAGE) for page in range(16))
        address = arena.address
    assert arena.closed
    assert not any(is_mapped(address + page * PAGE) for page in range(-1, 17))


def test_the_end_with_views(path: Path) -> None:
    arena = quire.Arena(4 * PAGE)
    mapping = arena.map(0, path, PAGE, sharing="shared")
    whole, part, address = arena.array, mapping.array, arena.address
    with pytest.raises(BufferError, match="view"):
        arena.close()
    with arena:
        pass
    assert (whole[0], part[0]) == (1, 1)  # still there
    del whole
    assert part[1] == 1
    del arena, mapping
    gc.collect()
    assert part[2] == 1
    assert is_mapped(address + 3 * PAGE)
    del part
    assert not is_mapped(address)
    again = quire.Arena(PAGE)
    again.close()
    again.close()
    with pytest.raises(ValueError, match="closed"):
        again.map(0, size=PAGE, sharing="private")
    with pytest.raises(quire.ClosedError):
        again.__enter__()


def test_the_arena_goes_with_its_objects(path: Path) -> None:
    before = quire._core.live_mappings()
    arena = quire.Arena(64 * PAGE)
    for page in range(32):
        arena.map(2 * page * PAGE, path, PAGE, sharing="shared")
    address = arena.address
    assert quire._core.live_mappings() == before + 33
    del arena
    gc.collect()
    assert quire._core.live_mappings() == before
    assert not is_mapped(address)


def test_quire_map_does_not_replace_an_arena() -> None:
    with quire.Arena(4 * PAGE) as arena:
        with pytest.raises(quire.Error) as caught:
            quire.map(
                size=PAGE, sharing="private", address=arena.address, flags=quire.MapFlag.FIXED
            )
        assert caught.value.errno == errno.EEXIST


def test_a_forked_child_has_its_own(path: Path) -> None:
    arena = quire.Arena(4 * PAGE)
    arena.map(0, path, PAGE, sharing="shared")
    private = arena.map(PAGE, size=PAGE, sharing="private")
    array = arena.array

    def work() -> None:
        assert touch(array, 5) == 1
        private.array[0] = 9
        arena.map(2 * PAGE, size=PAGE, sharing="private").array[:] = 5
        arena.unmap(0)
        assert touch(array, 2 * PAGE) == 5
        with pytest.raises(quire.PageIOError, match="nothing is placed"):
            touch(array, 5)

    assert children.in_fork(work) == ""
    assert (touch(array, 5), touch(array, PAGE), len(arena.entries)) == (1, 0, 2)


def test_threads_race_and_nothing_is_clobbered(path: Path) -> None:
    """Threads place, check and unmap in one arena; others map and fill memory of their own."""
    seed, slots, rounds = new_seed(), 8, 150
    arena = quire.Arena(slots * PAGE)
    stop, wrong, placed = threading.Event(), [], []

    def place(number: int) -> None:
        source = random.Random(seed + number)
        for _ in range(rounds):
            at = source.randrange(slots)
            pages = source.randrange(1, 4)
            try:
                mapping = arena.map(at * PAGE, size=pages * PAGE, sharing="private")
            except ValueError:
                continue  # taken, or beyond the end
            placed.append(at)
            mapping.write(bytes([number]) * (pages * PAGE))
            if mapping.read() != bytes([number]) * (pages * PAGE):
                wrong.append(f"mapping {at}")
            mapping.close()

    def churn(number: int) -> None:
        source = random.Random(seed - number)
        while not stop.is_set():
            own = [mmap.mmap(-1, source.randrange(1, 5) * PAGE) for _ in range(20)]
            for number, memory in enumerate(own):
                memory[:] = bytes([number + 100]) * len(memory)
            for number, memory in enumerate(own):
                if memory[:] != bytes([number + 100]) * len(memory):
                    wrong.append("memory of another thread")
                memory.close()

    churners = [threading.Thread(target=churn, args=(number,)) for number in (1, 2)]
    placers = [threading.Thread(target=place, args=(number,)) for number in range(1, 5)]
    for thread in churners + placers:
        thread.start()
    for thread in placers:
        thread.join()
    stop.set()
    for thread in churners:
        thread.join()
    assert wrong == []
    assert len(placed) > rounds
    assert arena.entries == ()
    assert all(is_mapped(arena.address + page * PAGE) for page in range(slots))
    arena.close()


def test_touches_race_with_placing(path: Path) -> None:
    """A touch meets what is placed, or raises; nothing else."""
    arena = quire.Arena(2 * PAGE)
    stop, seen = threading.Event(), set()

    def look() -> None:
        array = arena.array
        while not stop.is_set():
            try:
                seen.add(int(touch(array, PAGE)))
            except quire.PageIOError:
                seen.add(-1)

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(100):
        arena.map(PAGE, path, PAGE, sharing="shared")
        arena.unmap(PAGE)
    stop.set()
    thread.join()
    assert seen <= {-1, 1, 255}
    arena.close()


def test_a_thread_may_meet_the_same_gap_any_number_of_times() -> None:
    with quire.Arena(2 * PAGE) as arena:
        array = arena.array
        for _ in range(2500):
            with pytest.raises(quire.PageIOError):
                touch(array, PAGE)
        del array


def test_unmapping_what_another_thread_is_placing_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is in the arena before `map` returns; nothing is left undone without a word."""
    arena = quire.Arena(4 * PAGE)
    real, tried = arena_module.mapped, []

    def interrupted(*how: Any, **more: Any) -> quire.KernelMapping:
        mapping = real(*how, **more)
        assert [entry.offset for entry in arena.entries] == [PAGE]
        for part in ((PAGE,), (0, 4 * PAGE)):
            with pytest.raises(BufferError, match="another thread is placing"):
                arena.unmap(*part)
            tried.append(part)
        return mapping

    with monkeypatch.context() as patch:
        patch.setattr(arena_module, "mapped", interrupted)
        first = arena.map(PAGE, size=PAGE, sharing="private")
        assert len(tried) == 2
        first.close()
        again = arena.map(PAGE, size=PAGE, sharing="private")  # the arena still knows the first
    arena.unmap(PAGE)
    assert again.closed
    assert arena.entries == ()
    arena.close()


def test_limits_are_named_and_nothing_changes() -> None:
    children.run(child_at_its_limits).check()


def child_at_its_limits() -> None:
    arena = quire.Arena("64 GiB")
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), before[1]))
    with pytest.raises(quire.Error, match="RLIMIT_AS"):
        arena.map(0, size="1 GiB", sharing="private")
    with pytest.raises(quire.Error, match="RLIMIT_AS"):
        quire.Arena("1 GiB")
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert arena.entries == ()
    arena.map(0, size="1 GiB", sharing="private", flags=quire.MapFlag.NORESERVE).array[0] = 1
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    filler = quire.map(size=most * PAGE, sharing="private", flags=quire.MapFlag.NORESERVE)

    def protect_every_other_page() -> None:
        for page in range(0, most, 2):
            filler.protect("r", page * PAGE, PAGE)

    def place_every_other_page() -> None:
        nonlocal count
        while True:
            arena.map(at + 2 * count * PAGE, size=PAGE, sharing="shared")
            count += 1

    with pytest.raises(quire.Error, match="max_map_count"):
        protect_every_other_page()
    at, count = 4 << 30, 0
    with pytest.raises(quire.Error, match="max_map_count") as caught:
        place_every_other_page()
    assert caught.value.errno == errno.ENOMEM
    filler.close()
    assert is_mapped(arena.address + at + 2 * count * PAGE)  # reserved still
    arena.map(at + 2 * count * PAGE, size=PAGE, sharing="shared")
    arena.close()


if __name__ == "__main__":
    children.main()
