"""Which pmap a mapping is made with."""

from __future__ import annotations

import functools
import os

from quire import _core
from quire.errors import PmapError

__all__ = ["KERNEL", "own_pmap", "pmap_for"]

KERNEL = "kernel"


def pmap_for(pmap: str | None, **paging: object) -> str | None:
    """The pmap that is asked for, by an argument or the environment; None for the best of quire's.

    It is "kernel" where neither says and nothing is asked for that only quire's own ``paging`` has.

    Raises:
        quire.PmapError: there is no such pmap; or it is "kernel", and something is asked for that
            it has not.
    """
    asked = [name for name, value in paging.items() if value is not None]
    if pmap == KERNEL and asked:
        raise PmapError(
            f'{asked[0]}= is of quire\'s own paging, and with pmap "kernel" the operating system '
            "pages: leave one of the two out"
        )
    named = pmap or os.environ.get("QUIRE_PMAP")
    if not named:
        return None if asked else KERNEL
    if named != KERNEL and named.partition(":")[0] not in _own_pmaps():
        known = ", ".join((*_own_pmaps(), KERNEL))
        raise PmapError(f"there is no pmap {named!r}; there are: {known}")
    return named


@functools.cache
def _own_pmaps() -> tuple[str, ...]:
    return tuple(str(rung["name"]) for rung in _core.probe())


def own_pmap(pmap: str | None) -> str | None:
    """The one of quire's own pmaps that is asked for as in `pmap_for`; None for the best."""
    wanted = pmap or os.environ.get("QUIRE_PMAP") or None
    return None if pmap is None and wanted == KERNEL else wanted
