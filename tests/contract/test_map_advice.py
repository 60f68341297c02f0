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


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "large.bin"
    with found.open("wb") as file:
        file.write(os.urandom(1 << 20) * (SIZE >> 20))
        os.fsync(file.fileno())
    return found


def is_random(mapping: quire.KernelMapping) -> bool:
    """Whether the kernel has the range as MADV_RANDOM ("rr" in /proc/self/smaps)."""
    text = Path("/proc/self/smaps").read_text()
    part = text.partition(f"\n{mapping.address:x}-")[2]
    flags = part.partition("VmFlags:")[2].partition("\n")[0]
    return "rr" in flags.split()


def touch_scattered(array: np.ndarray, seed: int) -> None:
    for index in np.random.default_rng(seed).integers(0, len(array), 4):
        touch(array, int(index))


def test_a_walk_ends_random_and_scattered_touches_make_it_so_again(path: Path) -> None:
    with quire.map(path, sharing="shared") as mapping:
        array, seeds, at = mapping.array, iter(range(1000)), [SIZE // 2]
        assert is_random(mapping)

        def walked() -> bool:
            array[at[0] : at[0] + (64 << 10)].sum()
            at[0] += 64 << 10
            return not is_random(mapping)

        wait_until(walked, "the kernel is told of the walk")

        def scattered() -> bool:
            touch_scattered(array[: SIZE // 2], next(seeds))
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


def test_the_programs_own_advice_is_left_alone(path: Path) -> None:
    with quire.map(path, sharing="shared") as mapping:
        mapping.advise("sequential")
        other = quire.map(path, sharing="shared")
        for seed in range(1000):
            touch_scattered(mapping.array, seed)
            touch_scattered(other.array, seed)
            if is_random(other):
                break
        assert is_random(other)
        assert not is_random(mapping)
        other.close()


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
            seeds = iter(range(1000))

            def scattered() -> bool:
                touch_scattered(other.array, next(seeds))
                return is_random(other)

            wait_until(scattered, "the kernel is told of scattered touches")
