"""What the native core must be told of the interpreter's life: forks, faulthandler, the end."""

from __future__ import annotations

import atexit
import faulthandler
import functools
import os
import sys
import weakref
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from quire import _core

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["sync_at_exit", "watch_interpreter"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

WRITABLE: weakref.WeakSet[_core.MappingBase] = weakref.WeakSet()


@functools.cache
def watch_interpreter() -> None:
    """Registers the hooks, once in a process and the children it forks.

    In a child the mappings are armed again before any other code of the child can touch them; at
    exit dirty pages are written back, and no thread of the core may wait for the interpreter lock
    any more.

    `faulthandler.disable` puts back the signal handlers that stood before faulthandler's, even
    where quire's stand on top of them by now, and a fault would then end the process;
    `faulthandler.enable` puts its own on top, which report faults that quire then resolves. So
    after both quire's are put on top again; they call faulthandler's for what is not quire's.
    """
    os.register_at_fork(after_in_child=_after_fork)
    atexit.register(_at_exit)
    for function in (faulthandler.enable, faulthandler.disable):
        setattr(faulthandler, function.__name__, _keeping_handlers(function))


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
    if _core.live_mappings() and faulthandler.is_enabled():
        # Else the interpreter does it later, and puts back the signal handlers from before
        # faulthandler: a daemon thread that then touches a page would kill the process.
        faulthandler.disable()
    _core.finalize()


def _keeping_handlers(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        finally:
            _core.keep_fault_handlers()

    return call
