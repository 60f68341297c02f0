"""Random 8-byte writes into four times the memory that may be resident, and making them durable.

The writes are increments by a compiled loop (`floor.c`) whose threads never share a word; or
assignments by numpy's fancy indexing. Nothing may be lost: afterwards every word of the array, and
of the file, holds just what was written to it. Beside one thread's writes stands the floor
program (`floor_writes.c`), the same work with nothing around it: what this machine can do at all.
The kernel's own mapping is there for information: nothing bounds what it keeps.
"""

from __future__ import annotations

import faulthandler
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import quire
from bench import data
from bench.floor import PAGE_BYTES, Floor, Pages
from bench.result import Context, Topic, ratio, require, topic_main
from bench.timing import SETTLE_SECONDS, median, pretouch, rounds_of, wake_processor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    # Writes to words, which are at an address, and keeps `expected`, what they held, in step; the
    # seconds that WRITE_COUNT of the writes took.
    Work = Callable[["Words", int, "Words"], float]

Words = npt.NDArray[np.uint64]

WORDS_OF_PAGE = PAGE_BYTES // 8
WRITE_COUNT = 50_000
WARM_COUNT = 20_000
BATCH_COUNT = 5_000
DIRTY_PAGES = 1_000
RATE_LIMIT = 150.0
# The floor has no page states, locks, policy or errors: who is as fast is fast enough.
FLOOR_TIMES = 1.0
PMAPS = ("uffd", "inline")
KINDS = ("file", "anonymous")
# A round takes a few seconds: past these it hangs, and shows where.
ROUND_SECONDS_MAX = 100


def run(context: Context) -> Topic:
    """Writes by one thread, by two, by numpy; then sync."""
    topic = Topic("writes")
    size = data.plain_path(Path(context.data)).stat().st_size // PAGE_BYTES * PAGE_BYTES
    path = Path(context.out, "writes.bin")
    pretouch(3 * size)
    try:
        _zero(path, size)
        floor = Floor(Path(context.out))
        random = np.random.default_rng(context.seed)
        for what, work in _works(floor, random).items():
            calls = {
                f"quire {kind}, {pmap}": _quire(path, size, kind, pmap, work)
                for kind in KINDS
                for pmap in (PMAPS if what != "numpy" else PMAPS[:1])
            }
            calls["np.memmap, no budget"] = _memmap(path, work)
            if what == "one thread":
                calls["floor, inline"] = _floor(floor, path, size, random)
            wake_processor()
            rates = rounds_of(calls, max(5, context.rounds), context.seed)
            topic.add(rates, "thousand a second", 1.0, f"random writes, {what}")
            for name in calls:
                if name.startswith("quire"):
                    rate = median(rates[name])
                    wanted = f"random writes, {what}, {name.removeprefix('quire ')}"
                    topic.want(wanted, rate, RATE_LIMIT, at_least=True, unit=" thousand a second")
            if "floor, inline" in rates:
                beside = median(rates["quire file, inline"]) / median(rates["floor, inline"])
                topic.want(
                    f"random writes, {what}, file, inline: rate beside the floor's",
                    beside,
                    FLOOR_TIMES,
                    at_least=True,
                )
        topic.checks.append(
            "after each round every word of the array and, after closing, of the file holds what "
            "was written to it"
        )
        _measure_sync(topic, floor, path, context)
    finally:
        path.unlink(missing_ok=True)
    topic.notes.append(
        f"{size >> 20} MiB in granules of one page, a quarter may be resident; {WARM_COUNT:,} "
        "writes before the timing fill the budget"
    )
    return topic


def _works(floor: Floor, random: Any) -> dict[str, Work]:
    def threaded(threads: int) -> Work:
        return lambda words, address, expected: _increments(
            floor, address, expected, len(words) // WORDS_OF_PAGE, threads, random
        )

    return {
        "one thread": threaded(1),
        "two threads": threaded(2),
        "numpy": lambda words, _, expected: _assignments(words, expected, random),
    }


def _increments(
    floor: Floor, address: int, expected: Words, pages: int, threads: int, random: Any
) -> float:
    """Adds 1 to words of random pages: those that `run_threads` in `floor.c` chooses."""
    spent_ns = 0
    for count in (WARM_COUNT, WRITE_COUNT):
        order = _random_pages(random, pages, count)
        wake_processor(SETTLE_SECONDS)
        spent_ns = floor.run_threads(address, order, threads, write=True)
        turn = np.arange(count)
        words_of_page = (turn * 8 + turn % threads) % WORDS_OF_PAGE
        np.add.at(expected, order.astype(np.int64) * WORDS_OF_PAGE + words_of_page, np.uint64(1))
    return spent_ns / 1e9


def _assignments(words: Words, expected: Words, random: Any) -> float:
    """Assigns to random words, in batches of `words[chosen] = values`."""
    spent = 0.0
    for done in range(0, WARM_COUNT + WRITE_COUNT, BATCH_COUNT):
        chosen = random.integers(0, len(words), BATCH_COUNT)
        values = random.integers(0, 1 << 62, BATCH_COUNT, dtype=np.uint64)
        began = time.perf_counter()
        words[chosen] = values
        if done >= WARM_COUNT:
            spent += time.perf_counter() - began
        expected[chosen] = values
    return spent


def _quire(path: Path, size: int, kind: str, pmap: str, work: Work) -> Callable[[], float]:
    """Thousands of writes a second into a new mapping."""

    def call() -> float:
        expected = np.fromfile(path, np.uint64) if kind == "file" else np.zeros(size // 8, "u8")
        faulthandler.dump_traceback_later(ROUND_SECONDS_MAX, exit=True)
        with _mapped(path, size, kind, pmap) as mapping:
            words = mapping.array.view(np.uint64)
            rate = WRITE_COUNT / work(words, mapping.address, expected) / 1e3
            require(np.array_equal(words, expected), f"{kind}, {pmap}: the words written")
            require(mapping.statistics().evictions > 0, "writes within the budget")
            del words
        faulthandler.cancel_dump_traceback_later()
        if kind == "file":
            require(np.array_equal(np.fromfile(path, np.uint64), expected), "the file written")
        return rate

    return call


@contextmanager
def _mapped(path: Path, size: int, kind: str, pmap: str) -> Iterator[quire.Mapping]:
    how: dict[str, Any] = {"granule": PAGE_BYTES, "pmap": pmap, "budget": size // 4}
    if kind == "file":
        mapping = quire.open(path, mode="r+", dtype="u1", **how)
    else:
        mapping = quire.anonymous(size, swap=quire.Swap(folder=path.parent), **how)
    advise = getattr(mapping, "advise", None)
    if advise is not None:
        advise("random")
    with mapping:
        yield mapping


def _floor(floor: Floor, path: Path, size: int, random: Any) -> Callable[[], float]:
    """The floor program on the same file; it compares the file itself."""

    def call() -> float:
        seed = int(random.integers(1, 1 << 30))
        return WRITE_COUNT / (floor.writes(path, size // 4, WARM_COUNT, WRITE_COUNT, seed) / 1e6)

    return call


def _memmap(path: Path, work: Work) -> Callable[[], float]:
    def call() -> float:
        words = np.asarray(np.memmap(path, dtype=np.uint64, mode="r+"))
        expected = words.copy()
        rate = WRITE_COUNT / work(words, words.ctypes.data, expected) / 1e3
        require(np.array_equal(words, expected), "the memmap's words")
        return rate

    return call


def _measure_sync(topic: Topic, floor: Floor, path: Path, context: Context) -> None:
    """Time to make 1,000 random pages durable, everything resident on both sides."""
    random = np.random.default_rng(context.seed)
    pages = path.stat().st_size // PAGE_BYTES
    count = min(DIRTY_PAGES, pages // 2)
    _zero(path, pages * PAGE_BYTES)
    expected = np.zeros(pages, dtype=np.uint64)
    memmap = np.memmap(path, dtype=np.uint64, mode="r+")
    _page_sums(memmap)

    def timed(address: int, make_durable: Callable[[], None]) -> float:
        order = random.permutation(pages)[:count].astype(np.uint64)
        floor.run_threads(address, order, 1, write=True)
        began = time.perf_counter()
        make_durable()
        spent = time.perf_counter() - began
        expected[order.astype(np.int64)] += np.uint64(1)
        return spent

    def by_memmap() -> float:
        return timed(memmap.ctypes.data, memmap.flush)

    def by_quire() -> float:
        # A new mapping: pages of one that stayed open would not know what the memmap wrote.
        with quire.open(
            path, mode="r+", dtype="u1", granule=PAGE_BYTES, budget=2 * pages * PAGE_BYTES
        ) as mapping:
            mapping.prefetch().result()
            spent = timed(mapping.address, mapping.sync)
        found = _page_sums(np.fromfile(path, dtype=np.uint64))
        require(np.array_equal(found, expected), "the file synced")
        return spent

    times = rounds_of(
        {"quire, Mapping.sync": by_quire, "np.memmap.flush": by_memmap},
        max(7, context.rounds),
        context.seed,
    )
    require(np.array_equal(_page_sums(memmap), expected), "the file synced in turns")
    topic.add(times, "ms", 1e3, f"sync of {count:,} dirty random pages")
    faster = ratio(times, "np.memmap.flush", "quire, Mapping.sync")
    topic.notes.append(f"sync of {count:,} pages is {faster:.2f} times as fast as np.memmap.flush")


def _page_sums(words: Words) -> Pages:
    sums: Pages = words.reshape(-1, WORDS_OF_PAGE).sum(axis=1, dtype=np.uint64)
    return sums


def _random_pages(random: Any, pages: int, count: int) -> Pages:
    chosen: Pages = random.integers(0, pages, count, dtype=np.uint64)
    return chosen


def _zero(path: Path, size: int) -> None:
    """A file of zeros whose blocks are there and whose pages are in the kernel's cache."""
    np.zeros(size, dtype=np.uint8).tofile(path)


if __name__ == "__main__":
    topic_main(run)
