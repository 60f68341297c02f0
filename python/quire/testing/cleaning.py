"""Undoes what outlives a process (mounts, cgroups, swap files), however the process ends."""

from __future__ import annotations

import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["cleaner"]


@contextmanager
def cleaner(script: str, *arguments: Path) -> Iterator[None]:
    """Has a shell run ``script`` at the end of the block, or of this process however it ends.

    The shell waits for the end of its standard input, whose other end only this process has.

    Raises:
        RuntimeError: the script failed, and has written why to standard error.
    """
    argv = ["sh", "-c", f"cat > /dev/null; {script}", "cleaner", *map(str, arguments)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True) as process:
        try:
            yield
        finally:
            assert process.stdin is not None
            process.stdin.close()
            if process.wait() != 0:
                raise RuntimeError(f"not undone: {', '.join(map(str, arguments))}")
