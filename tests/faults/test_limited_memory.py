"""`budget="auto"` in a cgroup with a limit: nobody is killed, all is right, the budget follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import quire
from quire.testing import children
from quire.testing.cgroups import MemoryGroup, NoGroupError, memory_group
from quire.testing.waiting import wait_until

MIB = 1 << 20
LIMIT = 256 * MIB
LOWEST = 88 * MIB
FILE_BYTES = 1024 * MIB
SWAPPED_BYTES = 512 * MIB
NUMBERS = MIB // 8  # of a block
BASE = np.random.default_rng(7).integers(0, 1 << 62, NUMBERS)


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    """A group of 256 MiB and no swap; its processes die rather than exceed that."""
    try:
        with memory_group(LIMIT) as made:
            yield made
    except NoGroupError as error:
        pytest.skip(f"a real limit of memory cannot be had: {error}")


def block_of(number: int) -> np.ndarray:
    """A block of 1 MiB that differs from all others everywhere."""
    return BASE ^ number


def check_all(array: np.ndarray) -> None:
    for number, start in enumerate(range(0, len(array), NUMBERS)):
        assert (array[start : start + NUMBERS] == block_of(number)).all(), f"block {number}"


def budget_now() -> int:
    budget = quire.budget()
    assert budget is not None
    return budget


def follow(group: MemoryGroup, work: Callable[[], object]) -> None:
    """Works under the limit, then under ever lower ones, to which the budget comes down."""
    work()
    first, limit = budget_now(), LIMIT
    assert LIMIT // 8 < first < LIMIT, "it makes use of what there is, and of no more"
    while limit > LOWEST:
        limit = limit * 7 // 8  # more than what is held, or the kernel refuses, or kills
        group.set_limit(limit)
        wait_until(lambda: budget_now() <= limit * 3 // 4, "the budget follows")  # noqa: B023
    work()
    assert limit // 8 < budget_now() <= limit * 3 // 4
    assert budget_now() < first
    assert quire.statistics().resident_bytes <= limit
    assert group.used_bytes <= limit
    assert group.kills == 0


def enter(path: str, version: str) -> MemoryGroup:
    group = MemoryGroup(Path(path), int(version))
    group.enter()
    quire.set_budget("auto")
    return group


def child_reads(path: str, version: str, folder: str) -> None:
    group = enter(path, version)
    with quire.open(Path(folder) / "numbers.bin", dtype="i8", granule="64 KiB") as mapping:
        follow(group, lambda: check_all(mapping.array))


def child_writes(path: str, version: str, folder: str) -> None:
    group = enter(path, version)
    array = quire.empty(SWAPPED_BYTES // 8, "i8", swap=quire.Swap(folder=folder))

    def work() -> None:
        for number, start in enumerate(range(0, len(array), NUMBERS)):
            array[start : start + NUMBERS] = block_of(number)
        check_all(array)

    follow(group, work)
    assert quire.mapping_of(array).statistics().swap_bytes > SWAPPED_BYTES // 2


def test_a_file_is_read(group: MemoryGroup, tmp_path: Path) -> None:
    with (tmp_path / "numbers.bin").open("wb") as file:
        for number in range(FILE_BYTES // MIB):
            file.write(block_of(number).data)
    children.run(child_reads, group.path, group.version, tmp_path, timeout_s=110).check()
    assert group.kills == 0


def test_an_array_is_swapped(group: MemoryGroup, tmp_path: Path) -> None:
    children.run(child_writes, group.path, group.version, tmp_path, timeout_s=110).check()
    assert group.kills == 0


if __name__ == "__main__":
    children.main()
