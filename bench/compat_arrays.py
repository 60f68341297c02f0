"""Drop-ins beside what they replace: `numpy.memmap`, and `multiprocessing.shared_memory`.

*memmap*: making the array of a file of 256 MiB of zeros, in mode "r" and "r+", and dropping it.

*Shared memory*: a block of 1 MiB is made, attached to by its name, and both are closed and the name
unlinked, in one process; with a name that the class chooses, and with one that is given. Then a
block that another process made is attached to and closed. The standard class has its resource
tracker running before anything is timed.
"""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import tempfile
import time
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.result import Context, Topic, ratio, require, topic_main
from bench.timing import median, rounds_of, wake_processor
from quire.compat import shared_memory as quire_shared_memory
from quire.compat.memmap import memmap

if TYPE_CHECKING:
    from collections.abc import Callable

FILE_BYTES = 256 << 20
BLOCK_BYTES = 1 << 20
CALLS = 300
ROUNDS_MIN = 9
MEMMAP_LIMIT = 1.2
SHARED_LIMIT = 1.0
QUIRE = "quire.compat"
NUMPY = "numpy.memmap"
STANDARD = "multiprocessing.shared_memory"
MODULES: dict[str, Any] = {QUIRE: quire_shared_memory, STANDARD: shared_memory}


def run(context: Context) -> Topic:
    """Times each beside what it replaces."""
    topic = Topic("drop-ins for arrays")
    rounds = max(ROUNDS_MIN, context.rounds)
    _memmap(topic, context, rounds)
    _shared_memory(topic, context, rounds)
    return topic


def _typical(call: Callable[[], object]) -> float:
    """Seconds of a call: the median of many, without a collection between."""
    wake_processor(0.03)
    times = []
    gc.disable()
    for _ in range(CALLS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    gc.enable()
    return median(times)


def _memmap(topic: Topic, context: Context, rounds: int) -> None:
    with tempfile.TemporaryDirectory(dir=context.data) as folder:
        path = Path(folder, "zeros.bin")
        with path.open("wb") as file:
            file.truncate(FILE_BYTES)
            file.write(b"1234567")
        for mode in ("r", "r+"):
            found = {
                name: cls(path, "u1", mode) for name, cls in ((QUIRE, memmap), (NUMPY, np.memmap))
            }
            require(bytes(found[QUIRE][:9]) == bytes(found[NUMPY][:9]), f"mode {mode}")
            times = rounds_of(
                {
                    QUIRE: lambda mode=mode: _typical(lambda: memmap(path, "u1", mode)),
                    NUMPY: lambda mode=mode: _typical(lambda: np.memmap(path, "u1", mode)),
                },
                rounds,
                context.seed,
            )
            topic.add(times, "µs", 1e6, f'memmap, mode "{mode}"')
            topic.want(
                f'memmap creation, mode "{mode}": time beside {NUMPY}',
                ratio(times, QUIRE, NUMPY),
                MEMMAP_LIMIT,
                at_least=False,
            )
    topic.checks.append("the first bytes of each array")


def _shared_memory(topic: Topic, context: Context, rounds: int) -> None:
    resource_tracker.ensure_running()
    numbers = itertools.count()

    def cycle(module: Any, given: bool) -> Callable[[], float]:
        def once() -> None:
            name = f"bench-{os.getpid()}-{next(numbers)}" if given else None
            made = module.SharedMemory(name, create=True, size=BLOCK_BYTES)
            same = module.SharedMemory(made.name)
            same.close()
            made.close()
            made.unlink()

        return lambda: _typical(once)

    for given, what in ((False, "a chosen name"), (True, "a given name")):
        calls = {name: cycle(module, given) for name, module in MODULES.items()}
        times = rounds_of(calls, rounds, context.seed)
        topic.add(times, "µs", 1e6, f"make, attach, close both, unlink; {what}")
        topic.want(
            f"make, attach and close with {what}: time beside {STANDARD}",
            ratio(times, QUIRE, STANDARD),
            SHARED_LIMIT,
            at_least=False,
        )
    blocks = {
        name: module.SharedMemory(create=True, size=BLOCK_BYTES) for name, module in MODULES.items()
    }
    for block in blocks.values():
        block.buf[0] = 7
    times = rounds_of(
        {name: (lambda name=name: _elsewhere(name, blocks[name].name)) for name in MODULES},
        rounds,
        context.seed,
    )
    topic.add(times, "µs", 1e6, "attach and close, in another process")
    topic.checks.append("the first byte of what was attached")
    for block in blocks.values():
        block.close()
        block.unlink()


def _elsewhere(way: str, name: str) -> float:
    """Seconds of an attach and close in a process that did not make the block."""
    code = f"""
import sys
from bench.compat_arrays import MODULES, _typical
from multiprocessing import resource_tracker
resource_tracker.ensure_running()
found = []
def once():
    block = MODULES[{way!r}].SharedMemory({name!r})
    found.append(block.buf[0])
    block.close()
print(_typical(once))
assert set(found) == {{7}}
"""
    if way == STANDARD:  # else the tracker takes the segment away at the end, as if it were its own
        code += f"resource_tracker.unregister('/{name}', 'shared_memory')\n"
    argv = [sys.executable, "-c", code]
    return float(subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout)


if __name__ == "__main__":
    topic_main(run)
