"""Many bad pages in one call, a page that is bad for two threads, and failures that pass."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from pathlib import Path

import numpy as np
import pytest

import quire
from quire.testing import children
from quire.testing.touches import touch, touch_sum

PAGE = mmap.PAGESIZE
MOST = int(Path("/proc/sys/vm/max_map_count").read_text())
MANY = min(MOST + 1, 1 << 17)  # pages; more than there can be map entries, where that is not raised


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "some.bin"
    found.write_bytes(bytes(range(1, 65)) * PAGE)
    return found


def entries() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def truncated(path: Path) -> quire.KernelMapping:
    os.truncate(path, MANY * PAGE)
    mapping = quire.map(path, sharing="shared", protection="rw")
    os.truncate(path, 3 * PAGE)
    return mapping


def guarded(_path: Path) -> quire.KernelMapping:
    memory = quire.map(size=MANY * PAGE, sharing="private")
    memory.advise("guard_install")
    return memory


def inaccessible(_path: Path) -> quire.KernelMapping:
    memory = quire.map(size=MANY * PAGE, sharing="shared")
    memory.protect("none")
    return memory


def unmapped(_path: Path) -> quire.KernelMapping:
    memory = quire.map(size=MANY * PAGE, sharing="private")
    memory.unmap(PAGE, (MANY - 1) * PAGE)
    return memory


def empty_arena(_path: Path) -> quire.Arena:
    arena = quire.Arena(MANY * PAGE)
    arena.map(5 * PAGE, size=PAGE, sharing="private").array[:] = 9
    return arena


MAKERS = {
    "truncated": (truncated, quire.TruncatedError),
    "guarded": (guarded, quire.ProtectionError),
    "inaccessible": (inaccessible, quire.ProtectionError),
    "unmapped": (unmapped, quire.PageIOError),
    "empty arena": (empty_arena, quire.PageIOError),
}


def child_sums(kind: str, path: str) -> None:
    make, error = MAKERS[kind]
    mapping = make(Path(path))
    array = mapping.array
    before = entries()
    for walk in (array, array[::-1], array[:: 3 * PAGE]):
        errors = mapping.statistics().errors
        with pytest.raises(error):
            touch_sum(walk)
        assert 0 < mapping.statistics().errors - errors < 100
        assert entries() - before < 50  # all of it is back
    order = np.random.default_rng(5).permutation(MANY) * PAGE
    errors = mapping.statistics().errors
    with pytest.raises(error):
        touch_sum(array[order])
    assert mapping.statistics().errors - errors < 1000


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_one_call_over_more_pages_than_there_are_map_entries(kind: str, path: Path) -> None:
    children.run(child_sums, kind, path).check()


def child_meets_every_other_page() -> None:
    """No two can be covered at once, and the good ones stay what they are."""
    memory = quire.map(size=2 * MANY * PAGE, sharing="private", flags=quire.MapFlag.NORESERVE)
    array = memory.array
    pages = np.arange(0, 2 * MANY, 2) * PAGE
    array[pages + PAGE] = 7
    for page in pages:
        memory.advise("guard_install", np.s_[page : page + PAGE])
    with pytest.raises(quire.ProtectionError):
        touch_sum(array[pages])
    memory.advise("guard_remove")
    assert int(array[pages + PAGE].sum()) == 7 * MANY
    assert int(array[pages].sum()) == 0
    assert memory.failed is None


def test_bad_pages_between_good_ones() -> None:
    children.run(child_meets_every_other_page).check()


def test_what_lies_beside_a_run_stays_what_it_is(path: Path) -> None:
    with quire.map(path, sharing="shared", protection="rw") as mapping:
        array = mapping.array
        whole = array.copy()
        mapping.protect("none", 8 * PAGE, 16 * PAGE)
        mapping.protect("r", 24 * PAGE, 8 * PAGE)
        mapping.unmap(40 * PAGE, 4 * PAGE)
        found = np.empty_like(array)
        with pytest.raises(quire.Error):
            _copy(array, found)
        good = np.ones(64, bool)
        good[8:24] = good[40:44] = False
        for page in range(64):
            part = np.s_[page * PAGE : (page + 1) * PAGE]
            assert (found[part] == (whole[part] if good[page] else 255)).all(), page
        mapping.protect("rw", 0, 40 * PAGE)
        assert (array[: 40 * PAGE] == whole[: 40 * PAGE]).all()


def _copy(array: np.ndarray, into: np.ndarray) -> None:
    np.copyto(into, array)
    for _ in range(10):
        pass


@pytest.mark.parametrize("sharing", ["shared", "private"])
@pytest.mark.parametrize("how", ["memset", "write"])
def test_a_refused_store_is_lost_and_nothing_else(path: Path, sharing: str, how: str) -> None:
    before = path.read_bytes()
    with quire.map(path, sharing=sharing, protection="rw") as mapping:
        mapping.protect("r", 0, 32 * PAGE)
        for first, count in ((5, 3), (2 * PAGE, 9 * PAGE)):
            with pytest.raises(quire.ProtectionError, match="read-only"):
                _store(mapping, how, first, count)
            assert mapping.read() == before
        mapping.protect("rw")
        assert mapping.failed is None
        mapping.write(b"now", 5)
        assert mapping.read(5, 3) == b"now"
    assert path.read_bytes()[8:] == before[8:]


def test_a_refused_store_to_anonymous_memory_is_lost() -> None:
    with quire.map(size=4 * PAGE, sharing="private") as memory:
        memory.array[:] = 7
        memory.protect("r")
        with pytest.raises(quire.ProtectionError):
            _store(memory, "memset", 0, 4 * PAGE)
        memory.protect("rw")
        assert memory.read() == b"\7" * (4 * PAGE)


def _store(mapping: quire.KernelMapping, how: str, first: int, count: int) -> None:
    if how == "write":
        mapping.write(b"A" * count, first)
        return
    ctypes.memset(mapping.address + first, 65, count)
    for _ in range(10):
        pass


class InC:
    """A thread that reads 8 bytes of a mapping in a call of C, which then waits at a full pipe."""

    def __init__(self, mapping: quire.KernelMapping, at: int) -> None:
        self.told: list[type] = []
        self.near, self.far = os.pipe()
        os.set_blocking(self.far, False)
        for size in (PAGE, 1):  # until not a byte more fits
            with contextlib.suppress(BlockingIOError):
                while os.write(self.far, b"x" * size):
                    pass
        os.set_blocking(self.far, True)
        self.thread = threading.Thread(target=self.work, args=(mapping.address + at,))
        self.thread.start()
        while mapping.statistics().errors == 0:
            os.sched_yield()

    def work(self, address: int) -> None:
        try:
            ctypes.CDLL(None).dprintf(self.far, b"%.8s", ctypes.c_void_p(address))
            for _ in range(10):
                pass
        except quire.Error as error:
            self.told.append(type(error))

    def end(self) -> list[type]:
        os.read(self.near, 1 << 20)
        self.thread.join()
        os.close(self.near)
        os.close(self.far)
        return self.told


def test_what_covers_a_page_for_one_thread_is_no_data_of_another(path: Path) -> None:
    with quire.map(path, sharing="shared", protection="rw") as mapping:
        os.truncate(path, PAGE)
        stays = InC(mapping, 2 * PAGE)
        with pytest.raises(quire.TruncatedError):
            mapping.read(2 * PAGE + 100, 5)
        with pytest.raises(quire.TruncatedError):
            mapping.write(b"lost?", 2 * PAGE + 100)
        assert mapping.read(0, PAGE) == (bytes(range(1, 65)) * PAGE)[:PAGE]
        assert stays.end() == [quire.TruncatedError]


def test_what_has_healed_is_whole_while_another_thread_has_not_been_told(path: Path) -> None:
    with quire.map(path, sharing="shared", protection="rw") as mapping:
        os.truncate(path, PAGE)
        stays = InC(mapping, 2 * PAGE)
        os.truncate(path, 64 * PAGE)
        assert mapping.read(2 * PAGE, 5) == bytes(5)
        mapping.write(b"hello", 2 * PAGE + 100)
        assert path.read_bytes()[2 * PAGE + 100 :][:5] == b"hello"
        assert mapping.failed is None
        assert stays.end() == [quire.TruncatedError]
        assert mapping.read(2 * PAGE + 100, 5) == b"hello"


def test_a_placed_mapping_is_read_through_its_arena_as_by_itself(path: Path) -> None:
    with quire.Arena(256 * PAGE) as arena:
        mapping = arena.map(0, path, sharing="shared", protection="rw")
        os.truncate(path, PAGE)
        stays = InC(mapping, 2 * PAGE)
        with pytest.raises(quire.TruncatedError):
            arena.read(2 * PAGE, 5)
        assert stays.end() == [quire.TruncatedError]


def test_a_guard_page_that_went_is_forgotten() -> None:
    with quire.map(size=4 * PAGE, sharing="private") as memory:
        array = memory.array
        memory.advise("guard_install", np.s_[PAGE : 2 * PAGE])
        with pytest.raises(quire.ProtectionError, match="guard page"):
            touch(array, PAGE)
        with pytest.raises(quire.ProtectionError):
            memory.check()
        memory.advise("guard_remove")
        memory.check()
        assert memory.failed is None
        assert memory.array[PAGE] == 0


def test_a_protection_that_went_is_forgotten(path: Path) -> None:
    with quire.map(path, sharing="shared", protection="rw") as mapping:
        array = mapping.array
        mapping.protect("none", PAGE, PAGE)
        mapping.protect("r", 3 * PAGE, PAGE)
        with pytest.raises(quire.ProtectionError):
            touch(array, PAGE)
        mapping.protect("rw", 3 * PAGE, PAGE)
        with pytest.raises(quire.ProtectionError):  # that was another one
            mapping.check()
        mapping.protect("rw", PAGE, PAGE)
        assert mapping.failed is None
        assert mapping.array[PAGE] == array[PAGE]


def test_a_touch_of_what_the_program_took_away_is_told_once(path: Path) -> None:
    with quire.map(path, sharing="shared", protection="rw") as mapping:
        array = mapping.array
        mapping.unmap(PAGE, PAGE)
        for _ in range(2):
            with pytest.raises(quire.PageIOError, match="was unmapped"):
                touch(array, PAGE)
        mapping.check()
        assert mapping.array[0] == 1
        assert mapping.read(0, 1) == b"\1"
        with pytest.raises(quire.PageIOError, match="was unmapped"):
            mapping.read(PAGE, 1)


def test_a_touch_beyond_the_end_is_whole_after_a_resize(path: Path) -> None:
    with quire.map(path, sharing="shared", protection="rw", reserve=256 * PAGE) as mapping:
        with pytest.raises(quire.PageIOError, match="resize it"):
            _store(mapping, "memset", 70 * PAGE, 5)
        mapping.resize(128 * PAGE)
        assert mapping.failed is None
        assert mapping.array[70 * PAGE] == 0
        _store(mapping, "memset", 70 * PAGE, 5)
        assert path.read_bytes()[70 * PAGE :][:6] == b"AAAAA\0"


if __name__ == "__main__":
    children.main()
