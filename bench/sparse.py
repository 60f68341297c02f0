"""A file of 1 TiB that holds nothing: what a mapping costs by its size (of the topic `paging`).

As a program, `python -m bench.sparse PATH OUT HOW PAGES SEED` maps PATH in a fresh process and
prints, as JSON, how long opening took and what the process grew by, then what it grew by beyond the
resident pages after PAGES touches, HOW "together" (in random order, no page between them left out)
or "scattered" over all of the file. OUT holds the compiled loops.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import quire
from bench.faults import FLOORS, touches
from bench.floor import PAGE_BYTES, Floor, Pages, scattered
from bench.result import Context, Topic, require
from bench.timing import SETTLE_SECONDS, median, rounds_of, wake_processor

if TYPE_CHECKING:
    from collections.abc import Callable

GIB = 1 << 30
MIB = 1 << 20
SIZES = {"1 GiB": GIB, "32 GiB": 32 * GIB, "1 TiB": 1024 * GIB}
LARGEST = "1 TiB"
TOUCHED_PAGES = 1 << 16
BUDGET_BYTES = GIB
TOUCH_COUNT = 4_000
HOWS = ("together", "scattered")
# What a fault in 1 TiB may take beside one in 1 GiB.
FLAT_TIMES = 1.2


def measure(topic: Topic, floor: Floor, context: Context) -> None:
    """Adds opening and metadata of 1 TiB, and the cost of a fault by the size of the mapping."""
    with tempfile.TemporaryDirectory(prefix="sparse-", dir=context.out) as folder:
        paths = {name: Path(folder, name.replace(" ", "")) for name in SIZES}
        for name, path in paths.items():
            path.touch()
            os.truncate(path, SIZES[name])
        _measure_growth(topic, paths[LARGEST], context)
        for pmap in FLOORS:
            _measure_flatness(topic, floor, paths, pmap, context)


def _measure_growth(topic: Topic, path: Path, context: Context) -> None:
    found: dict[str, list[dict[str, float]]] = {how: [] for how in HOWS}
    for turn in range(max(5, context.rounds)):
        for how in HOWS if turn % 2 else HOWS[::-1]:
            argv = [sys.executable, "-m", "bench.sparse", str(path), context.out, how]
            argv += [str(TOUCHED_PAGES), str(context.seed + turn)]
            said = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[how].append(json.loads(said))
    opened = [one for runs in found.values() for one in runs]
    for name, unit, limit in (("open_ms", "ms", 10.0), ("open_mib", "MiB", 8.0)):
        values = [one[name] for one in opened]
        what = f"{LARGEST} opened: " + {"ms": "time", "MiB": "growth"}[unit]
        topic.add({"quire": values}, unit, 1.0, what)
        topic.want(what, median(values), limit, at_least=False, unit=f" {unit}")
    for how, runs in found.items():
        values = [one["bytes_a_page"] for one in runs]
        what = f"{LARGEST}, {TOUCHED_PAGES >> 10} Ki pages {how}: metadata a page"
        topic.add({"quire": values}, "bytes", 1.0, what)
        topic.want(what, median(values), 16.0, at_least=False, unit=" bytes")
    tables = {how: median([one["table_mib"] for one in runs]) for how, runs in found.items()}
    worded = ", ".join(f"{size:.1f} MiB {how}" for how, size in tables.items())
    topic.notes.append(f"the kernel's own page tables, not counted as metadata, grew by {worded}")


def _measure_flatness(
    topic: Topic, floor: Floor, paths: dict[str, Path], pmap: str, context: Context
) -> None:
    """Faults in 1 GiB in the middle of each mapping, and scattered over all of it.

    Scattered, the kernel makes a page table for nearly each touch: the floor shows its share.
    """
    random = np.random.default_rng(context.seed)
    with ExitStack() as files:
        calls: dict[str, Callable[[], float]] = {}
        for name, path in paths.items():
            file = files.enter_context(path.open("rb"))
            for spread in ("in 1 GiB of", "over"):
                is_window = spread == "in 1 GiB of"
                call = _faults(floor, path, file.fileno(), pmap, is_window, random)
                calls[f"{spread} {name}: quire"] = call
            calls[f"over {name}: floor"] = _floor_faults(floor, path, pmap, random)
        times = rounds_of(calls, max(5, context.rounds), context.seed)
    topic.add(times, "µs", 1.0, f"fault, {pmap}")
    for spread in ("in 1 GiB of", "over"):
        growth = _growth(times, spread, "quire")
        name = f"fault, {pmap}, {spread} {LARGEST}: time beside 1 GiB"
        topic.want(name, growth, FLAT_TIMES, at_least=False)
    topic.notes.append(
        f"{pmap}: the floor's fault over {LARGEST} takes {_growth(times, 'over', 'floor'):.2f} "
        "times that over 1 GiB, for the kernel's page tables"
    )


def _growth(times: dict[str, list[float]], spread: str, side: str) -> float:
    small, *_, large = (median(times[f"{spread} {name}: {side}"]) for name in SIZES)
    return large / small


def _faults(
    floor: Floor, path: Path, file: int, pmap: str, is_window: bool, random: Any
) -> Callable[[], float]:
    """The median fault; the pages are in the kernel's cache."""

    def call() -> float:
        with _mapped(path, pmap) as mapping:
            pages = touches(mapping, random, TOUCH_COUNT, PAGE_BYTES)
            if is_window:
                middle = (mapping.size_bytes - GIB) // 2 // PAGE_BYTES
                pages = scattered(random, GIB // PAGE_BYTES, TOUCH_COUNT) + np.uint64(middle)
            for page in pages.tolist():
                os.pread(file, 1, page * PAGE_BYTES)
            wake_processor(SETTLE_SECONDS)
            spent = floor.touch(mapping.address, pages)
            _require_zeros(mapping, pages)
        return float(np.median(spent)) / 1e3

    return call


def _floor_faults(floor: Floor, path: Path, pmap: str, random: Any) -> Callable[[], float]:
    """The same with the floor program, run twice over the same pages: the first reads the file."""

    def call() -> float:
        seed = int(random.integers(1, 1 << 30))
        floor.program(FLOORS[pmap], path, TOUCH_COUNT, seed)
        wake_processor(SETTLE_SECONDS)
        run = floor.program(FLOORS[pmap], path, TOUCH_COUNT, seed)
        return float(np.median(run.spent_ns)) / 1e3

    return call


def _mapped(path: Path, pmap: str | None = None) -> quire.Mapping:
    return quire.open(path, dtype="u1", granule=PAGE_BYTES, pmap=pmap, budget=BUDGET_BYTES)


def _require_zeros(mapping: quire.Mapping, pages: Pages) -> None:
    require(not mapping.array[pages * np.uint64(PAGE_BYTES)].any(), "bytes of an empty file")


def _resident_bytes() -> int:
    """What is resident, by a walk of the page tables: VmRSS lags behind."""
    return _kib_of(Path("/proc/self/smaps_rollup"), "Rss:") << 10


def _kib_of(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise RuntimeError(f"{path} has no line {name!r}")


def _child(path: Path, out: Path, how: str, count: int, seed: int) -> dict[str, float]:
    """What `measure` wants of one fresh process; everything else in it has happened before."""
    random, floor = np.random.default_rng(seed), Floor(out, build=False)
    small = _mapped(path.with_name("1GiB"))
    floor.run_threads(small.address, scattered(random, GIB // PAGE_BYTES, 100), 1)
    small.close()
    before = _resident_bytes()
    began = time.perf_counter()
    with _mapped(path) as mapping:
        open_s = time.perf_counter() - began
        opened = _resident_bytes()
        pages = touches(mapping, random, count, PAGE_BYTES)
        if how == "together":
            pages = (random.permutation(count) + GIB // PAGE_BYTES).astype(np.uint64)
        floor.run_threads(mapping.address, pages[:1], 1)
        start = _sizes(mapping)
        floor.run_threads(mapping.address, pages, 1)
        end = _sizes(mapping)
        _require_zeros(mapping, pages[:1000])
    grown, held, tables = (after - first for after, first in zip(end, start, strict=True))
    return {
        "open_ms": open_s * 1e3,
        "open_mib": (opened - before) / MIB,
        "bytes_a_page": (grown - held) / (held / PAGE_BYTES),
        "table_mib": tables / MIB,
    }


def _sizes(mapping: quire.Mapping) -> tuple[int, int, int]:
    """Bytes resident in the process, resident in the mapping, and of the kernel's page tables."""
    tables = _kib_of(Path("/proc/self/status"), "VmPTE:") << 10
    return _resident_bytes(), mapping.statistics().resident_bytes, tables


if __name__ == "__main__":
    given, built, chosen, *numbers = sys.argv[1:]
    print(json.dumps(_child(Path(given), Path(built), chosen, *map(int, numbers))))
