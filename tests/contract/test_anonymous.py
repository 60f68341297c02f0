"""Anonymous memory and private mappings: larger than their budget, swapped, never in the source."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import quire
from quire.testing import children
from quire.testing.content import new_seed

COUNT = 1 << 20  # 8 MiB of int64
BUDGET = "2 MiB"
SWAPS = {
    "plain": quire.Swap(),
    "lz4": quire.Swap(compression="lz4"),
    "zstd, encrypted": quire.Swap(compression="zstd", encrypt=True),
    "encrypted": quire.Swap(encrypt=True),
}


def numbers() -> np.ndarray:
    """Eight mebibytes that compress somewhat."""
    return np.random.default_rng(new_seed()).integers(0, 1 << 40, COUNT)


def swap_files() -> list[str]:
    """Files without a name that this process has open."""
    links = list(Path("/proc/self/fd").iterdir())
    return [os.readlink(link) for link in links if os.path.lexists(link)]  # noqa: PTH115


@pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)
def test_work_in_place_on_four_times_the_budget(pmap: str, swap: quire.Swap) -> None:
    values = numbers()
    budget = "2 MiB" if swap.compression != "zstd" else "8 MiB"  # zstd keeps workspaces
    array = quire.empty(COUNT, "i8", budget=budget, granule="16 KiB", pmap=pmap, swap=swap)
    assert type(array) is np.ndarray
    assert not array.any()
    array[:] = values
    assert np.array_equal(array, values)
    array.sort()
    values.sort()
    assert np.array_equal(array, values)
    np.cumsum(array, out=array)
    np.cumsum(values, out=values)
    assert np.array_equal(array, values)
    statistics = quire.mapping_of(array).statistics()
    assert statistics.peak_resident_bytes <= statistics.budget_bytes
    if budget == BUDGET:
        assert statistics.swapped_in_bytes > 0
        assert 0 < statistics.swap_bytes <= statistics.swap_limit_bytes


def test_a_matrix_product(pmap: str) -> None:
    rng = np.random.default_rng(new_seed())
    left, right = rng.random((600, 500)), rng.random((500, 700))
    arrays = [
        quire.empty(shape, budget="1 MiB", granule="16 KiB", pmap=pmap)
        for shape in ((600, 500), (500, 700), (600, 700))
    ]
    arrays[0][:], arrays[1][:] = left, right
    np.matmul(arrays[0], arrays[1], out=arrays[2])
    assert np.allclose(arrays[2], left @ right)


def test_reading_writes_nothing(pmap: str) -> None:
    with quire.anonymous("8 MiB", budget=BUDGET, granule="16 KiB", pmap=pmap) as mapping:
        array = mapping.array
        assert array[::4096].sum() == 0
        assert mapping.statistics().written_bytes == 0
        assert mapping.statistics().swap_bytes == 0
        array[:] = 1
        assert int(array.sum()) == 8 << 20
        mapping.evict()
        before = mapping.statistics().written_bytes
        assert int(array.sum()) == 8 << 20
        mapping.evict()
        assert mapping.statistics().written_bytes == before
        del array


def test_swap_that_is_full_is_told_and_passes(pmap: str) -> None:
    """The array is whole; once room was made by hand, work goes on."""
    swap = quire.Swap(limit="1 MiB")
    array = quire.empty(COUNT, "i8", budget=BUDGET, granule="16 KiB", pmap=pmap, swap=swap)

    def write_all() -> None:
        for start in range(0, COUNT, 4096):
            array[start : start + 4096] = np.arange(start, start + 4096)

    with pytest.raises(quire.SwapFullError, match="limit"):
        write_all()
    mapping = quire.mapping_of(array)
    assert mapping.failed is None
    mapping.set_budget("16 MiB")
    assert np.array_equal(array[:4096], np.arange(4096))
    write_all()
    assert np.array_equal(array, np.arange(COUNT))


@pytest.mark.parametrize("granule", ["4 KiB", "64 KiB"])
def test_private_changes_stay_private(pmap: str, tmp_path: Path, granule: str) -> None:
    values = numbers()
    path = tmp_path / "values.npy"
    np.save(path, values)
    with quire.open(path, mode="c", budget=BUDGET, granule=granule, pmap=pmap) as mapping:
        array = mapping.array
        array[::3] += 1
        expected = values.copy()
        expected[::3] += 1
        assert np.array_equal(array, expected)
        mapping.sync()
        mapping.flush()
        del array
    assert np.array_equal(np.load(path), values)


def test_private_changes_of_what_cannot_be_written(pmap: str, tmp_path: Path) -> None:
    values = numbers()
    np.save(tmp_path / "values.npy", values)
    quire.pack(tmp_path / "values.npy", tmp_path / "values.npy.zst", frame="64 KiB")
    path = tmp_path / "values.npy.zst"
    with quire.open(path, mode="c", budget="4 MiB", pmap=pmap) as mapping:
        array = mapping.array
        array[:] = array[::-1].copy()
        assert np.array_equal(array, values[::-1])
        del array
    with pytest.raises(quire.ModeError, match="compressed, with zstd"):
        quire.open(path, mode="r+", pmap=pmap)


def test_threads_lose_nothing(pmap: str) -> None:
    array = quire.empty(COUNT, "i8", budget="1 MiB", granule="4 KiB", pmap=pmap)

    def increment(number: int) -> None:
        for _ in range(3):
            array[number::4] += 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(increment, range(4)))
    assert (array == 3).all()


def test_the_swap_file_has_no_name_and_goes(pmap: str, tmp_path: Path) -> None:
    swap = quire.Swap(folder=tmp_path)
    mapping = quire.anonymous("4 MiB", budget=BUDGET, pmap=pmap, swap=swap)
    assert list(tmp_path.iterdir()) == []
    assert any(str(tmp_path) in name for name in swap_files())
    mapping.array[:] = 1
    mapping.close()  # gives the space back; the descriptor goes with the object
    del mapping
    assert not any(str(tmp_path) in name for name in swap_files())
    with pytest.raises(quire.Error, match="swap"):
        quire.anonymous("4 MiB", pmap=pmap, swap=quire.Swap(folder=tmp_path / "missing"))


def test_a_child_does_not_inherit(pmap: str) -> None:
    array = quire.empty(COUNT, "i8", budget=BUDGET, pmap=pmap)
    array[:] = 7

    def touch() -> None:
        with pytest.raises(quire.PageIOError, match=r"not inherited.*make them in the child"):
            np.array_equal(array, array)

    assert children.in_fork(touch) == ""
    assert (array == 7).all()


def test_shapes_and_what_is_no_mapping() -> None:
    array = quire.empty((3, 5), "f4", "F", budget="1 MiB")
    assert (array.shape, array.dtype, array.flags.f_contiguous) == ((3, 5), np.dtype("f4"), True)
    assert quire.mapping_of(array[1:, ::2]) is quire.mapping_of(array)
    with pytest.raises(ValueError, match="no view of a quire mapping"):
        quire.mapping_of(np.zeros(3))
    with pytest.raises(ValueError, match="at least 0"):
        quire.empty((-1, 4))
    with pytest.raises(ValueError, match="no compression"):
        quire.anonymous("1 MiB", swap=quire.Swap(compression="lzma"))  # type: ignore[arg-type]
