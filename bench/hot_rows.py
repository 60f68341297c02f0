"""Rows of a mapping whose pages are resident, beside numpy.memmap of the same plain file.

The memmap is used through a plain ndarray view: indexing the `numpy.memmap` class itself costs
more than half a microsecond a row, which would flatter quire.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import quire
from bench import data
from bench.result import Context, Topic, ratio, require, topic_main
from bench.timing import pretouch, rounds_of, seconds, wake_processor

if TYPE_CHECKING:
    from collections.abc import Callable

ROW_COUNT = 20_000


def run(context: Context) -> Topic:
    """Random rows one by one, random rows in one call, and the sum of everything."""
    topic = Topic("hot rows")
    path = data.plain_path(Path(context.data))
    pretouch(3 * path.stat().st_size)
    memmap = np.asarray(np.load(path, mmap_mode="r"))
    random = np.random.default_rng(context.seed)
    chosen = random.integers(0, len(memmap), ROW_COUNT)
    with quire.open(path, budget=2 * path.stat().st_size) as mapping:
        sides = {"quire": mapping.array, "np.memmap": memmap}
        sums = {name: float(rows.sum()) for name, rows in sides.items()}
        require(sums["quire"] == sums["np.memmap"], f"the sums {sums}")
        require(np.array_equal(sides["quire"][chosen], memmap[chosen]), "random rows")
        topic.checks.append(f"{ROW_COUNT:,} rows and the sum are equal")
        wake_processor()
        out = np.empty((1024, memmap.shape[1]), dtype=memmap.dtype)
        works: dict[str, Callable[[Any], None]] = {
            "row by row": lambda rows: _one_by_one(rows, chosen, out),
            "rows gathered": lambda rows: _gathered(rows, chosen, out),
            "sum": lambda rows: rows.sum(),
        }
        for what, work in works.items():
            calls = {name: _timed(work, rows) for name, rows in sides.items()}
            times = rounds_of(calls, 3 * context.rounds, context.seed)
            scale = 1e3 if what == "sum" else 1e6 / ROW_COUNT
            topic.add(times, "ms" if what == "sum" else "µs a row", scale, what)
            measured = ratio(times, "quire", "np.memmap")
            topic.want(f"hot {what}: time beside np.memmap", measured, 1.1, at_least=False)
        topic.notes.append(f"pmap {mapping.pmap}, granule {mapping.granule_bytes} bytes")
    return topic


def _timed(work: Callable[[Any], None], rows: Any) -> Callable[[], float]:
    return lambda: seconds(lambda: work(rows))


def _one_by_one(rows: Any, chosen: Any, out: Any) -> None:
    target = out[0]
    for index in chosen.tolist():
        target[:] = rows[index]


def _gathered(rows: Any, chosen: Any, out: Any) -> None:
    for first in range(0, len(chosen) - len(out), len(out)):
        np.take(rows, chosen[first : first + len(out)], axis=0, out=out, mode="clip")


if __name__ == "__main__":
    topic_main(run)
