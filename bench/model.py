"""The machine in Python: how fast it translates, and how long the recorded rows take.

It is written to be read; these targets keep it fast enough to be an oracle as well.
"""

from __future__ import annotations

import time
from pathlib import Path

from bench.result import Context, Topic, topic_main
from bench.timing import median
from quire.model import Access, AddressSpace, Machine
from quire.model import flags as f
from quire.testing.replay.replay import Setting, replay
from quire.testing.replay.rows import read_rows

ROWS = Path(__file__).parents[1] / "tests/model/cases/random_cases.jsonl.gz"
PAGES = 32
ACCESSES = 200_000
ACCESSES_PER_S = 200_000
REPLAY_S_MAX = 60.0


def run(context: Context) -> Topic:
    """Translated accesses per second, and seconds for the random rows."""
    topic = Topic("model")
    rates = [_accesses_per_s() for _ in range(context.rounds)]
    topic.add({"TLB hits": rates}, "accesses/s", 1.0, "translation")
    topic.want("accesses with TLB hits", median(rates), ACCESSES_PER_S, at_least=True, unit="/s")
    rows = read_rows(ROWS)
    began = time.perf_counter()
    total = replay(rows, Setting())
    seconds = time.perf_counter() - began
    if total.mismatches:
        raise RuntimeError(f"the model disagrees with a recorded row: {total.mismatches[0]}")
    topic.add({f"{total.rows} rows": [seconds]}, "s", 1.0, "replay")
    topic.want("replay of the random rows", seconds, REPLAY_S_MAX, at_least=False, unit=" s")
    topic.checks.append(f"{total.ops} outcomes equal to the kernel's")
    return topic


def _accesses_per_s() -> float:
    space = AddressSpace(Machine())
    page = space.geometry.page_size
    prot, kind = f.PROT_READ | f.PROT_WRITE, f.MAP["PRIVATE"] | f.MAP["ANON"]
    start = space.mmap(0, PAGES * page, prot, kind)
    space.store(start, bytes(PAGES * page))
    addresses = [start + number % PAGES * page for number in range(ACCESSES)]
    began = time.perf_counter()
    for address in addresses:
        space.translate(address, Access.READ)
    return ACCESSES / (time.perf_counter() - began)


if __name__ == "__main__":
    topic_main(run)
