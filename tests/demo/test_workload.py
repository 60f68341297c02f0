"""The work is the same whatever the array, and the two ways to compute its answers agree."""

from __future__ import annotations

import subprocess
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from quire.tools.demo import check, independent, workload

if TYPE_CHECKING:
    from pathlib import Path

RANDOM = np.random.default_rng(7)
ARRAYS: dict[str, Any] = {
    "float32": RANDOM.random((300, 64)).astype("f4"),
    "big-endian int16": RANDOM.integers(-99, 99, (300, 40)).astype(">i2"),
    "Fortran float64": np.asfortranarray(RANDOM.random((70, 200))),
    "one dimension": np.arange(30_011, dtype="i4"),
    "three dimensions": RANDOM.random((50, 3, 4)).astype("c8"),
    "half": RANDOM.random((40, 5)).astype("f2"),
    "bool": RANDOM.random((100, 9)) > 0.5,
    "few": np.arange(3.0),
}
WORK = workload.Work(seed=3, lookup_count=200, hot_bytes=2048, query_count=2, digest=False)


def no_step(name: str, done: int, total: int) -> None:
    """Nobody watches."""


def described(array: Any) -> dict[str, Any]:
    """What the measured process says of an array."""
    order = "C" if array.flags.c_contiguous else "F"
    return {"shape": list(array.shape), "dtype": array.dtype.str, "order": order, "bytes": 0}


def checked(folder: Path, array: Any, source: Path) -> list[check.Check]:
    """Work on `array`, work on the plain stream of `source`, and the comparison."""
    outcome = workload.run(array, WORK, folder, "quire", no_step)
    ours = {"outcome": asdict(outcome), "array": described(array)}
    plain = independent.compute(str(source), described(array), WORK, folder, no_step)
    return check.compare(folder, ours, plain)


@pytest.mark.parametrize("name", ARRAYS)
def test_a_plain_reading_gives_the_same_answers(name: str, tmp_path: Path) -> None:
    source = tmp_path / "array.npy"
    np.save(source, ARRAYS[name])
    checks = checked(tmp_path, ARRAYS[name], source)
    assert {one.name for one in checks} >= {"look-ups", "hot look-ups", "queries"}
    assert all(one.passed for one in checks), checks


def test_a_compressed_file_is_decompressed_without_quire(tmp_path: Path) -> None:
    source = tmp_path / "array.npy"
    np.save(source, ARRAYS["float32"])
    subprocess.run(["zstd", "-q", source], check=True)
    checks = checked(tmp_path, ARRAYS["float32"], source.with_suffix(".npy.zst"))
    assert all(one.passed for one in checks), checks


@pytest.mark.parametrize("row", [0, 150, 299])
def test_one_wrong_row_is_found(row: int, tmp_path: Path) -> None:
    source = tmp_path / "array.npy"
    right = ARRAYS["float32"]
    np.save(source, right)
    wrong = right.copy()
    wrong[row] += 1
    failed = [one for one in checked(tmp_path, wrong, source) if not one.passed]
    assert any(one.name.startswith("scores") for one in failed)


def test_a_source_that_ends_early_is_told(tmp_path: Path) -> None:
    source = tmp_path / "array.npy"
    np.save(source, ARRAYS["float32"])
    outcome = workload.run(ARRAYS["float32"], WORK, tmp_path, "quire", no_step)
    assert outcome.rows == 300
    source.write_bytes(source.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="ended 4 rows too early"):
        independent.compute(str(source), described(ARRAYS["float32"]), WORK, tmp_path, no_step)


@pytest.mark.parametrize(
    ("array", "words"),
    [(np.zeros(4, "U3"), "not numbers"), (np.zeros((0, 3)), "no elements")],
)
def test_arrays_without_work_are_refused(array: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        workload.row_view(array)


def test_rows_are_views() -> None:
    for array in ARRAYS.values():
        assert np.shares_memory(workload.row_view(array), array)


def test_wide_rows_are_cut() -> None:
    assert workload.row_shape((3, 1 << 20), "f8") == (3 << 11, 512)
