"""The kernel's own swap, bounded: a swap file and a cgroup, which end with the benchmark.

Both need root. They end with the benchmark, and just as well when it fails or is killed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

from quire.testing.cgroups import MemoryGroup, NoGroupError, memory_group
from quire.testing.cleaning import cleaner

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOOLS = ("mkswap", "swapon", "swapoff", "fallocate")
# $1 is the swap file.
CLEAN_SWAP = """
if grep -qF "$1" /proc/swaps; then swapoff "$1" || exit 1; fi
rm -f "$1"
"""


class NotHereError(Exception):
    """The kernel's swap cannot be had; the text says why."""


@contextmanager
def kernel_swap(out: Path, limit_bytes: int, swap_bytes: int) -> Iterator[MemoryGroup]:
    """Turns on swapping to a file in `out`; gives a cgroup that holds `limit_bytes` of memory.

    Raises:
        NotHereError: it cannot be done here.
        RuntimeError: it could not be undone.
    """
    if os.geteuid() != 0:
        raise NotHereError("swapon and a memory limit need root")
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        raise NotHereError(f"no {', '.join(missing)}: install util-linux")
    file = (out / f"quire-bench-{os.getpid()}.swap").resolve()
    try:
        with cleaner(CLEAN_SWAP, file):
            swap_on(file, swap_bytes)
            with memory_group(limit_bytes, None) as group:
                yield group
    except NoGroupError as error:
        raise NotHereError(str(error)) from error


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
