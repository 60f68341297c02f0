"""What the native core must be told of the interpreter's life: forks and the end."""

from __future__ import annotations

import atexit
import functools
import os

from quire import _core

__all__ = ["watch_interpreter"]


@functools.cache
def watch_interpreter() -> None:
    """Registers the hooks, once in a process and the children it forks.

    In a child the mappings are armed again before any other code of the child can touch them; at
    exit no thread of the core may wait for the interpreter lock any more.
    """
    os.register_at_fork(after_in_child=_core.rearm_after_fork)
    atexit.register(_core.finalize)
