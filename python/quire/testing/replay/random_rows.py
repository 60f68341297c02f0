"""Random rows: sequences of operations from a seed, most of them aimed at what is mapped.

The generator knows only roughly what is mapped where; that is enough to make most accesses meet
something.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from quire.model.flags import MADV
from quire.testing.replay.rows import PAGE, Row

if TYPE_CHECKING:
    from collections.abc import Callable

    from quire.testing.replay.rows import Op

__all__ = ["PAGES", "random_row"]

PAGES = 24
"""Pages of the arena that are used."""
_PROCESSES_MAX = 4
_HALF = 1 << 47
_FILES = {
    "A": {"size": 5 * PAGE + 100, "seed": 1},
    "B": {"size": 3 * PAGE, "seed": 2},
    "C": {"size": 700, "seed": 3},
    "E": {"size": 0, "byte": 0},
}
_SIZES = [0, 1, 100, 4095, 4096, 4097, 6000, 8192, 12288, 16384, 20000, 20480, 24000, 24576]
_OPENED = (("rw", "A", "B", "C", "E"), ("r", "A", "B"), ("w", "A"), ("append", "A"), ("path", "A"))
"""Files by the way they are opened; a descriptor is called after the file and the way."""
_MAPPED_FDS = [
    "A",
    "A",
    "A",
    "A",
    "A2",
    "B",
    "B",
    "C",
    "E",
    "Ar",
    "Br",
    "Aw",
    "Aappend",
    "Apath",
    "P",
]
_WRITTEN_FDS = ["A", "A", "A2", "B", "B", "C", "C", "E", "Ar", "Aw", "Aappend"]
_RARE_FLAGS = [
    *["POPULATE", "NORESERVE", "LOCKED", "STACK", "NONBLOCK", "DENYWRITE", "EXECUTABLE", "SYNC"],
    *["UNINITIALIZED", "GROWSDOWN", "HUGETLB"],
]
_ADVICE = [
    *["DONTNEED", "DONTNEED", "REMOVE", "REMOVE", "GUARD_INSTALL", "GUARD_INSTALL", "PAGEOUT"],
    *(name for name in MADV if name not in ("HWPOISON", "SOFT_OFFLINE", "COLLAPSE", "PAGEOUT")),
    *[5, 26, 99],
]
"""Every advice and some that are none; those that decide what is read come more often."""


def random_row(seed: int, count: int = 30, *, on_disk: bool = True) -> Row:
    """A row of about `count` operations without outcomes, the same for the same seed."""
    return _Generator(seed, count).row(on_disk)


class _Generator:
    def __init__(self, seed: int, count: int) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.count = count
        self.mapped: dict[str, set[int]] = {"p0": set()}
        self.made = 1
        self.process = "p0"
        self.kinds: list[tuple[int, Callable[[], Op]]] = [
            (20, self._mmap),
            (5, self._munmap),
            (9, self._mprotect),
            (24, self._store),
            (17, self._load),
            (10, self._read_or_write),
            (5, self._truncate),
            (3, self._msync),
            (12, self._madvise),
            (9, self._mremap),
            (3, self._mlock),
            (4, self._mincore),
            (5, lambda: {"op": "maps"}),
            (3, self._fork),
            (1, self._exit),
            (2, self._punch),
            (2, self._buffer),
            (1, self._remap_file_pages),
            (2, self._wrong),
            (1, self._stack),
            (2, self._zeros),
            (1, self._elsewhere),
            (1, self._future_locks),
            (2, self._mseal),
            (1, self._seal_file),
            (1, self._at_the_edge),
        ]

    def row(self, on_disk: bool) -> Row:
        """The row: files are opened, then come the random operations, then all is looked at."""
        ops: list[Op] = [
            {"op": "open", "file": name, "mode": mode, "fd": name if mode == "rw" else name + mode}
            for mode, *names in _OPENED
            for name in names
        ]
        ops.append({"op": "open", "file": "A", "mode": "rw", "fd": "A2"})
        ops.append({"op": "open", "file": "/dev/zero", "mode": "rw", "fd": "Z"})
        ops.append({"op": "pipe", "r": "P", "w": "Q"})
        opened = len(ops)
        ops += [self._next(self._mmap), self._next(self._mmap)]
        weights = [weight for weight, _ in self.kinds]
        makers = [maker for _, maker in self.kinds]
        while len(ops) < self.count + opened:
            ops.append(self._next(self.rng.choices(makers, weights)[0]))
        # On the kernel the interpreter's own memory would be locked and counted, too.
        locks_all = any(op["op"] == "mlockall" for op in ops)
        for name in self.mapped:
            ops.append({"op": "maps", "proc": name})
            ops.append({"op": "snapshot", "page": 0, "pages": PAGES, "proc": name})
            if not locks_all:
                ops.append({"op": "vmlck", "proc": name})
        ops += [{"op": "fhash", "fd": name} for name in _FILES]
        kind = "disk" if on_disk else "memory"
        return Row(f"seed {self.seed} on {kind}", on_disk, _FILES, ops, [])

    def _next(self, maker: Callable[[], Op]) -> Op:
        self.process = self.rng.choice(sorted(self.mapped))
        op = maker()
        if self.process != "p0":
            op["proc"] = self.process
        return op

    # Places and lengths.

    @property
    def live(self) -> set[int]:
        """Pages that are probably mapped in the acting process."""
        return self.mapped[self.process]

    def _at(self, hit: float = 0.85) -> int:
        if self.live and self.rng.random() < hit:
            return self.rng.choice(sorted(self.live)) * PAGE
        return self.rng.randrange(PAGES) * PAGE

    def _range(self, pages: int = 6, hit: float = 0.8) -> tuple[int, int]:
        at = self._at(hit)
        if self.rng.random() < 0.3:
            at = max(0, at - PAGE * self.rng.randrange(3))
        return at, min(self.rng.randrange(1, pages + 1) * PAGE, PAGES * PAGE - at)

    def _protection(self) -> str:
        return self.rng.choice(["rw"] * 6 + ["r"] * 3 + ["", "w", "x", "rx", "rwx"])

    @staticmethod
    def _pages(at: int, length: int) -> range:
        return range(at // PAGE, (at + length + PAGE - 1) // PAGE)

    # Operations.

    def _mmap(self) -> Op:
        at, length = self._range(hit=0.35)
        place = self.rng.choice(["FIXED"] * 7 + ["FIXED_NOREPLACE"] * 2 + [""])
        flags = [self.rng.choice(["SHARED"] * 4 + ["PRIVATE"] * 4 + ["SHARED_VALIDATE"])]
        op: Op = {"op": "mmap", "at": at, "len": length, "prot": self._protection()}
        if self.rng.random() < 0.4:
            kinds = ["PRIVATE"] * 8 + ["SHARED"] * 4 + ["DROPPABLE", "SHARED_VALIDATE"]
            flags = ["ANON", self.rng.choice(kinds)]
        else:
            op["fd"] = self.rng.choice(_MAPPED_FDS)
            op["off"] = self.rng.choice([0, 0, 0, 1, 1, 2, 3, 4, 5]) * PAGE
        if place:
            flags.append(place)
        if self.rng.random() < 0.12:
            flags.append(self.rng.choice(_RARE_FLAGS))
        if place == "FIXED" or not self.live & set(self._pages(at, length)):
            self.live.update(self._pages(at, length))
        return {**op, "flags": flags}

    def _munmap(self) -> Op:
        at, length = self._range(3)
        length -= self.rng.choice([0, 0, 0, 1, PAGE - 1])
        self.live.difference_update(self._pages(at, length))
        return {"op": "munmap", "at": at, "len": length}

    def _mprotect(self) -> Op:
        at, length = self._range(4)
        return {"op": "mprotect", "at": at, "len": length, "prot": self._protection()}

    def _store(self) -> Op:
        seed = self.rng.randrange(1, 250)
        if self.rng.random() < 0.3:
            at, length = self._range(3, 0.93)
            inside = self.rng.randrange(PAGE)
            at = at + inside if at + inside + length < PAGES * PAGE else at
            return {"op": "store", "at": at, "n": length, "seed": seed}
        at = self._at(0.93) + self.rng.choice([0, 1, self.rng.randrange(PAGE - 64), 4032])
        return {"op": "store", "at": at, "n": self.rng.choice([1, 8, 64]), "seed": seed}

    def _load(self) -> Op:
        if self.rng.random() < 0.4:
            at, length = self._range(3, 0.93)
            return {"op": "load", "at": at, "n": length}
        at = self._at(0.93) + self.rng.choice([0, self.rng.randrange(PAGE - 64), 4032])
        return {"op": "load", "at": at, "n": self.rng.choice([1, 8, 64])}

    def _read_or_write(self) -> Op:
        fd, offset = self.rng.choice(_WRITTEN_FDS), self.rng.randrange(8) * 2048
        if self.rng.random() < 0.4:
            count = self.rng.choice([0, 16, 100, 4096, 9000])
            return {"op": "pread", "fd": fd, "off": offset, "n": count}
        count = self.rng.choice([1, 16, 3000, 4096, 9000])
        seed, offset = self.rng.randrange(1, 250), offset + self.rng.choice([0, 0, 5])
        return {"op": "pwrite", "fd": fd, "off": offset, "n": count, "seed": seed}

    def _truncate(self) -> Op:
        fd = self.rng.choice(["A", "A2", "B", "B", "C", "C", "E", "Ar"])
        return {"op": "ftruncate", "fd": fd, "size": self.rng.choice(_SIZES)}

    def _msync(self) -> Op:
        at, length = self._range()
        flags = self.rng.sample(["ASYNC", "SYNC", "INVALIDATE"], self.rng.choice([0, 1, 1, 1, 2]))
        return {"op": "msync", "at": at, "len": length, "flags": flags}

    def _madvise(self) -> Op:
        at, length = self._range(3)
        return {"op": "madvise", "at": at, "len": length, "advice": self.rng.choice(_ADVICE)}

    def _mremap(self) -> Op:
        at, old = self._range(3, 0.95)
        new = self.rng.choice([old, self.rng.randrange(1, 5) * PAGE])
        if self.rng.random() < 0.5:
            to = self._at(0.3)
            new = min(new, PAGES * PAGE - to)
            flags = ["MAYMOVE", "FIXED"]
            kept = self.rng.random() < 0.15
            if kept:
                flags.append("DONTUNMAP")
            else:
                self.live.difference_update(self._pages(at, old))
            self.live.update(self._pages(to, new))
            old = 0 if self.rng.random() < 0.07 else old
            return {"op": "mremap", "at": at, "old": old, "new": new, "flags": flags, "to": to}
        new = min(new, PAGES * PAGE - at)
        if new < old:
            self.live.difference_update(self._pages(at + new, old - new))
        flags = ["MAYMOVE"] if self.rng.random() < 0.1 else []
        return {"op": "mremap", "at": at, "old": old, "new": new, "flags": flags}

    def _mlock(self) -> Op:
        at, length = self._range(3)
        name = self.rng.choice(["mlock", "munlock", "munlock", "mlock2"])
        op: Op = {"op": name, "at": at, "len": length}
        return {**op, "flags": self.rng.randrange(3)} if name == "mlock2" else op

    def _mincore(self) -> Op:
        at, length = self._range()
        return {"op": "mincore", "at": at, "len": length}

    def _fork(self) -> Op:
        if self.made == _PROCESSES_MAX:
            return self._load()
        child = f"p{self.made}"
        self.made += 1
        self.mapped[child] = set(self.live)
        return {"op": "fork", "child": child}

    def _exit(self) -> Op:
        if self.process == "p0":
            return self._load()
        del self.mapped[self.process]
        return {"op": "exit"}

    def _punch(self) -> Op:
        offset = self.rng.randrange(5) * PAGE + self.rng.choice([0, 0, 100])
        count = self.rng.choice([4096, 8192, 500])
        return {"op": "punch", "fd": self.rng.choice("AB"), "off": offset, "n": count}

    def _buffer(self) -> Op:
        at = self._at(0.9) + self.rng.choice([0, 100, 4000])
        name = self.rng.choice(["read_into", "write_from"])
        fd, offset = self.rng.choice(["A", "B", "C", "E", "Z", "Ar"]), self.rng.randrange(4) * 2048
        count = self.rng.choice([0, 16, 5000, 9000])
        return {"op": name, "fd": fd, "at": at, "n": count, "off": offset}

    def _remap_file_pages(self) -> Op:
        at, length = self._range(2)
        page = self.rng.randrange(5)
        prot = self.rng.choice([0] * 9 + [1])
        return {"op": "remap_file_pages", "at": at, "len": length, "pgoff": page, "prot": prot}

    def _stack(self) -> Op:
        at, length = self._range(2, 0.3)
        self.live.update(self._pages(at, length))
        flags = ["PRIVATE", "ANON", "FIXED", "GROWSDOWN"]
        return {"op": "mmap", "at": at, "len": length, "prot": self._protection(), "flags": flags}

    def _zeros(self) -> Op:
        at, length = self._range(4, 0.4)
        self.live.update(self._pages(at, length))
        flags = [self.rng.choice(["PRIVATE", "PRIVATE", "SHARED"]), "FIXED"]
        op: Op = {"op": "mmap", "at": at, "len": length, "prot": self._protection()}
        return {**op, "flags": flags, "fd": "Z", "off": self.rng.choice([0, 0, PAGE])}

    def _elsewhere(self) -> Op:
        at, old = self._range(3, 0.95)
        op: Op = {"op": "mremap", "at": at, "old": old}
        if self.rng.random() < 0.5:
            return {**op, "new": old, "flags": ["MAYMOVE", "DONTUNMAP"]}
        return {**op, "new": old + PAGE * self.rng.randrange(1, 4), "flags": ["MAYMOVE"]}

    def _future_locks(self) -> Op:
        if self.rng.random() < 0.5:
            return {"op": "munlockall"}
        return {"op": "mlockall", "flags": self.rng.choice([2, 6])}

    def _mseal(self) -> Op:
        at, length = self._range(2)
        return {"op": "mseal", "at": at, "len": length}

    def _seal_file(self) -> Op:
        seals = [["SHRINK"], ["GROW"], ["WRITE"], ["FUTURE_WRITE"], ["SEAL"], ["SHRINK", "GROW"]]
        return {"op": "seal", "fd": self.rng.choice("BC"), "seals": self.rng.choice(seals)}

    def _at_the_edge(self) -> Op:
        """Lengths that wrap, and addresses at the ends of user space."""
        at = self.rng.choice([self._at(), {"abs": _HALF - PAGE}, {"abs": _HALF}, {"abs": 0}])
        op: Op = self.rng.choice(
            [
                {"op": "munmap"},
                {"op": "mprotect", "prot": self.rng.choice(["r", 16, 0x300_0001])},
                {"op": "madvise", "advice": "NORMAL"},
                {"op": "msync", "flags": ["SYNC"]},
                {"op": "mincore"},
                {"op": "mlock"},
                {"op": "mseal"},
                {"op": "mmap", "prot": "r", "flags": ["PRIVATE", "ANON", "FIXED_NOREPLACE"]},
            ]
        )
        lengths = [0, PAGE, (1 << 64) - 1, (1 << 64) - 2 * PAGE]
        return {**op, "at": at, "len": self.rng.choice(lengths)}

    def _wrong(self) -> Op:
        at = self._at()
        fixed = ["PRIVATE", "ANON", "FIXED"]
        wrong: list[Op] = [
            {"op": "mmap", "at": at + 8, "len": PAGE, "prot": "r", "flags": fixed},
            {"op": "mmap", "at": at, "len": 0, "prot": "r", "flags": fixed},
            {"op": "munmap", "at": at + 1, "len": PAGE},
            {"op": "mprotect", "at": at + 1, "len": PAGE, "prot": "r"},
            {"op": "msync", "at": at, "len": PAGE, "flags": ["SYNC", "ASYNC"]},
            {"op": "madvise", "at": at + 1, "len": PAGE, "advice": "DONTNEED"},
            {"op": "mincore", "at": at + 1, "len": PAGE},
            {"op": "mremap", "at": at + 1, "old": PAGE, "new": PAGE, "flags": []},
            {"op": "mremap", "at": at, "old": PAGE, "new": 0, "flags": []},
            {"op": "mlock", "at": at + 5, "len": 100},
            {"op": "mprotect", "at": at, "len": 4097, "prot": "rw"},
        ]
        return self.rng.choice(wrong)
