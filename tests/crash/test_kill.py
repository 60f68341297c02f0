"""A writer that is killed: what a returned sync acknowledged is in the file.

The page cache outlives a process, so this shows the order of writes and acknowledgements, and what
evictions leave; that fdatasync is called, and what follows its failure, is in the write contract.
"""

from __future__ import annotations

import os
import random
import select
import signal
from pathlib import Path

import numpy as np
import pytest

import quire
from quire.testing import children
from quire.testing.content import new_seed
from quire.testing.pmaps import writable_pmaps

KILLS = 20
ELEMENTS = 64 << 10
GRANULE = 16 << 10
BUDGET = 128 << 10  # a quarter of the file
DELAY_S_MAX = 0.06


def elements_of(generation: int) -> np.ndarray:
    """What a generation writes: a run that evicts pages, and scattered elements."""
    rng = np.random.default_rng(generation)
    start = int(rng.integers(0, ELEMENTS // 2))
    run = np.arange(start, start + int(rng.integers(1, ELEMENTS // 2)))
    return np.union1d(run, rng.integers(0, ELEMENTS, 50))


def write_generations(path: Path, pmap: str, acknowledge: int) -> None:
    """Writes generation after generation until it is killed; tells of each that is synced."""
    mapping = quire.open(path, mode="r+", dtype="u8", pmap=pmap, budget=BUDGET, granule=GRANULE)
    array = mapping.array
    for generation in range(1, 1 << 30):
        array[elements_of(generation)] = generation
        mapping.sync()
        os.write(acknowledge, generation.to_bytes(4, "little"))


def kill_one(path: Path, pmap: str, delay_s: float) -> int:
    """Starts a writer on a new file, kills it after its first acknowledgement and ``delay_s``.

    Returns the last generation that it acknowledged.
    """
    path.write_bytes(bytes(ELEMENTS * 8))
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            write_generations(path, pmap, theirs)
        finally:
            os._exit(1)
    os.close(theirs)
    with open(ours, "rb", buffering=0) as pipe:
        said = pipe.read(4)
        select.select([], [], [], delay_s)
        os.kill(pid, signal.SIGKILL)
        said += pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == -signal.SIGKILL, "the writer failed by itself"
    return int.from_bytes(said[-4:], "little")


def check(path: Path, acknowledged: int) -> None:
    """The file is as the acknowledged generation left it, but for what the next one wrote."""
    expected = np.zeros(ELEMENTS, "u8")
    for generation in range(1, acknowledged + 1):
        expected[elements_of(generation)] = generation
    found = np.fromfile(path, "u8")
    assert len(found) == ELEMENTS
    differs = np.flatnonzero(found != expected)
    assert np.isin(differs, elements_of(acknowledged + 1)).all(), differs
    assert (found[differs] == acknowledged + 1).all(), acknowledged


def child_kills_writers(folder: str, pmap: str, seed: str) -> None:
    """Forks writers from an interpreter that has imported all and has no threads yet."""
    rng = random.Random(seed)
    generations = 0
    for number in range(KILLS):
        delay_s = rng.uniform(0, DELAY_S_MAX)
        acknowledged = kill_one(Path(folder) / "written", pmap, delay_s)
        print(f"kill {number} after {delay_s} s, generation {acknowledged}", flush=True)
        check(Path(folder) / "written", acknowledged)
        generations += acknowledged
    assert generations > KILLS, "no writer was killed in the middle of its work"


@pytest.mark.parametrize("pmap", writable_pmaps())
def test_what_was_acknowledged_is_in_the_file(pmap: str, tmp_path: Path) -> None:
    children.run(child_kills_writers, tmp_path, pmap, new_seed()).check()


if __name__ == "__main__":
    children.main()
