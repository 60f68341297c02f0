"""Random rows about the pool of huge pages: more is mapped, forked and stored than it has.

They know only roughly what is mapped, as those of `random_rows`. Every outcome hangs on how many
huge pages are free, so the pool must be nobody else's while such a row runs on the kernel.

A row that moves mappings has no private ones that were promised anything: when part of such a one
is moved, Linux 6.18 forgets the promises of the rest, and the machine's pool is smaller by those
until it is started anew (`fixup_hugetlb_reservations` clears them of the whole VMA).

A mapping that is populated replaces no other: Linux gives the pages of replaced shared memory back
when the call returns (its file is let go by then), and so has not got them for this.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from quire.testing.replay.rows import PAGE, Row

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.testing.replay.rows import Op

__all__ = ["random_huge_row"]

_HUGE = 2 << 20
_BLOCKS = 6
"""Huge pages' worth of the arena that is used."""
_PROCESSES_MAX = 3
_PLACES = (0, 100, PAGE - 4, 300 * PAGE, _HUGE - 8)
"""Where in a huge page bytes are stored and loaded; some lie across its end or a page's."""
_ADVICE = [
    *["DONTNEED"] * 6, *["REMOVE"] * 4, *["POPULATE_WRITE"] * 2, "POPULATE_READ", "DONTNEED_LOCKED",
    "FREE", "WILLNEED", "COLD", "PAGEOUT", "GUARD_INSTALL", "GUARD_REMOVE", "DONTFORK", "DOFORK",
    "WIPEONFORK", "HUGEPAGE", "NOHUGEPAGE", "MERGEABLE", "DONTDUMP", "DODUMP", "RANDOM",
]  # fmt: skip


def random_huge_row(seed: int, pool: int, count: int = 30) -> Row:
    """A row of about `count` operations without outcomes, the same for the same seed and pool."""
    return _Generator(seed, count).row(pool)


class _Generator:
    def __init__(self, seed: int, count: int) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.count = count
        self.moves = self.rng.random() < 0.4
        """Whether the row may move mappings."""
        self.processes = ["p0"]
        self.made = 1

    def row(self, pool: int) -> Row:
        """The row: random operations, then every process looks at all."""
        kinds: list[tuple[int, Callable[[], Op]]] = [
            (16, self._mmap),
            (5, self._munmap),
            (4, self._mprotect),
            (24, self._store),
            (14, self._load),
            (10, self._madvise),
            (5 * self.moves, self._mremap),
            (5, self._fork),
            (2, self._exit),
            (2, self._lock),
            (4, self._mincore),
            (2, lambda: {"op": "maps"}),
            (1, self._sync_or_seal),
        ]
        ops = [self._mmap()]
        weights, makers = [weight for weight, _ in kinds], [maker for _, maker in kinds]
        while len(ops) < self.count:
            process = self.rng.choice(self.processes)
            op = self.rng.choices(makers, weights)[0]()
            if op["op"] == "exit":
                process = self.processes.pop()
            ops.append(op if process == "p0" else {**op, "proc": process})
        for process in self.processes:
            ops.append({"op": "maps", "proc": process})
            for block in range(_BLOCKS):
                ops += [{"op": "load", "at": block * _HUGE + place, "n": 8, "proc": process}
                        for place in _PLACES[::2]]  # fmt: skip
        tags = (f"env:nr_hugepages={pool}", "arch:x86-64")
        return Row(f"seed {self.seed} of huge pages", True, {}, ops, [], tags)

    def _block(self) -> int:
        return self.rng.randrange(_BLOCKS) * _HUGE

    def _range(self, aligned: float = 0.9) -> tuple[int, int]:
        at = self._block()
        length = min(self.rng.randrange(1, 4) * _HUGE, _BLOCKS * _HUGE - at)
        if self.rng.random() > aligned:
            at += self.rng.choice([0, PAGE, 5 * PAGE])
            length -= self.rng.choice([0, PAGE, 7 * PAGE, 8 * PAGE])
        return at, length

    def _protection(self) -> str:
        return self.rng.choice(["rw"] * 7 + ["r"] * 2 + ["", "rwx"])

    def _mmap(self) -> Op:
        at, length = self._range()
        at -= at % _HUGE if self.rng.random() < 0.8 else 0
        flags = ["ANON", self.rng.choice(["PRIVATE"] * 5 + ["SHARED"] * 4)]
        flags.append(self.rng.choice(["FIXED"] * 5 + ["FIXED_NOREPLACE"]))
        if self.rng.random() < 0.9:
            flags.append("HUGETLB")
        if self.rng.random() < 0.3:
            flags.append(self.rng.choice(["NORESERVE", "NORESERVE", "POPULATE", "LOCKED"]))
        if {"POPULATE", "LOCKED"} & set(flags):
            flags[2] = "FIXED_NOREPLACE"
        if self.moves and "PRIVATE" in flags:
            flags.append("NORESERVE")
        op: Op = {"op": "mmap", "at": at, "len": length, "prot": self._protection()}
        offset = self.rng.choice([0] * 14 + [_HUGE, PAGE])
        return {**op, "flags": flags, "off": offset}

    def _munmap(self) -> Op:
        at, length = self._range()
        return {"op": "munmap", "at": at, "len": length}

    def _mprotect(self) -> Op:
        at, length = self._range()
        return {"op": "mprotect", "at": at, "len": length, "prot": self._protection()}

    def _store(self) -> Op:
        at = self._block() + self.rng.choice(_PLACES)
        at = min(at, _BLOCKS * _HUGE - 12)
        return {"op": "store", "at": at, "n": 12, "seed": self.rng.randrange(1, 250)}

    def _load(self) -> Op:
        at = min(self._block() + self.rng.choice(_PLACES), _BLOCKS * _HUGE - 12)
        return {"op": "load", "at": at, "n": 12}

    def _madvise(self) -> Op:
        at, length = self._range(0.8)
        return {"op": "madvise", "at": at, "len": length, "advice": self.rng.choice(_ADVICE)}

    def _mremap(self) -> Op:
        at, old = self._range()
        new = self.rng.choice([old, old, self.rng.randrange(1, 4) * _HUGE])
        if self.rng.random() < 0.6:
            to = self._block()
            new = min(new, _BLOCKS * _HUGE - to)
            flags = ["MAYMOVE", "FIXED", *(["DONTUNMAP"] if self.rng.random() < 0.1 else [])]
            return {"op": "mremap", "at": at, "old": old, "new": new, "flags": flags, "to": to}
        return {"op": "mremap", "at": at, "old": old, "new": min(new, _BLOCKS * _HUGE - at)}

    def _fork(self) -> Op:
        if self.made == _PROCESSES_MAX:
            return self._store()
        child = f"p{self.made}"
        self.made += 1
        self.processes.append(child)
        return {"op": "fork", "child": child}

    def _exit(self) -> Op:
        return {"op": "exit"} if len(self.processes) > 1 else self._load()

    def _lock(self) -> Op:
        at, length = self._range()
        return {"op": self.rng.choice(["mlock", "munlock"]), "at": at, "len": length}

    def _mincore(self) -> Op:
        return {"op": "mincore", "at": self._block(), "len": PAGE}

    def _sync_or_seal(self) -> Op:
        at, length = self._range()
        if self.rng.random() < 0.8:
            return {"op": "msync", "at": at, "len": length, "flags": ["SYNC"]}
        return {"op": "mseal", "at": at, "len": length}
