"""`floor.c` and `floor_writes.c`, compiled: the floor programs, and loops for anybody's memory."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PAGE_BYTES = 4096
CPU_COUNT = 2

Pages = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Run:
    """What the floor program said: nanoseconds of each touch, and of all of them."""

    spent_ns: Pages
    elapsed_ns: int


class Floor:
    """The compiled program and its loops."""

    def __init__(self, out: Path, *, build: bool = True) -> None:
        """Compiles the programs into `out`, or finds them there.

        Raises:
            RuntimeError: there is no C compiler.
        """
        self._program, self._writes = out / "floor", out / "floor_writes"
        shared = out / "floor.so"
        if build:
            _compile("floor.c", self._program)
            _compile("floor.c", shared, "-shared", "-fPIC")
            _compile("floor_writes.c", self._writes)
        self._library = ctypes.CDLL(str(shared))
        address, number = ctypes.c_void_p, ctypes.c_uint64
        self._declare("touch", address, address, number, address, number, address, number)
        self._declare("read_through", address, number)
        self._declare("read_file", ctypes.c_int, address, number)
        self._declare("run_threads", address, address, number, ctypes.c_uint, ctypes.c_uint)

    def _declare(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, name)
        function.argtypes, function.restype = list(arguments), ctypes.c_uint64

    def program(
        self,
        mode: str,
        path: Path,
        count: int,
        seed: int,
        *,
        granule: int = PAGE_BYTES,
        every: int = 0,
        threads: int = 1,
    ) -> Run:
        """Runs the floor program anew; see `floor.c`."""
        numbers = [str(one) for one in (count, seed, granule, every, threads)]
        argv = [str(self._program), mode, str(path), *numbers]
        said = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
        return Run(np.array(said["spent"], dtype=np.uint64), said["elapsed"])

    def writes(self, path: Path, budget_bytes: int, warm: int, count: int, seed: int) -> int:
        """Runs `floor_writes.c` anew on a file, which it changes; nanoseconds of `count` writes."""
        argv = [str(self._writes), str(path), *map(str, (budget_bytes, warm, count, seed))]
        said = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
        return int(said["elapsed"])

    def touch(self, address: int, pages: Pages, every: int = 0) -> Pages:
        """Touches pages one by one, on one CPU or moving on after `every`; nanoseconds of each."""
        allowed = os.sched_getaffinity(0)
        chosen = sorted(allowed)[: CPU_COUNT if every else 1]
        cpus = np.array(chosen, dtype=np.int32)
        spent = np.ones(len(pages), dtype=np.uint64)
        try:
            os.sched_setaffinity(0, {chosen[0]})
            self._library.touch(
                address, pages.ctypes.data, len(pages), spent.ctypes.data,
                every, cpus.ctypes.data, len(cpus),
            )  # fmt: skip
        finally:
            os.sched_setaffinity(0, allowed)
        return spent

    def run_threads(self, address: int, pages: Pages, threads: int, *, write: bool = False) -> int:
        """Touches pages, or adds 1 to a word of each, by threads that share them; nanoseconds."""
        spent = self._library.run_threads(address, pages.ctypes.data, len(pages), threads, write)
        if not spent:
            raise RuntimeError(f"{threads} threads could not be started")
        return int(spent)

    def read_through(self, address: int, size_bytes: int) -> int:
        """The sum of the 8-byte words, modulo 2**64."""
        return int(self._library.read_through(address, size_bytes // 8))

    def read_file(self, file: int, buffer: npt.NDArray[np.uint8]) -> int:
        """The sum of a file's 8-byte words, modulo 2**64, read a buffer at a time."""
        return int(self._library.read_file(file, buffer.ctypes.data, buffer.nbytes))


def _compile(source: str, target: Path, *options: str) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        raise RuntimeError("no C compiler: install one, for example `apt-get install gcc`")
    path = Path(__file__).with_name(source)
    subprocess.run([compiler, "-O2", *options, "-o", target, path, "-lpthread"], check=True)


def scattered(random: Any, pages: int, count: int, granule: int = PAGE_BYTES) -> Pages:
    """Pages in random order, each in a granule of its own, of memory of any size.

    >>> chosen = scattered(np.random.default_rng(1), 1 << 28, 1000)
    >>> len(set(chosen.tolist())), int(chosen.max()) < 1 << 28
    (1000, True)
    """
    of_granule = granule // PAGE_BYTES
    stretch = pages // of_granule // count
    if stretch == 0:
        raise ValueError(f"{pages} pages have no {count} granules of {of_granule}")
    granules = np.arange(count) * stretch + random.integers(0, stretch, count)
    found: Pages = (granules * of_granule + random.integers(0, of_granule, count)).astype(np.uint64)
    random.shuffle(found)
    return found


def worst_median_us(spent_ns: Pages, every: int = 0) -> float:
    """The median touch in microseconds; of a moving thread, on the CPU where that is longest."""
    if not every:
        return float(np.median(spent_ns)) / 1e3
    turn = np.arange(len(spent_ns)) // every % min(CPU_COUNT, len(os.sched_getaffinity(0)))
    return max(float(np.median(spent_ns[turn == cpu])) for cpu in set(turn.tolist())) / 1e3
