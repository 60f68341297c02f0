"""Groups of processes with a limit of memory, of cgroup version 2 or 1.

They are made at the top of the hierarchy, which takes root, and end with their use, even when their
user is killed.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quire.testing.cleaning import cleaner

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MemoryGroup", "NoGroupError", "memory_group"]

TRIES_MAX = 50
# $1 is the group. Processes that were killed are in it for a moment longer.
CLEAN_GROUP = """
for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    [ -d "$1" ] || exit 0
    for one in $(cat "$1/cgroup.procs"); do kill -9 "$one"; done 2> /dev/null
    rmdir "$1" 2> /dev/null && exit 0
    sleep 0.1
done
echo "cgroup $1 could not be removed: see who is in its cgroup.procs" >&2
exit 1
"""


class NoGroupError(Exception):
    """No group with a limit can be had; the text says why."""


@dataclass(frozen=True)
class MemoryGroup:
    """A group that exists; of which version its files are."""

    path: Path
    version: int

    def set_limit(self, memory_bytes: int, swap_bytes: int | None = 0) -> None:
        """Limits memory, and swap beside it; None for as much swap as there is.

        Raises:
            OSError: EBUSY where its processes hold more and the kernel cannot take it from them.
        """
        if self.version == 2:
            self._write("memory.max", str(memory_bytes))
            self._write("memory.swap.max", "max" if swap_bytes is None else str(swap_bytes))
            return
        # Memory and swap together may not be limited to less than memory is.
        both = -1 if swap_bytes is None else memory_bytes + swap_bytes
        # A kernel that does not account for swap has no file of it.
        counts_swap = (self.path / "memory.memsw.limit_in_bytes").exists()
        for part, limit in (("memsw.", -1), ("", memory_bytes), ("memsw.", both)):
            if counts_swap or not part:
                self._write(f"memory.{part}limit_in_bytes", str(limit))

    def enter(self) -> None:
        """Puts the calling process into it: what it has touched before counts elsewhere."""
        self._write("cgroup.procs", str(os.getpid()))

    @property
    def used_bytes(self) -> int:
        """Memory that counts for the group now, page cache included."""
        name = "memory.current" if self.version == 2 else "memory.usage_in_bytes"
        return int((self.path / name).read_text())

    @property
    def peak_bytes(self) -> int:
        """The most that has counted for the group at once, since it was made."""
        name = "memory.peak" if self.version == 2 else "memory.max_usage_in_bytes"
        return int((self.path / name).read_text())

    @property
    def kills(self) -> int:
        """How many of its processes the kernel has killed for want of memory."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        words = (self.path / name).read_text().split()
        return int(words[words.index("oom_kill") + 1])

    def _write(self, name: str, text: str) -> None:
        # The kernel takes back what it can and is asked again: version 1 says EBUSY in between.
        for attempt in range(TRIES_MAX):
            try:
                (self.path / name).write_text(text)
            except OSError:
                if attempt == TRIES_MAX - 1:
                    raise
                time.sleep(0.1)
            else:
                return


@contextmanager
def memory_group(memory_bytes: int, swap_bytes: int | None = 0) -> Iterator[MemoryGroup]:
    """A new group with these limits; processes that are in it at the end are killed.

    Raises:
        NoGroupError: there is none to be had here.
        RuntimeError: it could not be removed.
    """
    parent, version = _top()
    group = MemoryGroup(parent / f"quire-{os.getpid()}-{time.monotonic_ns()}", version)
    with cleaner(CLEAN_GROUP, group.path):
        try:
            group.path.mkdir()
        except OSError as error:
            raise NoGroupError(f"no cgroup below {parent}: {error.strerror}") from error
        group.set_limit(memory_bytes, swap_bytes)
        yield group


def _top() -> tuple[Path, int]:
    """Where groups with limits of memory are made, and the version."""
    if os.geteuid() != 0:
        raise NoGroupError("a cgroup with a limit of memory needs root")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, options, *_ = line.split(" ")
        if kind == "cgroup2" and "memory" in _words(Path(point, "cgroup.subtree_control")):
            return Path(point), 2
        if kind == "cgroup" and "memory" in options.split(","):
            return Path(point), 1
    raise NoGroupError("no cgroup hierarchy that is mounted here limits memory")


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
