"""Changes chosen transfers of a file in a child process: the plan of `inject.c`, and its build."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).with_name("inject.c")
SHORT, EMPTY = -1, -2
FOR_EVER = (1 << 63) - 1
NAMELESS = 0  # the inode that stands for any swap file


class Injection(ctypes.Structure):
    """The plan that the preloaded library reads (``struct plan`` of `inject.c`)."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("armed", "device", "inode", "first", "count", "effect", "seen", "hit")
    )

    armed: int
    device: int
    inode: int
    first: int
    count: int
    effect: int
    seen: int
    hit: int

    @contextmanager
    def on(self, effect: int, first: int, count: int, inode: int = 0) -> Iterator[None]:
        """Does this to ``count`` transfers from number ``first`` on, until the end of the block.

        They are those of the file of that inode, or of swap files, which have no name.
        """
        self.inode, self.first, self.count, self.effect = inode, first, count, effect
        self.seen = self.hit = 0
        self.armed = 1
        try:
            yield
        finally:
            self.armed = 0


def build(folder: Path) -> dict[str, str]:
    """Compiles the library into ``folder``; gives the environment of a child that has it."""
    library = folder / "inject.so"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["cc", *flags, "-o", library, SOURCE, "-ldl"], check=True)
    plan = folder / "plan"
    plan.write_bytes(bytes(mmap.PAGESIZE))
    return {"LD_PRELOAD": str(library), "QUIRE_INJECT": str(plan)}


def in_child() -> Injection:
    """The plan of this process, which `build` gave its environment: for files beside its own."""
    with open(os.environ["QUIRE_INJECT"], "r+b") as file:
        plan = Injection.from_buffer(mmap.mmap(file.fileno(), 0))
        plan.device = os.fstat(file.fileno()).st_dev
        return plan
