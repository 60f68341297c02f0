"""An anonymous array four times as large as its memory, beside the kernel's own swap.

Each round of each side is a fresh process, `python -m bench.swap --child SPEC`: it makes the array,
then sums it, adds 1 to random elements, and sorts it in place. quire's is `quire.empty(budget=...)`
in a cgroup that allows the budget and a quarter more, as its swap file goes through the page cache,
which would otherwise keep all of it in memory. The kernel's is a plain `numpy.empty` in the same
cgroup: it may use that quarter too. Where the kernel cannot swap fast enough for its limit it kills
the process: that round is begun anew, and counted.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import quire
from bench import data
from bench.kernel_swap import NotHereError, kernel_swap
from bench.result import Context, Topic, ratio, require, topic_main
from bench.timing import rounds_of, seconds, wake_processor

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.testing.cgroups import MemoryGroup

MIB = 1 << 20
SIZE_BYTES_MAX = 256 * MIB
UPDATE_COUNT = 10_000
WORKS = ("sum", "random update", "sort")
# A round that takes longer than this is not going to end.
ROUND_SECONDS_MAX = 120
# How often a round whose process the kernel has killed is begun.
TRIES = 4


@dataclass(frozen=True)
class Spec:
    """One process: whose array, how much of it may be in memory, and in which cgroup it runs."""

    side: str
    size_bytes: int
    budget_bytes: int
    folder: str
    seed: int
    group: str | None


def run(context: Context) -> Topic:
    """The three works on both sides, where the kernel's can be had."""
    topic = Topic("swap")
    plain = data.plain_path(Path(context.data)).stat().st_size
    size = min(SIZE_BYTES_MAX, plain // MIB * MIB)
    out = Path(context.out)
    try:
        with kernel_swap(out, size // 4 + size // 16, 2 * size) as group:
            _measure(topic, context, size, group)
    except NotHereError as error:
        _measure(topic, context, size, None)
        for work in WORKS:
            topic.notes.append(f"{work} beside the kernel's swap: not measured: {error}")
    return topic


def _measure(topic: Topic, context: Context, size: int, group: MemoryGroup | None) -> None:
    sides: dict[str, tuple[str, str | None]] = {"quire, page cache not limited": ("quire", None)}
    if group is not None:
        sides["quire"] = ("quire", str(group.path))
        sides["kernel"] = ("kernel", str(group.path))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    killed: list[str] = []
    calls: dict[str, Callable[[], float]] = {
        name: _process(
            Spec(side, size, size // 4, context.out, context.seed, chosen), found[name], killed
        )
        for name, (side, chosen) in sides.items()
    }
    rounds = max(5, context.rounds)
    rounds_of(calls, rounds, context.seed)
    answers = [one["answers"] for runs in found.values() for one in runs]
    require(all(one == answers[0] for one in answers), "sums and sorted elements of all rounds")
    topic.checks.append("sums and sorted elements are equal on all sides in all rounds")
    for work in WORKS:
        times = {name: [one[work] for one in runs[-rounds:]] for name, runs in found.items()}
        scale, unit = (1e6 / UPDATE_COUNT, "µs") if work == "random update" else (1.0, "s")
        topic.add(times, unit, scale, work)
        if group is not None:
            faster = ratio(times, "kernel", "quire")
            topic.want(f"swap, {work}: faster than the kernel", faster, 1.0, at_least=True)
    topic.notes.append(f"an array of {size // MIB} MiB, {size // 4 // MIB} MiB of it in memory")
    if killed:
        topic.notes.append(
            f"processes that the kernel killed for want of memory, their rounds begun anew: "
            f"{killed.count('kernel')} of its own side, {killed.count('quire')} of quire's"
        )


def _process(spec: Spec, found: list[dict[str, Any]], killed: list[str]) -> Callable[[], float]:
    """Runs one side anew and keeps what it says, the round to warm up included."""
    argv = [sys.executable, "-m", "bench.swap", "--child", json.dumps(asdict(spec))]

    def call() -> float:
        for _ in range(TRIES):
            done = subprocess.run(
                argv, stdout=subprocess.PIPE, text=True, timeout=ROUND_SECONDS_MAX
            )
            if done.returncode != -signal.SIGKILL:
                done.check_returncode()
                found.append(json.loads(done.stdout))
                return float(sum(found[-1][work] for work in WORKS))
            killed.append(spec.side)
        raise RuntimeError(f"the kernel has killed {TRIES} processes of {spec.side} in a row")

    return call


def _child(spec: Spec) -> dict[str, Any]:
    """Seconds of each work, and answers to compare.

    The process enters its cgroup when its modules are loaded: what it has touched before counts
    for the group it came from, so the limit is for the array.
    """
    count, random = spec.size_bytes // 8, np.random.default_rng(spec.seed)
    stretch = count // UPDATE_COUNT
    chosen = np.arange(UPDATE_COUNT) * stretch + random.integers(0, stretch, UPDATE_COUNT)
    random.shuffle(chosen)
    if spec.group is not None:
        Path(spec.group, "cgroup.procs").write_text(str(os.getpid()))
    array = _empty(spec, count)
    _fill(array, random)
    sums: list[int] = []
    wake_processor()
    times = {
        "sum": seconds(lambda: sums.append(int(array.sum()))),
        "random update": seconds(lambda: _update(array, chosen)),
        "sort": seconds(array.sort),
    }
    sums.append(int(array.sum()))
    require(sums[1] - sums[0] == UPDATE_COUNT, "the sum after the update")
    require(_is_sorted(array), "the order after sorting")
    if spec.side == "quire":
        require(quire.mapping_of(array).statistics().swap_bytes > 0, "an array without swapping")
    elif spec.group is not None:
        require(_kernel_swapped() > 0, "a process without swapping")
    return times | {"answers": [*sums, *array[:: count // 64].tolist()]}


def _empty(spec: Spec, count: int) -> Any:
    if spec.side == "kernel":
        return np.empty(count, dtype=np.int64)
    swap = quire.Swap(folder=spec.folder)
    return quire.empty(count, np.int64, budget=spec.budget_bytes, swap=swap)


def _fill(array: Any, random: Any) -> None:
    """Random numbers, made in blocks so that no second array is needed."""
    block = MIB // 8
    for first in range(0, len(array), block):
        part = array[first : first + block]
        part[:] = random.integers(0, 1 << 40, len(part))


def _update(array: Any, chosen: Any) -> None:
    """Adds 1 to random elements; a mapping is told that they come in no order."""
    mapping = quire.mapping_of(array) if _is_quire(array) else None
    advise = getattr(mapping, "advise", None)
    if advise is not None:
        advise("random")
    for index in chosen.tolist():
        array[index] += 1
    if advise is not None:
        advise("normal")


def _is_quire(array: Any) -> bool:
    try:
        quire.mapping_of(array)
    except ValueError:
        return False
    return True


def _is_sorted(array: Any) -> bool:
    """Whether it is, in blocks that overlap by one element."""
    block = MIB // 8
    return all(
        bool((part[1:] >= part[:-1]).all())
        for part in (array[first : first + block + 1] for first in range(0, len(array), block))
    )


def _kernel_swapped() -> int:
    """Bytes of this process that are swapped out just now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmSwap:"):
            return int(line.split()[1]) << 10
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        print(json.dumps(_child(Spec(**json.loads(sys.argv[2])))))
    else:
        topic_main(run)
