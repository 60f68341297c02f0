"""A file four times as large as a cgroup's memory: `quire.map` with a budget, beside `np.memmap`.

Each round of each side is a fresh process in a group of its own, `python -m bench.kernel_budget
--child SPEC`: it scans the file, which is not cached, then reads random rows of it. The group's
peak is what the kernel says it held at most, page cache included.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import quire
from bench import data
from bench.kernel import forget, pieces
from bench.result import Context, Topic, ratio, require, topic_main
from bench.timing import rounds_of, seconds, wake_processor
from quire.testing.cgroups import MemoryGroup, NoGroupError, memory_group

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
TIMES = 4
"""The file, in limits of the group."""
ROWS = 1000
ROUND_SECONDS_MAX = 300
WORKS = ("scan", "random rows")
SIDES = ("quire.map", "np.memmap")
SLACK_BYTES = 4 * MIB
"""What a process holds beside the pages of the file."""


@dataclass(frozen=True)
class Spec:
    """One process: whose mapping, of which file, and the group that it enters."""

    side: str
    path: str
    budget_bytes: int
    seed: int
    group: str
    version: int


def run(context: Context) -> Topic:
    """Both works on both sides, and the peaks of their groups."""
    topic = Topic("kernel_budget")
    plain = data.plain_path(Path(context.data))
    path = Path(context.out) / "kernel_budget.bin"
    with path.open("wb") as file:
        for _ in range(2):
            file.write(plain.read_bytes())
    size = path.stat().st_size
    limit = size // TIMES
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    calls = {side: _process(side, path, limit, context.seed, found[side]) for side in SIDES}
    try:
        rounds_of(calls, context.rounds, context.seed)
    except NoGroupError as error:
        topic.notes.append(f"a file beside a limit of memory: not measured: {error}")
        return topic
    finally:
        path.unlink()
    answers = [one["answers"] for runs in found.values() for one in runs]
    require(all(one == answers[0] for one in answers), "sums and rows of all rounds")
    topic.checks.append("sums and rows are equal on both sides in all rounds")
    for work in WORKS:
        times = {side: [one[work] for one in runs[1:]] for side, runs in found.items()}
        scale, unit = (1e6 / ROWS, "µs a row") if work == "random rows" else (1.0, "s")
        topic.add(times, unit, scale, f"{work} under a limit")
        faster = ratio(times, "np.memmap", "quire.map")
        topic.want(f"{work} under a limit: speed beside np.memmap", faster, 1.0, at_least=True)
    peaks = {side: [one["peak"] / limit for one in runs[1:]] for side, runs in found.items()}
    topic.add(peaks, "of the limit", 1.0, "peak of the group")
    most = max(one["peak"] for one in found["quire.map"]) / (limit // 2 + SLACK_BYTES)
    topic.want("highest peak of the group beside budget and 4 MiB", most, 1.0, at_least=False)
    topic.notes.append(
        f"a file of {size // MIB} MiB, limit {limit // MIB}, budget {limit // 2 // MIB}"
    )
    return topic


def _process(
    side: str, path: Path, limit: int, seed: int, found: list[dict[str, Any]]
) -> Callable[[], float]:
    """Runs one side anew and keeps what it says, the round to warm up included."""

    def call() -> float:
        forget(path)
        with memory_group(limit) as group:
            spec = Spec(side, str(path), limit // 2, seed, str(group.path), group.version)
            argv = [
                sys.executable,
                "-m",
                "bench.kernel_budget",
                "--child",
                json.dumps(asdict(spec)),
            ]
            done = subprocess.run(
                argv, stdout=subprocess.PIPE, text=True, timeout=ROUND_SECONDS_MAX, check=True
            )
            found.append(json.loads(done.stdout) | {"peak": group.peak_bytes})
        return float(sum(found[-1][work] for work in WORKS))

    return call


def _child(spec: Spec) -> dict[str, Any]:
    """Seconds of each work, and answers to compare."""
    path = Path(spec.path)
    count = path.stat().st_size // 4096
    chosen = np.random.default_rng(spec.seed).integers(0, count, ROWS)
    wake_processor()
    MemoryGroup(Path(spec.group), spec.version).enter()
    if spec.side == "quire.map":
        mapping = quire.map(
            path, sharing="shared", dtype="u8", budget=spec.budget_bytes, cache="drop"
        )
        array = mapping.array
    else:
        array = np.asarray(np.memmap(path, "u8", "r"))
    answers: list[int] = []
    return {
        "scan": seconds(lambda: answers.append(pieces(array))),
        "random rows": seconds(lambda: answers.append(_rows(array, chosen))),
        "answers": answers,
    }


def _rows(array: np.ndarray, chosen: np.ndarray) -> int:
    return sum(int(array[row * 512 : (row + 1) * 512].sum()) for row in chosen.tolist())


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        print(json.dumps(_child(Spec(**json.loads(sys.argv[2])))))
    else:
        topic_main(run)
