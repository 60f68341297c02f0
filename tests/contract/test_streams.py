"""Readers in order get huge pages, moved in whole; the budget holds, and what is read is right."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import quire
from quire import _core
from quire.testing.pmaps import working_pmaps

MIB = 1 << 20
HUGE = 2 * MIB
SIZE = 96 * MIB
COUNT = SIZE // 8
BUDGET = 40 * MIB
GRANULE = 64 << 10
Words = npt.NDArray[np.int64]


@pytest.fixture(params=[name for name in working_pmaps() if name in ("uffd", "inline")])
def pmap(request: pytest.FixtureRequest) -> str:
    """Those that move pages."""
    return str(request.param)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("streams") / "numbers"
    np.arange(COUNT).tofile(found)
    return found


def map_entries(mapping: quire.Mapping) -> list[dict[str, str]]:
    """The kernel's map entries of a mapping's addresses (proc_pid_smaps(5))."""
    start, end = mapping.address, mapping.address + SIZE
    found: list[dict[str, str]] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            low, high = (int(bound, 16) for bound in name.split("-"))
            inside = low < end and high > start
            if inside:
                found.append({"range": name, "access": rest[:4]})
        elif inside:
            found[-1][name[:-1]] = rest.strip()
    return found


def kib(mapping: quire.Mapping, name: str) -> int:
    return sum(int(entry[name].split()[0]) for entry in map_entries(mapping))


def read_through(array: Words, granule: int = GRANULE, backwards: bool = False) -> None:
    """Reads and compares granules, first to last or last to first."""
    count = granule // 8
    starts = range(0, COUNT, count)
    for start in reversed(starts) if backwards else starts:
        assert np.array_equal(array[start : start + count], np.arange(start, start + count))


@pytest.mark.parametrize("granule", [16 << 10, GRANULE, HUGE, 2 * HUGE])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_stream_gets_huge_pages_within_its_budget(
    pmap: str, path: Path, granule: int, backwards: bool
) -> None:
    with quire.open(path, dtype="i8", pmap=pmap, budget=BUDGET, granule=granule) as mapping:
        array = mapping.array
        for _ in range(2):
            read_through(array, granule, backwards)
            assert kib(mapping, "AnonHugePages") >= BUDGET // 4 >> 10
            assert kib(mapping, "Rss") <= BUDGET >> 10
        counted = mapping.statistics()
        assert counted.peak_resident_bytes <= BUDGET
        assert [entry["access"] for entry in map_entries(mapping)] == ["r--p"]
        del array


def test_a_huge_page_is_evicted_as_a_whole(pmap: str, path: Path) -> None:
    with quire.open(path, dtype="i8", pmap=pmap, budget=2 * SIZE, granule=GRANULE) as mapping:
        array = mapping.array
        read_through(array)
        mapping.prefetch().result(60)
        huge, whole = kib(mapping, "AnonHugePages"), kib(mapping, "Rss")
        assert whole == SIZE >> 10
        assert huge >= whole // 2
        part = np.s_[COUNT // 2 : COUNT // 2 + GRANULE // 8]
        mapping.evict(part)
        assert not mapping.resident(part).any()
        left = mapping.statistics().resident_bytes >> 10
        assert (kib(mapping, "Rss"), left) == (whole - (HUGE >> 10),) * 2
        assert kib(mapping, "AnonHugePages") <= huge
        read_through(array)
        del array


def test_pins_in_huge_pages_leave_the_rest_to_go(pmap: str, path: Path) -> None:
    with quire.open(path, dtype="i8", pmap=pmap, budget=BUDGET, granule=GRANULE) as mapping:
        array = mapping.array
        read_through(array)
        pins = []
        for first in range(HUGE // 8, COUNT, HUGE // 8 * 3):
            part = np.s_[first + 100 : first + 200]
            pins.append((part, mapping.pin(part)))
        for _ in range(2):
            read_through(array)
            assert all(mapping.resident(part).all() for part, _ in pins)
            assert kib(mapping, "Rss") <= BUDGET >> 10
        assert mapping.statistics().peak_resident_bytes <= BUDGET
        for _, pin in pins:
            pin.release()
        del array


def test_streams_and_jumps_of_threads_read_what_is_stored(pmap: str, path: Path) -> None:
    with quire.open(path, dtype="i8", pmap=pmap, budget=BUDGET, granule=GRANULE) as mapping:
        array = mapping.array
        wrong: list[object] = []
        stop = threading.Event()

        def jump(seed: int, array: Words) -> None:
            random = np.random.default_rng(seed)
            while not stop.is_set():
                chosen = random.integers(0, COUNT, 50)
                if not np.array_equal(array[chosen], chosen):
                    wrong.append(chosen)
                first = int(random.integers(0, COUNT - 1000))
                mapping.evict(np.s_[first : first + 100_000])

        jumpers = [threading.Thread(target=jump, args=(seed, array)) for seed in (1, 2)]
        for thread in jumpers:
            thread.start()
        try:
            for backwards in (False, True, False):
                read_through(array, backwards=backwards)
        finally:
            stop.set()
            for thread in jumpers:
                thread.join()
        assert not wrong
        assert mapping.statistics().peak_resident_bytes <= BUDGET
        del array


def test_an_error_within_a_huge_page_is_told(pmap: str, path: Path) -> None:
    bad = 21 * HUGE + 5 * GRANULE
    store = _core.open_faulty(_core.open_file(path), offset=bad, length=1, errno=5)
    with quire.open(
        store, dtype="i8", pmap=pmap, budget=BUDGET, granule=GRANULE, retries=0
    ) as mapping:
        array = mapping.array
        good = bad // GRANULE * GRANULE // 8
        assert np.array_equal(array[:good], np.arange(good))
        with pytest.raises(quire.PageIOError) as caught:
            touch_all(mapping, array[good:])
        assert caught.value.errno == 5
        del array


def test_a_write_to_a_huge_page_of_a_read_only_mapping_is_told(pmap: str, path: Path) -> None:
    with quire.open(path, dtype="i8", pmap=pmap, budget=BUDGET, granule=GRANULE) as mapping:
        array = mapping.array
        read_through(array)
        with pytest.raises(quire.ProtectionError):
            write_carelessly(mapping, array[COUNT - 1000 :])
        del array


def touch_all(mapping: quire.Mapping, array: Words) -> None:
    """Reads it, and has errors raised that the interpreter has yet to."""
    array.sum()
    mapping.check()


def write_carelessly(mapping: quire.Mapping, array: Words) -> None:
    """Writes by a pointer, as C code does that does not ask whether it may."""
    ctypes.memset(array.ctypes.data, 1, array.nbytes)
    mapping.check()


WITHOUT_HUGE_PAGES = """
import ctypes, sys
import numpy as np, quire
assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0  # PR_SET_THP_DISABLE
with quire.open(sys.argv[1], dtype="i8", pmap=sys.argv[2], budget="40 MiB") as mapping:
    array = mapping.array
    for _ in range(2):
        assert int(array.sum()) == len(array) * (len(array) - 1) // 2
    counted = mapping.statistics()
    assert counted.peak_resident_bytes <= 40 << 20 and counted.readahead_fills > 0
    del array
"""


def test_a_process_without_huge_pages_reads_the_same(pmap: str, path: Path) -> None:
    argv = [sys.executable, "-c", WITHOUT_HUGE_PAGES, str(path), pmap]
    subprocess.run(argv, check=True, timeout=120)
