"""The advice that quire gives the kernel by what it sees of the touches."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import quire
from quire.testing.touches import touch
from quire.testing.waiting import wait_until

SIZE = 64 << 20
# So large that touches far apart meet few pages twice and few beside others, huge as they may be.
SPARSE_SIZE = 16 << 30


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "large.bin"
    with found.open("wb") as file:
        file.write(os.urandom(1 << 20) * (SIZE >> 20))
        os.fsync(file.fileno())
    return found


def kernel_flags(mapping: quire.KernelMapping) -> set[str]:
    """What the kernel says of the range ("VmFlags" in /proc/self/smaps)."""
    text = Path("/proc/self/smaps").read_text()
    part = text.partition(f"\n{mapping.address:x}-")[2]
    return set(part.partition("VmFlags:")[2].partition("\n")[0].split())


def is_random(mapping: quire.KernelMapping) -> bool:
    """Whether the kernel has the range as MADV_RANDOM."""
    return "rr" in kernel_flags(mapping)


class Toucher:
    """Touches a mapping of a sparse file: a walk over what is there, scattered in what is not."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.at = 0
        self.random = np.random.default_rng(7)

    def walk(self) -> None:
        self.array[self.at : self.at + (64 << 10)].sum()
        self.at += 64 << 10

    def scatter(self) -> None:
        for index in self.random.integers(SIZE, SPARSE_SIZE, 4):
            touch(self.array, int(index))


def test_a_walk_ends_random_and_scattered_touches_make_it_so_again(path: Path) -> None:
    os.truncate(path, SPARSE_SIZE)
    with quire.map(path, sharing="shared") as mapping:
        toucher = Toucher(mapping.array)
        assert is_random(mapping)

        def walked() -> bool:
            toucher.walk()
            return not is_random(mapping)

        wait_until(walked, "the kernel is told of the walk")

        def scattered() -> bool:
            toucher.scatter()
            return is_random(mapping)

        wait_until(scattered, "the kernel is told of scattered touches")


def test_what_a_walk_will_touch_is_read_ahead(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with quire.map(path, sharing="shared") as mapping:
        array, at = mapping.array, [0]

        def far_ahead() -> bool:
            array[at[0] : at[0] + (64 << 10)].sum()
            at[0] += 64 << 10
            ahead = mapping.residency()[at[0] // 4096 :]
            return ahead[: (4 << 20) // 4096].count(1) == (4 << 20) // 4096

        wait_until(far_ahead, "4 MiB ahead of the walk are cached")


def test_ahead_of_the_beginning_of_a_walk_is_read_before_it_is_one(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    # 32 pages, too few for a walk, at each MiB.
    pages = iter([start + page for start in range(0, SIZE // 4096, 256) for page in range(32)])
    with quire.map(path, sharing="shared") as mapping:
        array = mapping.array
        assert mapping.residency().count(1) == 0

        def ahead() -> bool:
            page = next(pages)
            touch(array, page * 4096)
            return mapping.residency()[page + 1] == 1

        wait_until(ahead, "the page after the last one touched is cached")
        assert is_random(mapping)


def test_the_programs_own_advice_is_left_alone(path: Path) -> None:
    os.truncate(path, SPARSE_SIZE)
    with quire.map(path, sharing="shared") as mapping, quire.map(path, sharing="shared") as other:
        mapping.advise("sequential")
        touchers = [Toucher(mapping.array), Toucher(other.array)]

        def walked() -> bool:
            for toucher in touchers:
                toucher.walk()
            return not is_random(other)

        def scattered() -> bool:
            for toucher in touchers:
                toucher.scatter()
            return is_random(other)

        wait_until(walked, "the kernel is told of the walk")
        assert "sr" in kernel_flags(mapping)
        wait_until(scattered, "the kernel is told of scattered touches")
        assert "sr" in kernel_flags(mapping)


def test_reading_ahead_ends_where_the_file_was_truncated(path: Path, tmp_path: Path) -> None:
    """Who watches goes on to other mappings: these are told of their touches as before."""
    at = [0]
    with quire.map(path, sharing="shared") as mapping:
        array = mapping.array

        def far_ahead() -> bool:
            array[at[0] : at[0] + (64 << 10)].sum()
            at[0] += 64 << 10
            return at[0] > 8 << 20

        wait_until(far_ahead, "a walk is under way")
        os.truncate(path, at[0] + (4 << 20))
        for start in range(at[0], at[0] + (4 << 20), 64 << 10):
            array[start : start + (64 << 10)].sum()
        other_path = tmp_path / "other.bin"
        with other_path.open("wb") as file:
            file.truncate(SIZE)
        with quire.map(other_path, sharing="shared") as other:
            toucher = Toucher(other.array)

            def walked() -> bool:
                toucher.walk()
                return not is_random(other)

            wait_until(walked, "the kernel is told of the other walk")
