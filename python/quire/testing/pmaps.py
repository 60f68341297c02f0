"""Which pmaps the tests run with: all that work here, never fewer."""

from __future__ import annotations

from quire import _core
from quire.errors import PmapError

__all__ = ["takes_system_calls", "working_pmaps"]


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


def takes_system_calls(pmap: str) -> bool:
    """Whether system calls may be given addresses whose pages are not resident."""
    return any(rung["name"] == pmap and rung["system_calls"] for rung in _core.probe())
