"""`patch`: an unchanged program with quire's drop-ins in the place of what it imports.

What is replaced are names: those of the modules that a program imports from (`REPLACED`), and every
global variable of a loaded module that is bound to one of the same objects, as after
``from mmap import mmap``. Modules loaded later import the replacement. Not reached are

- objects made before, attributes of classes and instances, default arguments, closures;
- numpy's and quire's own modules, beside the public names;
- libraries that call mmap(2) by themselves, in C;
- other programs: a child that is started by its path is one.

Processes that `multiprocessing` starts by "spawn" or "forkserver" are patched before they import
the program; by "fork" they are as their parent.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from quire.compat.memmap import tell_libraries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

__all__ = ["patch", "patch_for_good"]

REPLACED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("mmap", "quire.compat.mmap", ("mmap",)),
    ("numpy", "quire.compat.memmap", ("memmap", "load")),
    ("numpy.lib.format", "quire.compat.memmap", ("open_memmap",)),
    (
        "multiprocessing.shared_memory",
        "quire.compat.shared_memory",
        ("SharedMemory", "ShareableList"),
    ),
)
"""The module that has the names, the one that has the replacements, and the names."""
LEFT_ALONE = (
    "numpy",
    "quire",
    "mmap",
    "multiprocessing.shared_memory",
    "joblib._memmapping_reducer",  # which is to know maps of both kinds: `tell_libraries`
)
"""Packages whose own variables stay as they are, but for what `REPLACED` names."""
SPAWN = "multiprocessing.spawn"
PREPARATION = "get_preparation_data"


class _Spot(NamedTuple):
    """A name that was given another value."""

    names: dict[str, Any]
    name: str
    before: Any
    now: Any


_lock = threading.RLock()
_depth = 0
_spots: list[_Spot] = []


@contextlib.contextmanager
def patch() -> Iterator[None]:
    """Replaces `mmap`, `numpy.memmap` and its kin, and `multiprocessing.shared_memory`.

    For as long as the ``with`` block, or the function that it decorates, runs, `mmap.mmap`,
    `numpy.memmap`, `numpy.load`, `numpy.lib.format.open_memmap`, `SharedMemory` and `ShareableList`
    are those of `quire.compat`. What was made inside goes on after it; a module that was first
    imported inside keeps what it has imported.

    Threads: the names are those of the whole process, so other threads see the replacement too.
    Blocks may nest and overlap, in one thread or several: the last to end puts everything back,
    however it ends. What the program itself has bound to one of the names meanwhile stays.

    Forks: a child begins as its parent was. Blocks of threads that it does not have never end in
    it, so it stays patched where another thread was in a block.

    >>> import mmap
    >>> from quire.compat import patch
    >>> with patch():
    ...     mmap.mmap
    <class 'quire.compat.mmap.mmap'>
    >>> mmap.mmap
    <class 'mmap.mmap'>
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def patch_for_good() -> None:
    """As `patch`, to the end of the process."""
    _enter()


def _enter() -> None:
    global _depth
    # Without the lock, which a fork waits for: a module may fork while it is imported.
    found = [
        (vars(importlib.import_module(home)), importlib.import_module(of), names)
        for home, of, names in REPLACED
    ]
    spawn = vars(importlib.import_module(SPAWN))
    with _lock:
        if _depth == 0:
            try:
                _replace(found)
                _set(spawn, PREPARATION, _told_to_patch(spawn[PREPARATION]))
                _renew_workers()
            except BaseException:
                _restore()
                raise
        _depth += 1


def _leave() -> None:
    global _depth
    with _lock:
        _depth -= 1
        if _depth == 0:
            _restore()


def _replace(found: list[tuple[dict[str, Any], ModuleType, tuple[str, ...]]]) -> None:
    pairs = {}
    for names, drop_in, public in found:
        for name in public:
            original, replacement = names[name], getattr(drop_in, name)
            pairs[id(original)] = original, replacement
            _set(names, name, replacement)
    for name, module in list(sys.modules.items()):
        variables = getattr(module, "__dict__", None)
        alone = any(name == own or name.startswith(f"{own}.") for own in LEFT_ALONE)
        if alone or not isinstance(variables, dict):
            continue
        for variable, value in list(variables.items()):
            if id(value) in pairs:
                _set(variables, variable, pairs[id(value)][1])


def _set(names: dict[str, Any], name: str, value: Any) -> None:
    _spots.append(_Spot(names, name, names[name], value))
    names[name] = value


def _restore() -> None:
    while _spots:
        spot = _spots.pop()
        if spot.names.get(spot.name) is spot.now:
            spot.names[spot.name] = spot.before
    tell_libraries()  # of numpy's own arrays, to one that was imported inside
    _renew_workers()


def _renew_workers() -> None:
    """Has the next call of joblib start processes: those it keeps go by the classes of before."""
    executor = sys.modules.get("joblib.executor")
    if executor is not None and getattr(executor, "_executor_args", None) is not None:
        executor._executor_args = ()  # type: ignore[attr-defined]


def _after_fork_in_child() -> None:
    """A lock of its own; the names are as a whole call has left them."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(
    before=lambda: _lock.acquire(),
    after_in_parent=lambda: _lock.release(),
    after_in_child=_after_fork_in_child,
)


class _Patched:
    """Patches the process that unpickles it."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return patch_for_good, ()


def _told_to_patch(prepare: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """What a new process is sent before anything of the program, and with it what patches it."""

    def preparation(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return prepare(*args, **kwargs) | {"quire.compat": _Patched()}

    return preparation
