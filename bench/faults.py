"""One fault of a 4 KiB page on a warm local file, beside the bare floor program.

`floor.c` is compiled here. It is both sides' stopwatch: its loop touches quire's mappings, through
their address, and its own. The touching thread stays on one CPU in both.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import quire
from bench import data
from bench.result import Context, Topic, require, topic_main
from bench.timing import median, pretouch, rounds_of, wake_processor

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE_BYTES = 4096
TOUCH_COUNT = 5_000
LIMITS_US = {"uffd": 8.0, "inline": 4.0}
FLOORS = {"uffd": "thread", "inline": "inline"}


def run(context: Context) -> Topic:
    """Median fault of each pmap and of its floor."""
    topic = Topic("faults")
    path = data.plain_path(Path(context.data))
    pretouch(3 * path.stat().st_size)
    path.read_bytes()
    program, library = build_floor(Path(context.out))
    _check_content(topic, path, context)
    random = np.random.default_rng(context.seed)
    calls: dict[str, Callable[[], float]] = {}
    for pmap, mode in FLOORS.items():
        calls[f"quire {pmap}"] = _quire_touches(library, path, pmap, random)
        calls[f"floor {mode}"] = _floor_touches(program, path, mode, random)
    times = rounds_of(calls, max(9, context.rounds), context.seed)
    topic.add(times, "µs", 1.0, "fault of 4 KiB")
    for pmap, limit in LIMITS_US.items():
        name = f"{pmap}: one 4 KiB fault on a warm local file"
        topic.want(name, median(times[f"quire {pmap}"]), limit, at_least=False, unit=" µs")
    return topic


def build_floor(out: Path) -> tuple[Path, ctypes.CDLL]:
    """Compiles `floor.c` into `out`: the program, and its loop as a library.

    Raises `RuntimeError` where there is no C compiler.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        raise RuntimeError("no C compiler: install one, for example `apt-get install gcc`")
    source = Path(__file__).with_name("floor.c")
    program, shared = out / "floor", out / "floor.so"
    subprocess.run([compiler, "-O2", "-o", program, source, "-lpthread"], check=True)
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", shared, source], check=True)
    library = ctypes.CDLL(str(shared))
    library.touch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p]
    library.touch.restype = ctypes.c_uint64
    return program, library


def _quire_touches(library: Any, path: Path, pmap: str, random: Any) -> Callable[[], float]:
    """A new mapping each time; the median touch in microseconds."""

    def call() -> float:
        pages = random.permutation(path.stat().st_size // PAGE_BYTES)[:TOUCH_COUNT]
        order, spent = pages.astype(np.uint64), np.zeros(TOUCH_COUNT, dtype=np.uint64)
        budget = 2 * path.stat().st_size
        with quire.open(path, dtype="u1", granule=PAGE_BYTES, pmap=pmap, budget=budget) as mapping:
            allowed = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {0})
            wake_processor()
            library.touch(mapping.address, order.ctypes.data, len(order), spent.ctypes.data)
            os.sched_setaffinity(0, allowed)
        return float(np.median(spent)) / 1e3

    return call


def _floor_touches(program: Path, path: Path, mode: str, random: Any) -> Callable[[], float]:
    """The floor program run anew each time; the median touch in microseconds."""

    def call() -> float:
        seed = int(random.integers(1, 1 << 30))
        argv = [str(program), mode, str(path), str(TOUCH_COUNT), str(seed)]
        said = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
        return float(np.median(json.loads(said))) / 1e3

    return call


def _check_content(topic: Topic, path: Path, context: Context) -> None:
    content = np.fromfile(path, dtype=np.uint8)
    at = np.random.default_rng(context.seed).integers(0, len(content), TOUCH_COUNT)
    for pmap in FLOORS:
        with quire.open(path, dtype="u1", granule=PAGE_BYTES, pmap=pmap) as mapping:
            require(np.array_equal(mapping.array[at], content[at]), f"{pmap}: single bytes")
    topic.checks.append(f"{TOUCH_COUNT:,} bytes are equal to the file's with each pmap")


if __name__ == "__main__":
    topic_main(run)
