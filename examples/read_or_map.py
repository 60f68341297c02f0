"""Reading a file beside mapping it: `python read_or_map.py [MIB] [ROUNDS] [FOLDER]` measures it.

A scan takes the whole file, 1 MiB after the other; rows are pieces of 4 KiB here and there. "cold":
the file has left the page cache; "warm": it is there, and opened anew; "hot": it is open, and was
touched before. All add up what they get, and must come to the same sum. They take turns, in an
order drawn for each round; shown is the median of the rounds, with the least and the most.
"""

from __future__ import annotations

import contextlib
import datetime
import mmap
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import quire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Piece = Callable[[int, int], np.ndarray]  # offset and length in bytes to an array of u8

MIB, ROW, ROWS, WORD = 1 << 20, 4096, 1000, 8


@contextlib.contextmanager
def by_read(path: Path) -> Iterator[Piece]:
    """Read into one buffer: preadv(2)."""
    buffer = np.empty(MIB // WORD, "u8")
    with path.open("rb", buffering=0) as file:

        def piece(offset: int, length: int) -> np.ndarray:
            part = buffer[: length // WORD]
            assert os.preadv(file.fileno(), [part], offset) == length
            return part

        yield piece


@contextlib.contextmanager
def by_mmap(path: Path) -> Iterator[Piece]:
    """The standard library's mapping, as a plain array."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    yield slices(np.frombuffer(mapping, "u8"))


@contextlib.contextmanager
def by_memmap(path: Path) -> Iterator[Piece]:
    """Numpy's mapping."""
    yield slices(np.memmap(path, "u8", "r"))


@contextlib.contextmanager
def by_quire(path: Path) -> Iterator[Piece]:
    """The one of quire."""
    with quire.map(path, sharing="shared", dtype="u8") as mapping:
        yield slices(mapping.array)


def slices(array: np.ndarray) -> Piece:
    """What is mapped needs no copy."""
    return lambda offset, length: array[offset // WORD : (offset + length) // WORD]


WAYS = {"pread": by_read, "mmap.mmap": by_mmap, "np.memmap": by_memmap, "quire.map": by_quire}


def total(piece: Piece, offsets: list[int], length: int) -> int:
    """The sum of some pieces, modulo 2**64."""
    return sum(int(piece(offset, length).sum()) for offset in offsets) % 2**64


def forget(path: Path) -> bool:
    """Has the file leave the page cache; false where it cannot (a file system in memory)."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with quire.map(path, sharing="shared") as mapping:
        return float(mapping.resident().mean()) < 0.01


def once(way: str, path: Path, state: str, offsets: list[int], length: int) -> tuple[float, int]:
    """Seconds and the sum."""
    if state == "cold":
        forget(path)
    began = time.perf_counter()
    with WAYS[way](path) as piece:
        if state == "hot":
            total(piece, offsets, length)
            began = time.perf_counter()
        found = total(piece, offsets, length)
    return time.perf_counter() - began, found


def measure(path: Path, rounds: int) -> None:
    """Prints a line for each work, state and way."""
    size, order = path.stat().st_size, random.Random(1)
    works = {
        "scan": (list(range(0, size, MIB)), MIB, 1e3, "ms"),
        "rows": (order.sample(range(0, size, ROW), ROWS), ROW, 1e6 / ROWS, "us a row"),
    }
    states = ["hot", "warm", "cold"] if forget(path) else ["hot", "warm"]
    for work, (offsets, length, scale, unit) in works.items():
        for state in states:
            found: dict[str, list[tuple[float, int]]] = {way: [] for way in WAYS}
            for _ in range(rounds + 1):
                for way in order.sample(list(WAYS), len(WAYS)):
                    found[way].append(once(way, path, state, offsets, length))
            assert len({one[1] for results in found.values() for one in results}) == 1, found
            for way, results in found.items():
                times = [seconds * scale for seconds, _ in results[1:]]  # the first warms up
                shown = f"{min(times):,.2f} to {max(times):,.2f}"
                middle = f"{statistics.median(times):,.2f} {unit}"
                print(f"{state:<5} {work:<5} {way:<10} {middle:>16}   ({shown})")
    print("every sum was equal" + ("" if "cold" in states else "; this file cannot be made cold"))


def main() -> None:
    """Says on what it measures, and measures."""
    defaults = ["64", "3", None]
    mib, rounds, place = [*sys.argv[1:4], *defaults[len(sys.argv) - 1 :]]
    processor = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0]
    system = f"{os.cpu_count()} CPUs, {platform.system()} {platform.release()}"
    print(processor.strip("\t: ") or platform.machine(), system, sep=", ")
    print(f"Python {platform.python_version()}, numpy {np.__version__}, {datetime.date.today()}")
    load = f"load {os.getloadavg()[0]:.1f}"
    print(f"{mib} MiB, {ROWS:,} rows of {ROW} bytes, {rounds} rounds, {load}")
    with tempfile.TemporaryDirectory(dir=place) as folder:
        path = Path(folder, "numbers.bin")
        np.random.default_rng(1).integers(0, 1 << 63, int(mib) * MIB // WORD, "u8").tofile(path)
        measure(path, int(rounds))


if __name__ == "__main__":
    main()
