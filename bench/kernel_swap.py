"""The kernel's own swap, bounded: a swap file and a cgroup, which end with the benchmark.

Both need root, and the cgroup needs the memory controller of cgroup v2 for a group beside our own
(Documentation/admin-guide/cgroup-v2.rst of Linux). A cleaner process undoes them when its standard
input ends: when the benchmark is done, and just as well when it fails or is killed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MOUNT = Path("/sys/fs/cgroup")
TOOLS = ("mkswap", "swapon", "swapoff", "fallocate")
# $1 is the swap file, $2 the cgroup. Processes that were killed are in it for a moment longer.
CLEANER = """
cat > /dev/null
[ -e "$2/cgroup.kill" ] && echo 1 > "$2/cgroup.kill"
if grep -qF "$1" /proc/swaps; then swapoff "$1" || exit 1; fi
rm -f "$1"
for try in 1 2 3 4 5 6 7 8 9 10; do
    [ -d "$2" ] || exit 0
    rmdir "$2" 2> /dev/null && exit 0
    sleep 0.2
done
echo "cgroup $2 could not be removed: see who is in its cgroup.procs" >&2
exit 1
"""


class NotHereError(Exception):
    """The kernel's swap cannot be had; the text says why."""


@contextmanager
def kernel_swap(out: Path, limit_bytes: int, swap_bytes: int) -> Iterator[Path]:
    """Turns on swapping to a file in `out`; gives a cgroup that holds `limit_bytes` of memory.

    Raises:
        NotHereError: it cannot be done here.
        RuntimeError: it could not be undone.
    """
    parent = _memory_parent()
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        raise NotHereError(f"no {', '.join(missing)}: install util-linux")
    name = f"quire-bench-{os.getpid()}"
    file, group = (out / f"{name}.swap").resolve(), parent / name
    with _undone(file, group):
        swap_on(file, swap_bytes)
        try:
            group.mkdir()
            (group / "memory.max").write_text(str(limit_bytes))
            (group / "memory.swap.max").write_text("max")
        except OSError as error:
            raise NotHereError(f"no cgroup below {parent}: {error.strerror}") from error
        yield group


@contextmanager
def _undone(file: Path, group: Path) -> Iterator[None]:
    """Starts the cleaner, which undoes all at the end of the block or of this process."""
    argv = ["sh", "-c", CLEANER, "cleaner", str(file), str(group)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True) as cleaner:
        try:
            yield
        finally:
            assert cleaner.stdin is not None
            cleaner.stdin.close()
            if cleaner.wait() != 0:
                raise RuntimeError(f"not undone: see /proc/swaps for {file}, and {group}")


def swap_on(file: Path, size_bytes: int) -> None:
    """Makes a swap file and swaps to it.

    Raises:
        NotHereError: the file system or the kernel does not take it.
    """
    steps = (
        ["fallocate", "-l", str(size_bytes), str(file)],
        ["chmod", "600", str(file)],
        ["mkswap", str(file)],
        ["swapon", str(file)],
    )
    for argv in steps:
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode != 0:
            raise NotHereError(f"{argv[0]} failed: {done.stderr.strip()}")


def _memory_parent() -> Path:
    """The nearest cgroup above ours that gives its children the memory controller."""
    if os.geteuid() != 0:
        raise NotHereError("swapon and a memory limit need root")
    if "memory" not in _words(MOUNT / "cgroup.controllers"):
        raise NotHereError(f"{MOUNT} has no memory controller of cgroup v2")
    own = MOUNT
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            own = MOUNT / line.removeprefix("0::/")
    for group in (own, *own.parents):
        if "memory" in _words(group / "cgroup.subtree_control"):
            return group
        if group == MOUNT:
            break
    raise NotHereError("no cgroup above ours gives its children the memory controller")


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
