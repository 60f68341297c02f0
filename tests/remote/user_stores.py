"""Stores as users write them: good, raising, short, slow, and ill-mannered.

They stand in a module of their own so that the pager process can import them. Facts of the
process in which they run leave it by way of small files.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING

from quire.errors import ChecksumError, CorruptError, FormatError, PageTimeoutError, SourceError
from quire.store.abc import Store

if TYPE_CHECKING:
    from pathlib import Path

SIZE_BYTES = 1 << 24


def pattern(offset: int, length: int) -> bytes:
    """The content of every store here: a function of the offset."""
    start = offset // 8
    words = b"".join(
        number.to_bytes(8, "little") for number in range(start, (offset + length) // 8 + 1)
    )
    return words[offset - start * 8 :][:length]


class PatternStore(Store):
    """A good store; ``folder`` receives a file when it is closed."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    @property
    def size(self) -> int:
        return SIZE_BYTES

    @property
    def label(self) -> str:
        return "pattern"

    @property
    def version(self) -> str | None:
        return "v1"

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = pattern(offset, len(buffer))

    def close(self) -> None:
        if self.folder is not None:
            (self.folder / "closed").touch()


class RaisingStore(PatternStore):
    """Raises the exception named by the page of 4 KiB that is read, from page 1."""

    errors: tuple[BaseException, ...] = (
        ValueError("first"),
        OSError(5, "Input/output error", "disk"),
        TimeoutError(),
        MemoryError(),
        KeyboardInterrupt(),
        SystemExit(3),
        ChecksumError("sum is wrong"),
        CorruptError("does not decode"),
        PageTimeoutError("took too long"),
        RuntimeError("x" * 10_000 + "\N{SNOWMAN}"),
        StopIteration(),
    )

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if 1 <= offset // 4096 <= len(self.errors):
            raise self.errors[offset // 4096 - 1]
        super().read_into(offset, buffer)


class ShortStore(PatternStore):
    """Says how much it filled, as ``readinto`` does, and fills half."""

    def read_into(self, offset: int, buffer: memoryview) -> int:  # type: ignore[override]
        buffer[: len(buffer) // 2] = pattern(offset, len(buffer) // 2)
        return len(buffer) // 2


GATE = threading.Event()


class WaitingStore(PatternStore):
    """Waits at offset 0 until another offset is read."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset == 0:
            GATE.wait()
        else:
            GATE.set()
        super().read_into(offset, buffer)


class StuckStore(PatternStore):
    """Never answers a read of offset 0, and does not close either."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset == 0:
            assert self.folder is not None
            (self.folder / "waiting").touch()
            threading.Event().wait()
        super().read_into(offset, buffer)

    def close(self) -> None:
        threading.Event().wait()


class KeepingStore(PatternStore):
    """Keeps a view of every buffer it was given, which it must not."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[memoryview] = []

    def read_into(self, offset: int, buffer: memoryview) -> None:
        super().read_into(offset, buffer)
        self.kept.append(memoryview(buffer))


class PrintingStore(PatternStore):
    """Prints to standard output and reads standard input."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        print("a store's words")
        assert sys.stdin.read() == ""
        super().read_into(offset, buffer)


class DyingStore(PatternStore):
    """Ends its process at any read between its first page and the few bytes of its end."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if 4096 <= offset < self.size - 64:
            os._exit(1)
        super().read_into(offset, buffer)


class BadSizeStore(PatternStore):
    """Has a size that is none."""

    size = "big"  # type: ignore[assignment]


class Unopenable:
    """A recipe whose ``open`` raises what it is told to."""

    label = "unopenable"

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def open(self) -> Store:
        raise {
            "source": SourceError("there is no such thing: look elsewhere", errno=2),
            "format": FormatError("not of that format: repack it"),
            "other": ZeroDivisionError("by zero"),
            "exit": SystemExit(0),
        }[self.kind]


class Unpicklable(PatternStore):
    """Holds something that cannot travel."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
