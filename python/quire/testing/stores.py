"""Stores in Python for tests: one that works, one that waits, one that raises, one that dies.

They stand in the package so that a pager process can import them.
"""

from __future__ import annotations

import os
import time
import zlib
from typing import TYPE_CHECKING

from quire.store.abc import Store

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["BytesStore", "DistantStore", "DyingStore", "GatedStore", "RaisingStore"]


class BytesStore(Store):
    """Serves bytes that it carries along.

    >>> buffer = bytearray(3)
    >>> BytesStore(b"content").read_into(2, memoryview(buffer))
    >>> bytes(buffer)
    b'nte'
    """

    def __init__(self, content: bytes, *, label: str = "bytes of a test") -> None:
        self._content = content
        self._label = label

    @property
    def size(self) -> int:
        """Bytes carried."""
        return len(self._content)

    @property
    def label(self) -> str:
        """The name given."""
        return self._label

    @property
    def version(self) -> str:
        """A name of the content."""
        return f"{zlib.crc32(self._content):08x}"

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Copies; never fails."""
        buffer[:] = self._content[offset : offset + len(buffer)]


class DistantStore(BytesStore):
    """Each read takes at least ``delay_s`` seconds."""

    def __init__(self, content: bytes, *, delay_s: float) -> None:
        super().__init__(content)
        self._delay_s = delay_s

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Waits, then copies."""
        time.sleep(self._delay_s)
        super().read_into(offset, buffer)


def meets(offset: int, buffer: memoryview, where: range) -> bool:
    """Whether a read touches any byte of ``where``."""
    return offset < where.stop and offset + len(buffer) > where.start


class GatedStore(BytesStore):
    """Reads that touch a byte of ``closed`` wait until the gate is opened.

    The gate is a FIFO in ``folder``: opening it for reading waits for a writer (fifo(7)).
    ``arrived()`` tells whether a read stands before it.
    """

    def __init__(self, content: bytes, folder: Path, closed: range) -> None:
        super().__init__(content, label="gated bytes")
        self._gate = folder / "gate"
        self._arrival = folder / "arrival"
        self._closed = closed
        if not self._gate.exists():
            os.mkfifo(self._gate)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Waits at the gate where it must, then copies."""
        if meets(offset, buffer, self._closed):
            self._arrival.touch()
            os.close(os.open(self._gate, os.O_RDONLY | os.O_CLOEXEC))
        super().read_into(offset, buffer)

    def arrived(self) -> bool:
        """Whether a read has come to the gate, ever, in any process."""
        return self._arrival.exists()

    def open_gate(self) -> int:
        """Lets reads through for as long as the returned descriptor is open."""
        return os.open(self._gate, os.O_RDWR | os.O_CLOEXEC)


class RaisingStore(BytesStore):
    """Raises ``error`` for every read that touches a byte of ``bad``."""

    def __init__(self, content: bytes, error: BaseException, bad: range) -> None:
        super().__init__(content, label="raising bytes")
        self._error = error
        self._bad = bad

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Raises where it must."""
        if meets(offset, buffer, self._bad):
            raise self._error
        super().read_into(offset, buffer)


class DyingStore(BytesStore):
    """Ends its process at every read that touches a byte of ``deadly``.

    With ``once``, a file that need not exist yet, only the first of them does.
    """

    def __init__(self, content: bytes, deadly: range, once: Path | None = None) -> None:
        super().__init__(content, label="deadly bytes")
        self._deadly = deadly
        self._once = once

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Dies where it must."""
        if meets(offset, buffer, self._deadly) and not (self._once and self._once.exists()):
            if self._once:
                self._once.touch()
            os._exit(9)
        super().read_into(offset, buffer)
