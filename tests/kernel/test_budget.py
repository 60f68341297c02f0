"""Budgets over files that the kernel pages, also under a memory limit of a control group."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import quire
from quire.testing import children
from quire.testing.waiting import wait_until

PAGE = mmap.PAGESIZE
SIZE = 64 << 20
BUDGET = 8 << 20
GROUP_LIMIT = 128 << 20
GROUP_BUDGET = 64 << 20
CGROUPS = Path("/sys/fs/cgroup/memory")


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
def control_group() -> Iterator[Path]:
    """A memory control group (v1) with a limit."""
    folder = CGROUPS / f"quire-test-{os.getpid()}"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text(str(GROUP_LIMIT))
    yield folder
    wait_until(lambda: not (folder / "tasks").read_text().strip(), "the group is empty")
    folder.rmdir()


def child_reads_under_a_limit(path: str, group: str, kind: str) -> None:
    """Reads all of a file and rows of it; prints what the group's page cache has after that."""
    folder = Path(group)
    (folder / "tasks").write_text(str(os.getpid()))
    before = cache_of(folder)
    size = Path(path).stat().st_size
    if kind == "quire":
        array = quire.map(
            path, sharing="shared", dtype="i8", budget=GROUP_BUDGET, cache="drop"
        ).array
    else:
        array = np.asarray(np.memmap(path, "i8", "r"))
    total = 0
    for first in range(0, size // 8, 1 << 15):
        total += int(array[first : first + (1 << 15)].sum() & 0xFFFF)
    rng = np.random.default_rng(5)
    for row in rng.integers(0, size // 4096, 2000):
        total += int(array[row * 512] & 1)
    if kind == "quire":
        wait_until(
            lambda: cache_of(folder) - before <= GROUP_BUDGET, "the group's cache is in the budget"
        )
    print(total, cache_of(folder) - before)


def cache_of(folder: Path) -> int:
    stat = (folder / "memory.stat").read_text()
    return int(stat.partition("cache ")[2].split()[0])


def test_a_group_does_not_keep_more_than_the_budget(tmp_path: Path, control_group: Path) -> None:
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
        ended = children.run(child_reads_under_a_limit, path, control_group, kind)
        found[kind] = [int(word) for word in ended.check().split()]
    assert found["quire"][0] == found["memmap"][0]
    assert found["memmap"][1] > 100 << 20
    assert found["quire"][1] <= GROUP_BUDGET, found


if __name__ == "__main__":
    children.main()
