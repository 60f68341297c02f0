"""How the tests of stores read."""

from __future__ import annotations

from collections.abc import Callable

from quire.store.abc import Store

OpenUrl = Callable[..., Store]
"""The fixture ``open_url``."""


def read(store: Store, offset: int, length: int) -> bytes:
    """The bytes of a store, put into a fresh buffer."""
    buffer = bytearray(length)
    store.read_into(offset, memoryview(buffer))
    return bytes(buffer)
