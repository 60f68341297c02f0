"""Huge pages of a pool that the tests reserve and give back."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import numpy as np
import pytest

import quire
from quire import MapFlag
from quire.testing import children
from quire.testing.huge_pages import HUGE_BYTES as HUGE
from quire.testing.huge_pages import POOL, available, counted, pool_of
from quire.testing.touches import touch

PAGES = 8


@pytest.fixture
def pool() -> Iterator[None]:
    """Eight huge pages of 2 MiB."""
    with pool_of(PAGES):
        yield


def touch_pages(array: np.ndarray, count: int) -> None:
    for page in range(count):
        touch(array, page * HUGE, 1)


def free_pages() -> int:
    return counted("free")


@pytest.mark.parametrize("sharing", ["private", "shared"])
def test_anonymous_huge_pages(pool: None, sharing: str) -> None:
    flags = MapFlag.HUGETLB | MapFlag.HUGE_2MB
    before = free_pages()
    with quire.map(size=3 * HUGE - 5, sharing=sharing, flags=flags) as mapping:
        assert mapping.granule_bytes == HUGE
        assert mapping.address % HUGE == 0
        mapping.array[:] = 3
        assert before - free_pages() == 3
        assert int(mapping.array[::4096].sum()) == 3 * len(mapping.array[::4096])
        mapping.advise("dontneed" if sharing == "private" else "remove", np.s_[HUGE - 1 : 2 * HUGE])
        assert not mapping.array[HUGE : 2 * HUGE].any()
        assert mapping.array[HUGE - 1] == 3
        with pytest.raises((quire.Error, BufferError)):
            mapping.resize(PAGES * HUGE)
    assert free_pages() == before


def test_huge_pages_grow_in_room_that_was_kept(pool: None) -> None:
    flags = MapFlag.HUGETLB
    with quire.map(size=HUGE, sharing="private", flags=flags, reserve=4 * HUGE) as mapping:
        array = mapping.array
        array[:] = 1
        mapping.resize(3 * HUGE)
        assert int(mapping.array.sum()) == HUGE
        mapping.array[-1] = 1
        assert array[0] == 1


def test_a_pool_that_is_too_small_is_named(pool: None) -> None:
    with pytest.raises(quire.Error, match=r"pool of huge pages of 2\.0 MiB has") as caught:
        quire.map(size=(PAGES + 500) * HUGE, sharing="private", flags=MapFlag.HUGETLB)
    assert "nr_hugepages" in str(caught.value)


def test_a_page_that_the_pool_has_not_is_an_exception(pool: None) -> None:
    """Not reserved (NORESERVE), so that only the touch finds the pool empty."""
    children.run(child_empties_the_pool).check()


def child_empties_the_pool() -> None:
    flags = MapFlag.HUGETLB | MapFlag.NORESERVE
    free = available()
    mapping = quire.map(size=(free + 2) * HUGE, sharing="private", flags=flags)
    array = mapping.array
    with pytest.raises(quire.PageIOError, match="nr_hugepages") as caught:
        touch_pages(array, free + 2)
    assert caught.value.offset == free * HUGE
    mapping.advise("dontneed", np.s_[:HUGE])
    array[free * HUGE] = 5
    assert array[free * HUGE] == 5
    assert mapping.failed is None


def test_a_file_of_hugetlbfs(pool: None) -> None:
    descriptor = os.memfd_create("huge", 4 | 21 << 26)  # MFD_HUGETLB | MFD_HUGE_2MB
    try:
        os.ftruncate(descriptor, 2 * HUGE)
        with quire.map(descriptor, sharing="shared", protection="rw", offset=HUGE + 77) as mapping:
            mapping.array[0] = 9
            assert mapping.granule_bytes == HUGE
        with quire.map(descriptor, sharing="shared") as whole:
            assert whole.array[HUGE + 77] == 9
            os.ftruncate(descriptor, HUGE)
            with pytest.raises(quire.TruncatedError):
                touch(whole.array, HUGE)
    finally:
        os.close(descriptor)


def test_pages_of_one_gibibyte() -> None:
    """Mapped where the machine has one free; else refused with the reason."""
    flags = MapFlag.HUGETLB | MapFlag.HUGE_1GB
    pool = POOL.with_name("hugepages-1048576kB")
    count = pool / "nr_hugepages"
    before = count.read_text() if pool.is_dir() else None
    if before is not None:
        count.write_text(str(int(before) + 1))
    try:
        if before is not None and int(count.read_text()) > int(before):
            with quire.map(size=1 << 30, sharing="private", flags=flags) as mapping:
                assert mapping.granule_bytes == 1 << 30
                mapping.array[:: mmap.PAGESIZE] = 1
        else:
            with pytest.raises(quire.Error, match=r"huge pages of 1\.0 GiB"):
                quire.map(size=1 << 30, sharing="private", flags=flags)
    finally:
        if before is not None:
            count.write_text(before)


if __name__ == "__main__":
    children.main()
