"""`quire.map` of a local file, beside `mmap.mmap`, `read()` and `numpy.memmap`.

Cold means that the file has left the page cache (posix_fadvise DONTNEED, checked with mincore) and
is mapped anew. The disk's own cache, and that of a host below a virtual machine, stay as they are:
the contenders take turns, so that they are the same for all.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import quire
from bench import data
from bench.result import Context, Topic, ratio, require, topic_main
from bench.timing import pretouch, rounds_of, seconds, wake_processor

if TYPE_CHECKING:
    from collections.abc import Callable

OPENS = 2000
ROWS = 2000
HOT_TIMES = 4
READ_BYTES = 1 << 20


def run(context: Context) -> Topic:
    """Open and close; hot reads and writes; a cold scan; cold random rows."""
    topic = Topic("kernel")
    path = data.plain_path(Path(context.data))
    copy = path.with_name("kernel.bin")
    copy.write_bytes(path.read_bytes())
    pretouch(2 * copy.stat().st_size)
    wake_processor()
    open_and_close(topic, context, copy)
    hot(topic, context, copy)
    with copy.open("rb") as file:
        os.fsync(file.fileno())
    cold_scan(topic, context, copy)
    cold_rows(topic, context, copy)
    copy.unlink()
    return topic


def open_and_close(topic: Topic, context: Context, path: Path) -> None:
    """Mappings of one file, made and closed one after the other."""

    def standard() -> None:
        with path.open("rb", buffering=0) as file:
            made = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        made.close()

    def ours() -> None:
        quire.map(path, sharing="shared").close()

    file = path.open("rb", buffering=0)
    descriptor = file.fileno()
    calls: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "path": (ours, standard),
        "descriptor": (
            lambda: quire.map(descriptor, sharing="shared").close(),
            lambda: mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ).close(),
        ),
    }
    for what, pair in calls.items():
        contenders = {
            name: many(call) for name, call in zip(("quire.map", "mmap.mmap"), pair, strict=True)
        }
        times = rounds_of(contenders, 3 * context.rounds, context.seed)
        topic.add(times, "µs", 1e6 / OPENS, f"open and close, {what}")
        measured = ratio(times, "quire.map", "mmap.mmap")
        topic.want(f"open and close by {what}: time", measured, 1.2, at_least=False)
    file.close()


def many(call: Callable[[], None]) -> Callable[[], float]:
    """Times `OPENS` calls."""

    def repeat() -> None:
        for _ in range(OPENS):
            call()

    return lambda: seconds(repeat)


def hot(topic: Topic, context: Context, path: Path) -> None:
    """Resident pages: the same memory for both, so the same speed."""
    size = path.stat().st_size // 8 * 8
    chosen = np.random.default_rng(context.seed).integers(0, size // 4096, 20_000)
    with (
        quire.map(path, size, sharing="shared", protection="rw", dtype="u8") as mapping,
        path.open("r+b") as file,
    ):
        other = mmap.mmap(file.fileno(), size)
        sides = {"quire.map": mapping.array, "mmap.mmap": np.frombuffer(other, "u8")}
        require(int(sides["quire.map"].sum()) == int(sides["mmap.mmap"].sum()), "the sums")
        topic.checks.append("sums of all bytes are equal")
        works: dict[str, Callable[[np.ndarray], object]] = {
            "read": lambda array: array.sum(),
            "write": lambda array: array[: 1 << 20].fill(7),
            "random reads": lambda array: array[chosen * 512].sum(),
        }
        for what, work in works.items():
            calls = {name: timed(work, array) for name, array in sides.items()}
            times = rounds_of(calls, 5 * context.rounds, context.seed)
            topic.add(times, "ms", 1e3, f"hot {what}")
            measured = ratio(times, "quire.map", "mmap.mmap")
            topic.want(f"hot {what}: time beside mmap", measured, 1.02, at_least=False)
        sides.clear()
        del calls


def timed(work: Callable[[np.ndarray], object], array: np.ndarray) -> Callable[[], float]:
    """Times some repetitions, the shortest of which counts."""
    return lambda: min(seconds(lambda: work(array)) for _ in range(HOT_TIMES))


def forget(path: Path) -> None:
    """Has a file leave the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with quire.map(path, sharing="shared") as mapping:
        left = float(mapping.resident().mean())
    require(left < 0.01, f"{left:.1%} of the file stayed in the page cache")


def cold_scan(topic: Topic, context: Context, path: Path) -> None:
    """All bytes, once, in order."""
    found: dict[str, int] = {}

    def by_map() -> None:
        with quire.map(path, sharing="shared", dtype="u8") as mapping:
            found["quire.map"] = pieces(mapping.array)

    def by_mmap() -> None:
        with path.open("rb") as file:
            made = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        found["mmap"] = pieces(np.frombuffer(made, "u8"))

    def by_read() -> None:
        buffer, total = np.empty(READ_BYTES // 8, "u8"), 0
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(memoryview(buffer).cast("B")):
                total += int(buffer[: count // 8].sum())
        found["read()"] = total

    works = {"quire.map": by_map, "mmap": by_mmap, "read()": by_read}
    times = rounds_of(
        {name: cold(path, work) for name, work in works.items()}, context.rounds, context.seed
    )
    require(len(set(found.values())) == 1, f"the sums {found}")
    topic.checks.append("cold sums are equal")
    topic.add(times, "ms", 1e3, "cold scan")
    better = min(("mmap", "read()"), key=lambda name: sorted(times[name])[len(times[name]) // 2])
    measured = ratio(times, better, "quire.map")
    topic.want(f"cold scan: speed beside the better, {better}", measured, 1.2, at_least=True)


def pieces(array: np.ndarray) -> int:
    """The sum, a piece after the other, as a program that works on what it reads."""
    total = 0
    for first in range(0, len(array), READ_BYTES // 8):
        total += int(array[first : first + READ_BYTES // 8].sum())
    return total


def cold(path: Path, work: Callable[[], None]) -> Callable[[], float]:
    """Times work on a file that is not cached."""

    def once() -> float:
        forget(path)
        return seconds(work)

    return once


def cold_rows(topic: Topic, context: Context, path: Path) -> None:
    """Rows of 4 KiB here and there, in a file that is not cached."""
    count = path.stat().st_size // 4096
    chosen = np.random.default_rng(context.seed + 1).choice(count, min(ROWS, count // 4), False)
    found: dict[str, int] = {}

    def rows(array: np.ndarray) -> int:
        total = 0
        for row in chosen:
            total += int(array[row, 0])
        return total

    def by_map() -> None:
        size = count * 4096
        with quire.map(path, size, sharing="shared", dtype="u8", shape=(-1, 512)) as mapping:
            found["quire.map"] = rows(mapping.array)

    def by_memmap() -> None:
        memmap = np.memmap(path, "u8", "r", shape=(count, 512))
        found["np.memmap"] = rows(np.asarray(memmap))

    works = {"quire.map": by_map, "np.memmap": by_memmap}
    calls = {name: cold(path, work) for name, work in works.items()}
    times = rounds_of(calls, context.rounds, context.seed)
    require(found["quire.map"] == found["np.memmap"], f"rows {found}")
    topic.checks.append(f"{len(chosen):,} cold rows are equal")
    topic.add(times, "µs a row", 1e6 / len(chosen), "cold rows")
    measured = ratio(times, "np.memmap", "quire.map")
    topic.want("cold rows: speed beside np.memmap", measured, 5, at_least=True)


if __name__ == "__main__":
    topic_main(run)
