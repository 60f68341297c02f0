"""What the native core must be told of the interpreter's life: forks and the end."""

from __future__ import annotations

import atexit
import functools
import os
import sys
import weakref

from quire import _core

__all__ = ["sync_at_exit", "watch_interpreter"]

WRITABLE: weakref.WeakSet[_core.MappingBase] = weakref.WeakSet()


@functools.cache
def watch_interpreter() -> None:
    """Registers the hooks, once in a process and the children it forks.

    In a child the mappings are armed again before any other code of the child can touch them; at
    exit dirty pages are written back, and no thread of the core may wait for the interpreter lock
    any more.
    """
    os.register_at_fork(after_in_child=_after_fork)
    atexit.register(_at_exit)


def sync_at_exit(mapping: _core.MappingBase) -> None:
    """Has a writable mapping synced when the interpreter ends, if it lives then."""
    WRITABLE.add(mapping)


def _after_fork() -> None:
    WRITABLE.clear()
    _core.rearm_after_fork()


def _at_exit() -> None:
    for mapping in list(WRITABLE):
        try:
            if not mapping.closed:
                mapping.sync()
        except Exception:  # noqa: BLE001 - told, and the others are synced all the same
            sys.excepthook(*sys.exc_info())
    _core.finalize()
