"""`quire.map` of a local file, beside `mmap.mmap`, `read()` and `numpy.memmap`.

Cold means that the file has left the page cache (posix_fadvise DONTNEED, checked with mincore) and
is mapped anew. The disk's own cache, and that of a host below a virtual machine, stay as they are:
the contenders take turns, so that they are the same for all.

Cold rows are measured in a file much larger than what is touched of it, as there the default of the
kernel, to read as much around a touch as the disk's `read_ahead_kb` says, is paid for each row. In
a small one it has read the whole file after few rows: that is shown too, without a target.
"""

from __future__ import annotations

import mmap
import os
import shutil
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
SPARSE_BYTES = 4 << 30
SPARSE_ROWS = 256
ROW_BYTES = 4096
MARK = 0x9E37_79B9_7F4A_7C15
HOT_TIMES = 8
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
    dense_rows(topic, context, copy)
    copy.unlink()
    sparse_rows(topic, context)
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
    viewed(topic, context, descriptor)
    file.close()


def viewed(topic: Topic, context: Context, descriptor: int) -> None:
    """The same with a view between: there `quire.map` does what its opening left undone."""

    def ours() -> None:
        made = quire.map(descriptor, sharing="shared")
        memoryview(made).release()
        made.close()

    def standard() -> None:
        made = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        memoryview(made).release()
        made.close()

    calls = {"quire.map": many(ours), "mmap.mmap": many(standard)}
    times = rounds_of(calls, 3 * context.rounds, context.seed)
    topic.add(times, "µs", 1e6 / OPENS, "open, view and close, descriptor")


def many(call: Callable[[], None]) -> Callable[[], float]:
    """Times `OPENS` calls."""

    def repeat() -> None:
        for _ in range(OPENS):
            call()

    return lambda: seconds(repeat)


def hot(topic: Topic, context: Context, path: Path) -> None:
    """Resident pages: the same memory for both, so the same speed.

    Each round maps anew, as the addresses and the places of the page tables are a part of the luck.
    """
    size = path.stat().st_size // 8 * 8
    chosen = np.random.default_rng(context.seed).integers(0, size // ROW_BYTES, 20_000) * 512
    sums: set[int] = set()

    def by_map(work: Callable[[np.ndarray], object]) -> float:
        with quire.map(path, size, sharing="shared", protection="rw", dtype="u8") as mapping:
            return timed(work, mapping.array)

    def by_mmap(work: Callable[[np.ndarray], object]) -> float:
        with path.open("r+b") as file:
            return timed(work, np.frombuffer(mmap.mmap(file.fileno(), size), "u8"))

    works: dict[str, Callable[[np.ndarray], object]] = {
        "read": lambda array: sums.add(int(array.sum())),
        "random reads": lambda array: array[chosen].sum(),
        "write": lambda array: array[: 1 << 20].fill(7),
    }
    for what, work in works.items():
        calls = {
            "quire.map": lambda work=work: by_map(work),
            "mmap.mmap": lambda work=work: by_mmap(work),
        }
        times = rounds_of(calls, 8 * context.rounds, context.seed)
        topic.add(times, "ms", 1e3, f"hot {what}")
        measured = ratio(times, "quire.map", "mmap.mmap")
        topic.want(f"hot {what}: time beside mmap", measured, 1.02, at_least=False)
    require(len(sums) == 1, f"the sums {sums}")
    topic.checks.append("sums of all bytes are equal")


def timed(work: Callable[[np.ndarray], object], array: np.ndarray) -> float:
    """Has every page mapped, and times some repetitions, the shortest of which counts."""
    array[::512].sum()
    work(array)
    return min(seconds(lambda: work(array)) for _ in range(HOT_TIMES))


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


def dense_rows(topic: Topic, context: Context, path: Path) -> None:
    """Rows of 4 KiB so near each other that reading around them soon has read all of the file."""
    count = path.stat().st_size // ROW_BYTES
    chosen = np.random.default_rng(context.seed + 1).choice(count, min(ROWS, count // 4), False)
    times = cold_rows(topic, context, path, chosen, "dense")
    measured = ratio(times, "np.memmap", "quire.map")
    topic.notes.append(
        f"dense cold rows: one in {count // len(chosen)} of {count * ROW_BYTES >> 20} MiB, "
        f"quire.map {measured:.3g} times as fast as np.memmap; no target"
    )


def sparse_rows(topic: Topic, context: Context) -> None:
    """Rows of 4 KiB here and there in a large file."""
    free = shutil.disk_usage(context.out).free
    if free < 2 * SPARSE_BYTES:
        topic.notes.append(
            f"cold rows: speed beside np.memmap: not measured: {context.out} has {free >> 20} MiB "
            f"free, and the file of {SPARSE_BYTES >> 20} MiB is to leave half of that"
        )
        return
    path, count = Path(context.data) / "sparse.bin", SPARSE_BYTES // ROW_BYTES
    try:
        write_marked_rows(path, context.seed)
        chosen = np.random.default_rng(context.seed + 1).choice(count, SPARSE_ROWS, False)
        wanted = int((chosen.astype("u8") * np.uint64(MARK)).sum())
        times = cold_rows(topic, context, path, chosen, "sparse", wanted)
        read_ahead = read_ahead_kib(path)
    finally:
        path.unlink(missing_ok=True)
    measured = ratio(times, "np.memmap", "quire.map")
    topic.want("cold rows: speed beside np.memmap", measured, 5, at_least=True)
    topic.notes.append(
        f"cold rows: {SPARSE_ROWS} of 4 KiB in a file of {SPARSE_BYTES >> 20} MiB; the disk's "
        f"read_ahead_kb, which np.memmap's default reads around each, is {read_ahead}"
    )


def write_marked_rows(path: Path, seed: int) -> None:
    """Random bytes, and at the start of each row its number times `MARK`."""
    words = np.random.default_rng(seed).integers(0, 1 << 63, (16 << 20) // 8, "u8")
    rows = words.reshape(-1, ROW_BYTES // 8)
    numbers = np.arange(len(rows), dtype="u8")
    with path.open("wb", buffering=0) as file:
        for first in range(0, SPARSE_BYTES // ROW_BYTES, len(rows)):
            rows[:, 0] = (numbers + np.uint64(first)) * np.uint64(MARK)
            rows.tofile(file)
        os.fsync(file.fileno())


def read_ahead_kib(path: Path) -> str:
    """What sysfs says of the disk that a file is on."""
    device = path.stat().st_dev
    kept = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    return kept.read_text().strip() if kept.exists() else "unknown"


def cold_rows(
    topic: Topic,
    context: Context,
    path: Path,
    chosen: np.ndarray,
    what: str,
    wanted: int | None = None,
) -> dict[str, list[float]]:
    """Reads rows of a file that is not cached; their sum is `wanted`, where that is known."""
    count = path.stat().st_size // ROW_BYTES
    found: dict[str, int] = {}

    def rows(array: np.ndarray) -> int:
        total = np.uint64(0)
        for row in chosen:
            total += array[row, 0]
        return int(total)

    def by_map() -> None:
        size = count * ROW_BYTES
        with quire.map(path, size, sharing="shared", dtype="u8", shape=(-1, 512)) as mapping:
            found["quire.map"] = rows(mapping.array)

    def by_memmap() -> None:
        memmap = np.memmap(path, "u8", "r", shape=(count, 512))
        found["np.memmap"] = rows(np.asarray(memmap))

    works = {"quire.map": by_map, "np.memmap": by_memmap}
    calls = {name: cold(path, work) for name, work in works.items()}
    with np.errstate(over="ignore"):  # sums are modulo 2**64
        times = rounds_of(calls, context.rounds, context.seed)
    answers = set(found.values()) | ({wanted} if wanted is not None else set())
    require(len(answers) == 1, f"{what} rows {found}, of {wanted}")
    topic.checks.append(f"{len(chosen):,} {what} cold rows are equal")
    topic.add(times, "µs a row", 1e6 / len(chosen), f"cold rows, {what}")
    return times


if __name__ == "__main__":
    topic_main(run)
