"""Which pmaps the tests run with: all that work here, never fewer."""

from __future__ import annotations

from typing import cast

from quire import _core
from quire.errors import PmapError
from quire.pmap import KERNEL

__all__ = ["takes_system_calls", "working_pmaps", "writable_pmaps"]


def working_pmaps() -> list[str]:
    """Names of the pmaps that work on this machine for this user and give a pointer.

    Raises:
        quire.PmapError: none does: tests of mappings would pass without testing anything.

    >>> set(working_pmaps()) <= {"uffd", "inline", "guard", "mprotect"}
    True
    """
    names = [str(rung["name"]) for rung in _core.probe() if rung["works"] and rung["pointer"]]
    if not names:
        raise PmapError("no pmap works here, so no mapping can be tested; see `quire doctor`")
    return names


def writable_pmaps() -> list[str]:
    """Every pmap that works here and gives a pointer, with each way it has to notice writes.

    Raises:
        quire.PmapError: none can be written with: tests of writes would pass without testing.

    >>> all(name.partition(":")[0] in working_pmaps() for name in writable_pmaps())
    True
    """
    names = [
        f"{rung['name']}:{tracking}"
        for rung in _core.probe()
        if rung["works"] and rung["pointer"]
        for tracking in cast("list[str]", rung["trackings"])
    ]
    if not names:
        raise PmapError("no pmap here can notice writes, so none can be tested; see `quire doctor`")
    return names


def takes_system_calls(pmap: str) -> bool:
    """Whether system calls may be given addresses whose pages are not resident.

    ``pmap`` may name how writes are noticed, as in "uffd:wp-sync".
    """
    name = pmap.partition(":")[0]
    return name == KERNEL or any(
        rung["name"] == name and rung["system_calls"] for rung in _core.probe()
    )
