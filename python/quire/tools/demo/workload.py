"""The work of the demonstration, the same code for quire's array and for plain numpy's.

Scans multiply the whole array by one row (`x @ q`), look-ups read single rows at random, hot
look-ups read rows of one small window again after they have been read once. Every answer is kept
in a file, so that `check.py` can compare two runs number by number.
"""

from __future__ import annotations

import hashlib
import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pathlib import Path

NEAREST_COUNT = 3
BLOCK_BYTES = 1 << 20
FLAT_ROW_BYTES = 4096
BLAS_KINDS = frozenset({"f4", "f8", "c8", "c16"})

Rows = npt.NDArray[Any]
Step = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Work:
    """What to do; sizes in bytes.

    `queries` names a `.npy` file of rows to look for; without it, rows of the array itself are.
    """

    seed: int
    lookup_count: int
    hot_bytes: int
    query_count: int = 1
    queries: str | None = None
    digest: bool = True


@dataclass(frozen=True)
class Timed:
    """One kind of work: seconds in all, and microseconds of the single calls."""

    count: int
    seconds: float
    us_p50: float
    us_p99: float


@dataclass(frozen=True)
class Outcome:
    """Answers and times of one run. Row numbers and scores of the nearest rows by query."""

    rows: int
    row_bytes: int
    scan: Timed
    lookup: Timed
    hot: Timed
    nearest_rows: list[list[int]]
    nearest_scores: list[list[float]]
    digest: str | None
    digest_seconds: float
    phases: list[tuple[str, float, float]] = field(default_factory=list)


def row_shape(shape: tuple[int, ...], dtype: npt.DTypeLike) -> tuple[int, int]:
    """How many rows an array of this shape in C order is seen as, and how many columns.

    An array of one dimension, or one whose rows are larger than 1 MiB, becomes rows of 4 KiB;
    the rest that fills no row is left out.

    Raises `ValueError` for arrays without numbers or without elements.

    >>> row_shape((6, 5, 2), "f4")
    (6, 10)
    >>> row_shape((5000,), "u1")
    (1, 4096)
    """
    kind = np.dtype(dtype)
    if kind.kind not in "biufc":
        raise ValueError(f"the array holds {kind}, not numbers: choose an array of numbers")
    size = math.prod(shape)
    if size == 0:
        raise ValueError(f"the array of shape {shape} has no elements: there is no work to do")
    if len(shape) >= 2 and size // shape[0] * kind.itemsize <= BLOCK_BYTES:
        return shape[0], size // shape[0]
    width = min(max(1, FLAT_ROW_BYTES // kind.itemsize), size)
    return size // width, width


def row_view(array: npt.NDArray[Any]) -> Rows:
    """The array as rows without a copy, as `row_shape` says; Fortran order as its transpose."""
    array = array if array.flags.c_contiguous else array.T
    rows, width = row_shape(array.shape, array.dtype)
    return array.reshape(-1)[: rows * width].reshape(rows, width)


def scores_of(rows: Rows, query: Rows) -> Rows:
    """`rows @ query`: in one call where numpy copies no rows for it, else by blocks of 1 MiB."""
    wide = computing_type(rows.dtype)
    with np.errstate(all="ignore"):
        if wide == rows.dtype:
            return np.asarray(rows @ query)
        step = max(1, BLOCK_BYTES // (rows.shape[1] * wide.itemsize))
        scores = np.empty(len(rows), dtype=wide)
        for first in range(0, len(rows), step):
            scores[first : first + step] = rows[first : first + step].astype(wide) @ query
        return scores


def computing_type(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """The type in which `scores_of` computes for rows of `dtype`.

    >>> computing_type("f4"), computing_type(">i2")
    (dtype('float32'), dtype('float64'))
    """
    kind = np.dtype(dtype)
    if kind.isnative and kind.str[1:] in BLAS_KINDS:
        return kind
    return np.dtype(np.complex128 if kind.kind == "c" else np.float64)


def query_indexes(row_count: int, work: Work) -> npt.NDArray[np.int64]:
    """The rows of the array itself that are looked for when `work` names no queries."""
    return np.random.default_rng(work.seed).integers(0, row_count, work.query_count)


def query_rows(rows: Rows, work: Work) -> Rows:
    """What to look for, shape (queries, columns), in the type that `scores_of` computes in."""
    if work.queries is not None:
        return np.asarray(np.load(work.queries))
    chosen = query_indexes(len(rows), work)
    return np.stack([rows[index] for index in chosen]).astype(computing_type(rows.dtype))


def lookup_indexes(row_count: int, row_bytes: int, work: Work) -> tuple[Any, Any]:
    """Row numbers of the look-ups anywhere, and of those in one window of `hot_bytes`."""
    random = np.random.default_rng(work.seed + 1)
    anywhere = random.integers(0, row_count, work.lookup_count)
    window = max(1, min(row_count, work.hot_bytes // row_bytes))
    first = int(random.integers(0, row_count - window + 1))
    return anywhere, random.integers(first, first + window, work.lookup_count)


def run(array: npt.NDArray[Any], work: Work, folder: Path, name: str, step: Step) -> Outcome:
    """Does the work on `array`; keeps scores and row checksums in `folder` as `NAME-*.npy`."""
    rows = row_view(array)
    phases: list[tuple[str, float, float]] = []
    began = time.monotonic()

    queries = query_rows(rows, work)
    np.save(folder / f"{name}-queries.npy", queries)
    scan_us, found = [], []
    for number, query in enumerate(queries):
        step("scan", number, len(queries))
        start = time.perf_counter()
        scores = scores_of(rows, query)
        scan_us.append((time.perf_counter() - start) * 1e6)
        np.save(folder / f"{name}-scores-{number}.npy", scores)
        found.append(nearest(scores))
    step("scan", len(queries), len(queries))
    phases.append((f"{len(queries)} scans: x @ q", began, time.monotonic()))

    anywhere, window = lookup_indexes(len(rows), rows.strides[0], work)
    began = time.monotonic()
    lookup_us, sums = look_up(rows, anywhere, "look-up", step)
    np.save(folder / f"{name}-rows.npy", sums)
    phases.append(("look-ups", began, time.monotonic()))

    began = time.monotonic()
    look_up(rows, window, "warm-up", step)
    hot_us, sums = look_up(rows, window, "hot look-up", step)
    np.save(folder / f"{name}-hot.npy", sums)
    phases.append(("hot look-ups", began, time.monotonic()))

    digest, began = None, time.monotonic()
    if work.digest:
        step("checksum", 0, 1)
        digest = hashlib.blake2b(rows.reshape(-1).data).hexdigest()
        step("checksum", 1, 1)
        phases.append(("checksum", began, time.monotonic()))
    return Outcome(
        rows=len(rows),
        row_bytes=rows.strides[0],
        scan=_timed(np.array(scan_us)),
        lookup=_timed(lookup_us),
        hot=_timed(hot_us),
        nearest_rows=[indexes for indexes, _ in found],
        nearest_scores=[best for _, best in found],
        digest=digest,
        digest_seconds=time.monotonic() - began,
        phases=phases,
    )


def look_up(rows: Rows, indexes: Any, name: str, step: Step) -> tuple[Any, Any]:
    """Reads single rows: the microseconds of each, and the CRC-32 of each row's bytes."""
    count = len(indexes)
    spent, sums = np.empty(count), np.empty(count, dtype=np.uint32)
    clock, checksum = time.perf_counter_ns, zlib.crc32
    for number, index in enumerate(indexes.tolist()):
        if number % 500 == 0:
            step(name, number, count)
        start = clock()
        sums[number] = checksum(rows[index])
        spent[number] = clock() - start
    step(name, count, count)
    return spent / 1e3, sums


def nearest(scores: Rows) -> tuple[list[int], list[float]]:
    """Numbers and scores of the rows with the highest scores, best first, ties by number.

    >>> nearest(np.array([0.5, 1.0, float("nan"), 1.0]))
    ([1, 3, 0], [1.0, 1.0, 0.5])
    """
    real = np.abs(scores) if scores.dtype.kind == "c" else scores
    real = np.where(np.isnan(real), -np.inf, real)
    count = min(NEAREST_COUNT, len(real))
    floor = np.partition(real, len(real) - count)[len(real) - count]
    candidates = np.flatnonzero(real >= floor)
    best = candidates[np.argsort(-real[candidates], kind="stable")][:count]
    return best.tolist(), real[best].tolist()


def _timed(spent_us: npt.NDArray[np.float64]) -> Timed:
    return Timed(
        count=len(spent_us),
        seconds=float(spent_us.sum()) / 1e6,
        us_p50=float(np.percentile(spent_us, 50)) if len(spent_us) else 0.0,
        us_p99=float(np.percentile(spent_us, 99)) if len(spent_us) else 0.0,
    )
