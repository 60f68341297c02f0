"""Budgets over files that the kernel pages, also under a memory limit of a control group."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import quire
from quire.testing import children
from quire.testing.cgroups import MemoryGroup, NoGroupError, memory_group
from quire.testing.waiting import wait_until

PAGE = mmap.PAGESIZE
SIZE = 64 << 20
BUDGET = 8 << 20
GROUP_LIMIT = 128 << 20
GROUP_BUDGET = 64 << 20
# Page tables and what the interpreter itself takes meanwhile.
BESIDE = 4 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "large.bin"
    np.random.default_rng(3).integers(0, 1 << 60, SIZE // 8).tofile(found)
    with found.open("rb") as file:
        os.fsync(file.fileno())
    return found


@pytest.mark.parametrize("cache", ["keep", "drop"])
@pytest.mark.parametrize("protection", ["r", "rw"])
def test_a_budget_is_kept_and_nothing_is_lost(path: Path, cache: str, protection: str) -> None:
    model = np.fromfile(path, "i8")
    with quire.map(
        path, sharing="shared", protection=protection, dtype="i8", budget=BUDGET, cache=cache
    ) as mapping:
        assert mapping.budget_bytes == BUDGET
        array = mapping.array
        for _ in range(3):
            assert np.array_equal(array, model)
            if protection == "rw":
                array[::512] += 1
                model[::512] += 1
        wait_until(lambda: mapping.statistics().resident_bytes <= BUDGET, "it falls to the budget")
        if cache == "drop":
            wait_until(
                lambda: int(mapping.residency().count(1)) * PAGE <= BUDGET,
                "the page cache falls to the budget",
            )
        assert mapping.statistics().evicted_bytes >= SIZE - BUDGET
        assert np.array_equal(array, model)
    assert np.array_equal(np.fromfile(path, "i8"), model)


def test_a_budget_is_kept_while_threads_touch(path: Path) -> None:
    """A thread uses a part all the time, and another scans the rest."""
    with quire.map(path, sharing="shared", dtype="i8", budget=BUDGET) as mapping:
        array, stop = mapping.array, threading.Event()

        def use() -> None:
            while not stop.is_set():
                int(array[: (1 << 20) // 8].sum())

        user = threading.Thread(target=use)
        user.start()
        for _ in range(4):
            for first in range(len(array) // 2, len(array), 1 << 17):
                int(array[first : first + (1 << 17)].sum())
        wait_until(lambda: mapping.statistics().evicted_bytes > 0, "the scan is over the budget")
        wait_until(lambda: mapping.statistics().resident_bytes <= BUDGET, "it is kept")
        assert int(array[: (1 << 20) // 8].sum()) == int(np.fromfile(path, "i8", 1 << 17).sum())
        stop.set()
        user.join()


def test_what_has_no_other_home_has_no_budget(path: Path) -> None:
    with pytest.raises(ValueError, match="no other home"):
        quire.map(size=SIZE, sharing="private", budget=BUDGET)
    with pytest.raises(ValueError, match="no other home"):
        quire.map(path, sharing="private", protection="rw", budget=BUDGET)
    with quire.map(path, sharing="private", budget=BUDGET) as mapping:
        mapping.set_budget(None)
        with pytest.raises(ValueError, match='"keep" or "drop"'):
            mapping.set_budget(BUDGET, cache="clean")
        with pytest.raises(ValueError, match="some"):
            mapping.set_budget(0)


@pytest.fixture
def group_of() -> Iterator[Callable[[], MemoryGroup]]:
    """Makes control groups with a limit, which end with the test."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(memory_group(GROUP_LIMIT))
        except NoGroupError as error:
            pytest.skip(f"a real limit of memory cannot be had: {error}")
        yield lambda: stack.enter_context(memory_group(GROUP_LIMIT))


def child_reads_under_a_limit(path: str, folder: str, version: str, kind: str) -> None:
    """Reads all of a file and rows of it, in the group."""
    size = Path(path).stat().st_size
    MemoryGroup(Path(folder), int(version)).enter()
    if kind == "quire":
        array = quire.map(
            path, sharing="shared", dtype="i8", budget=GROUP_BUDGET, cache="drop"
        ).array
    else:
        array = np.asarray(np.memmap(path, "i8", "r"))
    found = walk(array)
    for row in np.random.default_rng(5).integers(0, size // 4096, 300):
        found += int(array[row * 512] & 1)
    print(found)


def test_a_group_never_has_more_than_the_budget(
    tmp_path: Path, group_of: Callable[[], MemoryGroup]
) -> None:
    """A file four times the group's limit: quire's part stays small, the memmap's fills it."""
    path = tmp_path / "four-times.bin"
    with path.open("wb") as file:
        piece = np.random.default_rng(1).integers(0, 1 << 60, 1 << 20)
        for _ in range(64):
            piece.tofile(file)
        os.fsync(file.fileno())
    found = {}
    for kind in ("quire", "memmap"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        group = group_of()
        ended = children.run(child_reads_under_a_limit, path, group.path, group.version, kind)
        found[kind] = int(ended.check()), group.peak_bytes
    assert found["quire"][0] == found["memmap"][0]
    assert found["memmap"][1] > 100 << 20
    assert found["quire"][1] <= GROUP_BUDGET + BESIDE, found


def test_files_in_memory_have_no_budget(small_disk: Path) -> None:
    path = small_disk / "in-memory.bin"
    path.write_bytes(b"\1" * PAGE)
    with pytest.raises(ValueError, match="no other home"):
        quire.map(path, sharing="shared", budget=PAGE)
    descriptor = os.memfd_create("quire-test")
    os.truncate(descriptor, SIZE)
    with pytest.raises(ValueError, match="no other home"):
        quire.map(descriptor, sharing="shared", budget=BUDGET, cache="drop")
    os.close(descriptor)


def total(array: np.ndarray) -> int:
    """The sum, without what does not fit."""
    return int(array.sum()) & 0xFFFF


def walk(array: np.ndarray) -> int:
    """As `total`, a piece after the other."""
    return sum(total(array[at : at + (1 << 15)]) for at in range(0, len(array), 1 << 15)) & 0xFFFF


def test_a_mapping_changes_under_a_budget_that_drops(path: Path) -> None:
    """Resized, with a hole, protected and split, while leashes have split its map entries."""
    model = np.fromfile(path, "i8")
    half = SIZE // 2
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    mapping = quire.map(path, half, sharing="shared", budget=BUDGET, cache="drop")
    assert walk(mapping.array.view("i8")) == total(model[: half // 8])
    mapping.resize(SIZE)
    array = mapping.array.view("i8")
    assert walk(array) == total(model)
    mapping.unmap(0, PAGE)
    mapping.protect("none", PAGE, PAGE)
    assert walk(array[2 * PAGE // 8 :]) == total(model[2 * PAGE // 8 :])
    with pytest.raises(quire.Error):
        int(array[0])
    del array
    rest = mapping.split(half)
    assert walk(rest.array.view("i8")) == total(model[half // 8 :])
    rest.close()
    mapping.close()


def test_a_file_truncated_under_a_budget_raises_and_heals(path: Path) -> None:
    model = np.fromfile(path, "i8")
    with quire.map(path, sharing="shared", dtype="i8", budget=BUDGET, cache="drop") as mapping:
        array = mapping.array
        assert walk(array) == total(model)
        os.truncate(path, SIZE // 4)
        with pytest.raises(quire.TruncatedError):
            walk(array)
        os.truncate(path, SIZE)
        assert walk(array) == total(model[: SIZE // 4 // 8])


def child_forks_under_a_budget(path: str) -> None:
    """A forked child walks on, within its budget, and its parent too."""
    expected = total(np.fromfile(path, "i8"))
    mapping = quire.map(path, sharing="shared", dtype="i8", budget=BUDGET, cache="drop")
    assert walk(mapping.array) == expected
    child = os.fork()
    assert walk(mapping.array) == expected
    wait_until(lambda: mapping.statistics().resident_bytes <= BUDGET, "it falls to the budget")
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_forked_child_keeps_the_budget(path: Path) -> None:
    children.run(child_forks_under_a_budget, path).check()


def test_threads_walk_and_write_under_a_budget_that_drops(path: Path) -> None:
    model = np.fromfile(path, "i8")
    with quire.map(
        path, sharing="shared", protection="rw", dtype="i8", budget=BUDGET, cache="drop"
    ) as mapping:
        parts, failed = np.split(mapping.array, 4), []

        def work(part: np.ndarray) -> None:
            try:
                for _ in range(2):
                    for first in range(0, len(part), 1 << 15):
                        part[first : first + (1 << 15) : 64] += 1
            except BaseException as error:
                failed.append(error)
                raise

        threads = [threading.Thread(target=work, args=(part,)) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        model[::64] += 2
        assert np.array_equal(mapping.array, model)
        del parts
    assert np.array_equal(np.fromfile(path, "i8"), model)


if __name__ == "__main__":
    children.main()
