"""Pages on their way in, and pages that are there: everything that reading costs, by its promise.

One fault and two threads' faults (`faults.py`) and mappings of 1 TiB (`sparse.py`), both beside the
floor program; here a warm file read through by one thread, and resident pages beside a plain
ndarray.
"""

from __future__ import annotations

import mmap
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import quire
from bench import data, faults, sparse
from bench.floor import Floor
from bench.result import Context, Topic, ratio, require, topic_main
from bench.timing import SETTLE_SECONDS, median, pretouch, rounds_of, seconds, wake_processor

if TYPE_CHECKING:
    from collections.abc import Callable

GIB = 1 << 30
MIB = 1 << 20
HUGE_BYTES = 2 * MIB
# Granules of the sequential reader, with the GiB a second they promise.
SPEEDS: dict[str, tuple[int | None, float]] = {
    "default granule": (None, 2.5),
    "granule 2 MiB": (HUGE_BYTES, 3.3),
}
ROW_COUNT = 20_000
RESIDENT_TIMES = 1.03


def run(context: Context) -> Topic:
    """Every promise about reading, beside its floor."""
    topic = Topic("paging")
    path = data.plain_path(Path(context.data))
    pretouch(3 * path.stat().st_size)
    path.read_bytes()
    floor = Floor(Path(context.out))
    wake_processor()
    faults.measure(topic, floor, path, context)
    _measure_sequential(topic, floor, path, context)
    _measure_resident(topic, path, context)
    sparse.measure(topic, floor, context)
    return topic


def _measure_sequential(topic: Topic, floor: Floor, path: Path, context: Context) -> None:
    """GiB a second of one thread that sums a file's words; the budget is a quarter of the file."""
    size = path.stat().st_size // 8 * 8
    words = np.fromfile(path, dtype=np.uint64, count=size // 8)
    total = int(words.sum())
    calls: dict[str, Callable[[], float]] = {
        name: _quire_reader(floor, path, granule, total) for name, (granule, _) in SPEEDS.items()
    }
    memmap = np.asarray(np.memmap(path, dtype=np.uint64, mode="r", shape=words.shape))
    calls["np.memmap, no budget"] = _reader(floor, memmap.ctypes.data, size, total)
    calls["floor, read(2) into a buffer of 2 MiB"] = _file_reader(floor, path, total)
    calls["ndarray in memory"] = _reader(floor, words.ctypes.data, size, total)
    rates = rounds_of(calls, max(7, context.rounds), context.seed)
    topic.add(rates, "GiB/s", 1.0, "sequential read")
    for name, (_, limit) in SPEEDS.items():
        what = f"sequential read of a warm file, {name}"
        topic.want(what, median(rates[name]), limit, at_least=True, unit=" GiB/s")
    topic.checks.append("sums of the sequential readers are equal in every round")


def _quire_reader(floor: Floor, path: Path, granule: int | None, total: int) -> Callable[[], float]:
    size = path.stat().st_size // 8 * 8

    def call() -> float:
        with quire.open(path, dtype="u1", granule=granule, budget=size // 4) as mapping:
            rate = _reader(floor, mapping.address, size, total)()
            require(mapping.statistics().faults > 0, "a read without any fault")
        return rate

    return call


def _reader(floor: Floor, address: int, size: int, total: int) -> Callable[[], float]:
    def call() -> float:
        sums: list[int] = []
        wake_processor(SETTLE_SECONDS)
        spent = seconds(lambda: sums.append(floor.read_through(address, size)))
        require(sums == [total], "the sum of a sequential read")
        return size / spent / GIB

    return call


def _file_reader(floor: Floor, path: Path, total: int) -> Callable[[], float]:
    """No page is mapped, no fault met: what the bytes alone cost."""
    buffer = np.ones(HUGE_BYTES, dtype=np.uint8)

    def call() -> float:
        sums: list[int] = []
        with path.open("rb", buffering=0) as file:
            wake_processor(SETTLE_SECONDS)
            spent = seconds(lambda: sums.append(floor.read_file(file.fileno(), buffer)))
            size = os.fstat(file.fileno()).st_size
        require(sums == [total], "the sum of the file read")
        return size / spent / GIB

    return call


def _measure_resident(topic: Topic, path: Path, context: Context) -> None:
    """Random rows and the sum of resident pages, beside the same bytes in memory.

    numpy asks for huge pages for large arrays; the array in pages of 4 KiB shows what that does.
    """
    plain = np.load(path)
    chosen = np.random.default_rng(context.seed).integers(0, len(plain), ROW_COUNT)
    with ExitStack() as stack:
        sides: dict[str, Any] = {"ndarray": plain, "ndarray in 4 KiB pages": _in_small_pages(plain)}
        for name, granule in (("quire", None), ("quire, granule 2 MiB", HUGE_BYTES)):
            budget = 2 * path.stat().st_size
            mapping = stack.enter_context(quire.open(path, granule=granule, budget=budget))
            mapping.prefetch().result()
            sides[name] = mapping.array
        total = float(plain.sum())
        for name, rows in sides.items():
            require(np.array_equal(rows[chosen], plain[chosen]), f"{name}: random rows")
            require(float(rows.sum()) == total, f"{name}: the sum")
        topic.checks.append(f"{ROW_COUNT:,} resident rows and the sum are equal")
        out = np.empty((1024, plain.shape[1]), dtype=plain.dtype)
        works: dict[str, Callable[[Any], object]] = {
            "random rows": lambda rows: _gather(rows, chosen, out),
            "sum": lambda rows: rows.sum(),
        }
        wake_processor()
        for what, work in works.items():
            calls = {name: _timed(work, rows) for name, rows in sides.items()}
            times = rounds_of(calls, 4 * context.rounds, context.seed)
            is_sum = what == "sum"
            scale = 1e3 if is_sum else 1e6 / ROW_COUNT
            topic.add(times, "ms" if is_sum else "µs a row", scale, f"resident {what}")
            name = f"resident {what}: time beside a plain ndarray"
            topic.want(name, ratio(times, "quire", "ndarray"), RESIDENT_TIMES, at_least=False)
            small = ratio(times, "quire", "ndarray in 4 KiB pages")
            huge = ratio(times, "quire, granule 2 MiB", "ndarray")
            topic.notes.append(
                f"resident {what}: {small:.3f} times an ndarray in pages of 4 KiB; with granule "
                f"2 MiB {huge:.3f} times a plain ndarray"
            )
        sides.clear()


def _in_small_pages(plain: Any) -> Any:
    memory = mmap.mmap(-1, plain.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    copy = np.frombuffer(memory, dtype=plain.dtype).reshape(plain.shape)
    copy[:] = plain
    return copy


def _timed(work: Callable[[Any], object], rows: Any) -> Callable[[], float]:
    return lambda: seconds(lambda: work(rows))


def _gather(rows: Any, chosen: Any, out: Any) -> None:
    """Copies rows in blocks that stay in the CPU's cache."""
    for first in range(0, len(chosen), len(out)):
        part = chosen[first : first + len(out)]
        np.take(rows, part, axis=0, out=out[: len(part)], mode="clip")


if __name__ == "__main__":
    topic_main(run)
