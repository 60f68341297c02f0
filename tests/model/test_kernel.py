"""The model beside the live kernel: recorded rows and fresh random sequences.

The answers are those of Linux 6.17 and later on x86-64; elsewhere there is nothing to compare.
"""

import os
import platform
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quire.testing.replay.random_rows import random_row
from quire.testing.replay.replay import Setting, outcomes, replay
from quire.testing.replay.rows import read_rows, same

CASES = Path(__file__).parent / "cases"
RELEASE = tuple(map(int, re.findall(r"\d+", platform.release())[:2]))
SEQUENCES = 200
KERNEL_RUNS = 6

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or RELEASE < (6, 17),
    reason="the recorded rules are those of Linux 6.17 and later on x86-64",
)


def first_difference(row):
    """Where model and kernel differ in every one of some runs; None if they agree in one.

    Several, for the kernel may write a file back at any moment, and then clears what was stored
    past its end.
    """
    model = list(outcomes(row, Setting(checked=True)))
    found = None
    for _ in range(KERNEL_RUNS):
        kernel = list(outcomes(row, Setting(on="kernel")))
        pairs = enumerate(zip(row.ops, kernel, model, strict=True))
        found = next(((i, op, k, m) for i, (op, k, m) in pairs if not same(k, m)), None)
        if found is None:
            return None
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="the rows were recorded as root")
@pytest.mark.parametrize("name", ["cases", "more_cases"])
def test_kernel_agrees_with_its_record(name):
    rows = read_rows(CASES / f"{name}.jsonl.gz")
    rows = [row for row in rows if "slow" not in row.tags]
    assert replay(rows, Setting(on="kernel")).mismatches == []


@pytest.mark.skipif(os.geteuid() != 0, reason="locking and priority are those of root")
def test_fresh_random_sequences():
    base = int(os.environ.get("QUIRE_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
    print("seed", base)
    compared = 0
    for number in range(2 * SEQUENCES):
        row = random_row(base + number, on_disk=number % 2 == 0)
        pooled = has_huge_pages()
        difference = first_difference(row)
        if not (asks_for_huge_pages(row) and (pooled or has_huge_pages())):
            assert difference is None, f"QUIRE_TEST_SEED={base}: {row.name}: {difference}"
            compared += 1
        if compared == SEQUENCES:
            return
    raise AssertionError(f"only {compared} sequences ask for nothing that this machine has more of")


def has_huge_pages() -> bool:
    """Whether the machine has a pool of huge pages, which the model has not."""
    return Path("/proc/sys/vm/nr_hugepages").read_text().strip() != "0"


def asks_for_huge_pages(row) -> bool:
    return any("HUGETLB" in str(op) for op in row.ops)


def test_replay_on_the_kernel_by_command():
    run = [sys.executable, "-m", "quire.testing.replay", "--on", "kernel", "--json"]
    done = subprocess.run(
        [*run, str(CASES / "few.jsonl")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert '"mismatches": []' in done.stdout
