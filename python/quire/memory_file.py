"""Memory files: memory that has a descriptor, and ends with the last holder (memfd_create(2))."""

from __future__ import annotations

import os

from quire import _core
from quire.errors import Error
from quire.limits import Asked, explained
from quire.map_flags import MapFlag

__all__ = ["new_memory_file", "refusal"]


def new_memory_file(name: str, size: int, label: str) -> int:
    """A descriptor of ``size`` bytes of zeros, whose size is sealed, for its owner alone.

    ``name`` is what /proc shows, ``label`` what errors call it.

    Raises:
        quire.Error: the system refuses; the message says which limit was hit.
    """
    try:
        return _core.make_memory_file(os.fsencode(name), size, 0o600)
    except OSError as error:
        raise refusal(error, size, label) from None


def refusal(error: OSError, size: int, label: str) -> Error:
    """What to raise where there can be no memory file."""
    said = f"memfd_create: {error.strerror}"
    refused = Error(said, source=label, errno=error.errno)
    return explained(refused, Asked(size, int(MapFlag.SHARED | MapFlag.ANONYMOUS), source=label))
