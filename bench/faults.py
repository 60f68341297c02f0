"""Faults on a warm local file, beside the bare floor program: a part of the topic `paging`.

`floor.c` is both sides' stopwatch: its loops touch quire's mappings, through their address, and its
own. Each call has a new mapping, or a new floor process, and touches pages in random order; its
figure is the median touch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import quire
from bench.floor import PAGE_BYTES, Floor, Pages, scattered, worst_median_us
from bench.result import Context, Topic, require
from bench.timing import SETTLE_SECONDS, median, rounds_of, wake_processor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOUCH_COUNT = 5_000
MOVE_EVERY = 50
LARGE_BYTES = 1 << 16
FLOORS = {"uffd": "thread", "inline": "inline"}
THREADED_FAULTS = 15_000


@dataclass(frozen=True)
class Case:
    """One kind of touch; its limits are microseconds and times the floor, None for no promise."""

    name: str
    pmap: str
    limit_us: float
    limit_times: float | None
    granule: int = PAGE_BYTES
    every: int = 0


CASES = [
    Case("4 KiB, uffd", "uffd", 6.0, 1.4),
    Case("4 KiB, uffd, moving", "uffd", 6.0, 1.4, every=MOVE_EVERY),
    Case("4 KiB, inline", "inline", 3.5, 1.3),
    Case("64 KiB, uffd", "uffd", 20.0, None, granule=LARGE_BYTES),
    Case("64 KiB, inline", "inline", 20.0, None, granule=LARGE_BYTES),
]


def measure(topic: Topic, floor: Floor, path: Path, context: Context) -> None:
    """Adds the cost of one fault by pmap, granule and way of touching; then two threads' rate."""
    _check_content(topic, path, context)
    random = np.random.default_rng(context.seed)
    for case in CASES:
        calls = {
            "quire": _quire_touches(floor, path, case, random),
            "floor": _floor_touches(floor, path, case, random),
        }
        times = rounds_of(calls, max(9, context.rounds), context.seed)
        topic.add(times, "µs", 1.0, f"fault of {case.name}")
        cost = median(times["quire"])
        name = f"fault of {case.name}"
        topic.want(name, cost, case.limit_us, at_least=False, unit=" µs")
        if case.limit_times is not None:
            beside = cost / median(times["floor"])
            topic.want(f"{name}: time beside the floor", beside, case.limit_times, at_least=False)
    topic.notes.append(
        f"a moving thread goes to the other CPU after each {MOVE_EVERY} faults; its figure is the "
        "median on the CPU where that is longer"
    )
    _measure_threads(topic, floor, path, context)


def touches(mapping: quire.Mapping, random: Any, count: int, granule: int) -> Pages:
    """Pages of a mapping to touch, which is told that they come in no order."""
    advise = getattr(mapping, "advise", None)
    if advise is not None:
        advise("random")
    pages = mapping.size_bytes // granule * (granule // PAGE_BYTES)
    return scattered(random, pages, min(count, pages * PAGE_BYTES // granule), granule)


def _quire_touches(floor: Floor, path: Path, case: Case, random: Any) -> Callable[[], float]:
    def call() -> float:
        with _mapped(path, case.pmap, case.granule) as mapping:
            order = touches(mapping, random, TOUCH_COUNT, case.granule)
            wake_processor(SETTLE_SECONDS)
            spent = floor.touch(mapping.address, order, case.every)
            _require_faults(mapping, len(order))
        return worst_median_us(spent, case.every)

    return call


def _floor_touches(floor: Floor, path: Path, case: Case, random: Any) -> Callable[[], float]:
    mode = FLOORS[case.pmap]

    def call() -> float:
        seed = int(random.integers(1, 1 << 30))
        wake_processor(SETTLE_SECONDS)
        run = floor.program(mode, path, TOUCH_COUNT, seed, granule=case.granule, every=case.every)
        return worst_median_us(run.spent_ns, case.every)

    return call


def _measure_threads(topic: Topic, floor: Floor, path: Path, context: Context) -> None:
    """Rates of one and of two threads, in thousands of faults a second."""
    random = np.random.default_rng(context.seed)
    calls: dict[str, Callable[[], float]] = {}
    for threads, worded in ((1, "one thread"), (2, "two threads")):
        calls[f"{worded}: quire"] = _quire_rate(floor, path, threads, random)
        calls[f"{worded}: floor"] = _floor_rate(floor, path, threads, random)
    rates = rounds_of(calls, max(9, context.rounds), context.seed)
    topic.add(rates, "thousand a second", 1.0, "4 KiB, inline")
    gain = {
        side: median(rates[f"two threads: {side}"]) / median(rates[f"one thread: {side}"])
        for side in ("quire", "floor")
    }
    topic.want("4 KiB, inline: two threads' rate beside one's", gain["quire"], 1.7, at_least=True)
    topic.notes.append(f"two threads of the floor program do {gain['floor']:.2f} times one's rate")


def _quire_rate(floor: Floor, path: Path, threads: int, random: Any) -> Callable[[], float]:
    def call() -> float:
        with _mapped(path, "inline", PAGE_BYTES) as mapping:
            order = touches(mapping, random, threads * THREADED_FAULTS, PAGE_BYTES)
            wake_processor(SETTLE_SECONDS)
            spent_ns = floor.run_threads(mapping.address, order, threads)
            _require_faults(mapping, len(order))
        return len(order) / spent_ns * 1e6

    return call


def _floor_rate(floor: Floor, path: Path, threads: int, random: Any) -> Callable[[], float]:
    count = min(threads * THREADED_FAULTS, path.stat().st_size // PAGE_BYTES)

    def call() -> float:
        seed = int(random.integers(1, 1 << 30))
        wake_processor(SETTLE_SECONDS)
        run = floor.program("inline", path, count, seed, threads=threads)
        return count / run.elapsed_ns * 1e6

    return call


def _mapped(path: Path, pmap: str, granule: int) -> quire.Mapping:
    budget = 2 * path.stat().st_size
    return quire.open(path, dtype="u1", granule=granule, pmap=pmap, budget=budget)


def _require_faults(mapping: quire.Mapping, touched: int) -> None:
    """Touches that found their page there, by readahead, would make the median a lie."""
    faults = mapping.statistics().faults
    if faults < 0.9 * touched:
        raise RuntimeError(f"{touched} touches were {faults} faults: others found their page there")


def _check_content(topic: Topic, path: Path, context: Context) -> None:
    content = np.fromfile(path, dtype=np.uint8)
    at = np.random.default_rng(context.seed).integers(0, len(content), TOUCH_COUNT)
    for granule in (PAGE_BYTES, LARGE_BYTES):
        for pmap in FLOORS:
            with _mapped(path, pmap, granule) as mapping:
                require(np.array_equal(mapping.array[at], content[at]), f"{pmap}: single bytes")
    topic.checks.append(f"{TOUCH_COUNT:,} bytes are equal to the file's with each pmap and granule")
