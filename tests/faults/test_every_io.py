"""Every transfer of a workload fails, once and from there on, is cut short, or moves nothing.

The system calls themselves are changed (`inject.c`), so that what continues a short transfer is
tested too, and the swap file as well as the store. After each failure either an error said so, or
all is right; what was acknowledged is there once the disk works again.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path

import injection
import numpy as np
import pytest

import quire
from quire import _core
from quire.testing import children
from quire.testing.content import new_seed
from quire.testing.pmaps import writable_pmaps

PAGE = _core.page_bytes()
PAGES = 32
SIZE = PAGES * PAGE
BUDGET = 8 * PAGE
SAMPLES = 12
FILLER = 255
EFFECTS = (errno.EIO, errno.ENOSPC, injection.SHORT, injection.EMPTY)
ERRORS = (quire.PageIOError, quire.SyncError, quire.SwapFullError)
RETRIES_MAX = 20
Run = Callable[["Workload", int], None]


class Workload:
    """Reads, writes, evicts and syncs an array, and knows what must be in it.

    A write that raised may have happened in part: its bytes are as before or as written. So is one
    to a mapping that has failed for good: pages that cannot be had are filled with 0xFF there,
    which the content never has, and take no more.
    """

    def __init__(self, mapping: quire.Mapping, content: np.ndarray, seed: int) -> None:
        self.mapping = mapping
        self.array = mapping.array
        self.model = content.copy()
        self.perhaps: list[np.ndarray] = []
        self.told: list[quire.Error] = []
        self.rng = np.random.default_rng(seed)

    def run(self) -> None:
        self.read_all()
        self.write_some()
        self.attempt(self.mapping.sync)
        self.write_some()
        self.read_all()
        self.attempt(self.mapping.sync)

    def attempt(self, function: Callable[[], object]) -> bool:
        """Calls it; an error that comes, also by way of a touch, is looked at and kept."""
        try:
            function()
            for _ in range(10):  # where a pending error arrives
                pass
        except ERRORS as error:
            self.told.append(error.with_traceback(None))
            return False
        return True

    def read_all(self) -> None:
        for start in range(0, SIZE, PAGE):
            self.read(slice(start, start + PAGE))

    def read(self, where: slice) -> None:
        found: list[np.ndarray] = []
        if self.attempt(lambda: found.append(self.array[where].copy())):
            filler = self.mapping.failed is not None and bool((found[0] == FILLER).all())
            assert filler or self.allows(found[0], where), f"wrong data at {where.start}"

    def write_some(self) -> None:
        for _ in range(12):
            length = int(self.rng.integers(1, 3 * PAGE))
            start = int(self.rng.integers(0, SIZE - length))
            where = slice(start, start + length)
            values = self.rng.integers(0, 255, length, "u1")
            done = self.attempt(lambda where=where, values=values: self.assign(where, values))
            if done and self.mapping.failed is None:
                self.model[where] = values
                for layer in self.perhaps:
                    layer[where] = -1
            else:
                self.perhaps.append(np.full(SIZE, -1, "i2"))
                self.perhaps[-1][where] = values

    def assign(self, where: slice, values: np.ndarray) -> None:
        self.array[where] = values

    def allows(self, found: np.ndarray, where: slice) -> bool:
        right = found == self.model[where]
        for layer in self.perhaps:
            right |= found == layer[where]
        return bool(right.all())


def check_told(told: list[quire.Error], effect: int, label: str) -> None:
    """Each error says where, in what, and why."""
    for error in told:
        assert error.source == label, error
        assert error.offset is not None, error
        empty_read = isinstance(error, quire.TruncatedError)
        wanted = {effect} if effect > 0 else {None} if empty_read else {errno.EIO}
        assert error.errno in wanted, error
    assert effect != injection.SHORT or not told, "a short transfer is continued"


def settle(work: Workload) -> None:
    """The disk works again: a sync writes everything, and says so where a page was given up."""
    work.told.clear()
    while not work.attempt(work.mapping.sync):
        if work.mapping.failed is not None and isinstance(work.told[-1], quire.PageIOError):
            break
        assert len(work.told) < RETRIES_MAX, work.told[-1]
    else:
        assert work.mapping.failed is None


def check_store(path: Path, pmap: str, seed: int, run: Run) -> None:
    content = np.random.default_rng(seed).integers(0, FILLER, SIZE, "u1")
    content.tofile(path)
    with quire.open(
        path, mode="r+", dtype="u1", pmap=pmap, budget=BUDGET, granule=PAGE, retries=0
    ) as mapping:
        work = Workload(mapping, content, seed)
        run(work, path.stat().st_ino)
        settle(work)
        if mapping.failed is None:
            work.told.clear()
            work.read_all()
            assert not work.told
        assert work.allows(np.fromfile(path, "u1"), slice(0, SIZE)), "lost"
        del work.array
    assert work.allows(np.fromfile(path, "u1"), slice(0, SIZE)), "lost on closing"


def check_swap(path: Path, pmap: str, seed: int, run: Run) -> None:
    swap = quire.Swap(folder=str(path.parent))
    with quire.anonymous(SIZE, pmap=pmap, budget=BUDGET, granule=PAGE, swap=swap) as mapping:
        work = Workload(mapping, np.zeros(SIZE, "u1"), seed)
        work.write_some()
        work.write_some()
        assert not work.told
        run(work, injection.NAMELESS)
        if mapping.failed is None:
            work.told.clear()
            work.read_all()
            assert not work.told
        del work.array


CHECKS = {"store": check_store, "swap": check_swap}


def child_fails_each(folder: str, pmap: str, backing: str, seed: str, samples: str) -> None:
    """All transfers, or a number of them chosen at random, in every way."""
    plan, rng = injection.in_child(), random.Random(seed)
    path = Path(folder) / "backing"

    def once(effect: int, first: int, count: int) -> int:
        """Runs the workload once; gives the number of errors that were told."""
        told = []

        def run(work: Workload, inode: int) -> None:
            with plan.on(effect, first, count, inode):
                work.run()
            check_told(work.told, effect, work.mapping.source)
            told.extend(work.told)

        CHECKS[backing](path, pmap, int(seed), run)
        return len(told)

    assert once(0, 0, 0) == 0
    transfers = plan.seen
    assert transfers > 2 * PAGES
    hits = errors = 0
    for effect in EFFECTS:
        numbers = range(transfers)
        chosen = numbers if int(samples) == 0 else sorted(rng.sample(numbers, int(samples)))
        for first in chosen:
            for count in (1, injection.FOR_EVER):
                print(
                    f"{backing} {pmap} effect {effect} transfer {first} count {count}", flush=True
                )
                errors += once(effect, first, count) > 0
                hits += plan.hit > 0
    # A transfer more or less is done each time, as threads meet; some failures nobody need know of.
    assert hits > len(EFFECTS) * len(chosen)
    assert errors > len(chosen)


def fail(tmp_path: Path, pmap: str, backing: str, samples: int, timeout_s: float) -> None:
    environment = injection.build(tmp_path)
    arguments = (tmp_path, pmap, backing, new_seed(), samples)
    children.run(child_fails_each, *arguments, env=environment, timeout_s=timeout_s).check()


@pytest.mark.parametrize("backing", CHECKS)
@pytest.mark.parametrize("pmap", writable_pmaps())
def test_some_transfers_fail(pmap: str, backing: str, tmp_path: Path) -> None:
    fail(tmp_path, pmap, backing, SAMPLES, 60)


@pytest.mark.long
@pytest.mark.parametrize("backing", CHECKS)
@pytest.mark.parametrize("pmap", writable_pmaps())
def test_every_transfer_fails(pmap: str, backing: str, tmp_path: Path) -> None:
    fail(tmp_path, pmap, backing, 0, 800)


if __name__ == "__main__":
    children.main()
