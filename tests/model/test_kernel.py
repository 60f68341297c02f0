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

from quire.testing import huge_pages
from quire.testing.replay.model_world import ModelWorld
from quire.testing.replay.random_huge_rows import random_huge_row
from quire.testing.replay.random_rows import random_row
from quire.testing.replay.replay import Setting, outcomes, replay
from quire.testing.replay.rows import read_rows, same

CASES = Path(__file__).parent / "cases"
RELEASE = tuple(map(int, re.findall(r"\d+", platform.release())[:2]))
SEQUENCES = 200
HUGE_SEQUENCES = 60
POOL = 4
"""Huge pages in the pool of those sequences and of the recorded rows."""
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


def lasting_mismatches(rows):
    """Those that come in all of several runs: where the kernel maps things is drawn by lot."""
    mismatches = []
    for _ in range(KERNEL_RUNS):
        mismatches = replay(rows, Setting(on="kernel")).mismatches
        rows = [row for row in rows if row.name in {found["row"] for found in mismatches}]
    return mismatches


@pytest.mark.skipif(os.geteuid() != 0, reason="the rows were recorded as root")
@pytest.mark.parametrize("name", ["cases", "more_cases"])
def test_kernel_agrees_with_its_record(name):
    rows = read_rows(CASES / f"{name}.jsonl.gz")
    rows = [row for row in rows if "slow" not in row.tags]
    assert lasting_mismatches(rows) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="locking and priority are those of root")
def test_fresh_random_sequences():
    base = int(os.environ.get("QUIRE_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
    print("seed", base)
    with huge_pages.pool_of(0):
        for number in range(SEQUENCES):
            row = random_row(base + number, on_disk=number % 2 == 0)
            difference = first_difference(row)
            assert difference is None, f"QUIRE_TEST_SEED={base}: {row.name}: {difference}"


@pytest.mark.skipif(os.geteuid() != 0, reason="root fills the pool")
def test_fresh_random_sequences_in_huge_pages():
    base = int(os.environ.get("QUIRE_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
    print("seed", base)
    with huge_pages.pool_of(POOL):
        lost = huge_pages.counted("resv")
        for number in range(HUGE_SEQUENCES):
            row = random_huge_row(base + number, POOL)
            model = list(outcomes_in_pool(row, lost))
            kernel = list(outcomes(row, Setting(on="kernel")))
            pairs = enumerate(zip(row.ops, kernel, model, strict=True))
            found = next(((i, op, k, m) for i, (op, k, m) in pairs if not same(k, m)), None)
            assert found is None, f"QUIRE_TEST_SEED={base}: {row.name}: {found}"
            assert huge_pages.counted("resv") == lost, f"{row.name} has lost promises for ever"


def outcomes_in_pool(row, lost):
    """The model's outcomes, in a pool some of whose pages are promised to nobody any more.

    Linux loses promises; then more pages are free than may be taken, and a page promised twice is.
    """
    machine = Setting().machine(row)
    machine.huge_pool.size += lost
    machine.huge_pool.promised += lost
    world = ModelWorld(row, machine, checked=not lost)
    return (world.do(op) for op in row.ops)


@pytest.mark.skipif(os.geteuid() != 0, reason="root fills the pool")
def test_kernel_agrees_with_its_record_of_huge_pages():
    with huge_pages.pool_of(POOL):
        total = replay(read_rows(CASES / "huge_cases.jsonl.gz"), Setting(on="kernel"))
    assert total.mismatches == []
    assert not total.skipped


def test_replay_on_the_kernel_by_command():
    run = [sys.executable, "-m", "quire.testing.replay", "--on", "kernel", "--json"]
    done = subprocess.run(
        [*run, str(CASES / "few.jsonl")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert '"mismatches": []' in done.stdout
