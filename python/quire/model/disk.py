"""The disk: blocks of a page's size, counted; it can be full, and it can break."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quire.model.errors import DiskError

if TYPE_CHECKING:
    from quire.model.trace import Trace

__all__ = ["Disk", "DiskFile"]


@dataclass
class Disk:
    """Blocks in use against `capacity` (None: without end), and the I/O done so far.

    `broken` holds (file name, block) pairs whose reads and writes fail.
    """

    trace: Trace
    capacity: int | None = None
    used: int = 0
    reads: int = 0
    writes: int = 0
    broken: set[tuple[str, int]] = field(default_factory=set)

    def check(self, name: str, block: int) -> None:
        """Raises `DiskError` EIO for a broken block."""
        if (name, block) in self.broken:
            raise DiskError("EIO", f"block {block} of {name} cannot be read or written")

    def take(self) -> None:
        """Reserves a block.

        Raises:
            DiskError: ENOSPC.
        """
        if self.capacity is not None and self.used >= self.capacity:
            raise DiskError("ENOSPC", f"all {self.capacity} blocks of the disk are in use")
        self.used += 1


class DiskFile:
    """The blocks of one file. A block that was never reserved is a hole and reads as zeros."""

    def __init__(self, disk: Disk, name: str) -> None:
        self.disk = disk
        self.name = name
        self.blocks: dict[int, bytes] = {}

    def reserve(self, block: int) -> None:
        """Makes sure that `block` can be written later (delayed allocation reserves early)."""
        if block not in self.blocks:
            self.disk.take()
            self.blocks[block] = b""

    def read(self, block: int) -> bytes | None:
        """The content of a block; None for a hole, which needs no I/O."""
        content = self.blocks.get(block)
        if not content:
            return None
        self.disk.check(self.name, block)
        self.disk.reads += 1
        self.disk.trace.add("disk read", file=self.name, block=block)
        return content

    def write(self, block: int, content: bytes) -> None:
        """Writes a block."""
        self.disk.check(self.name, block)
        self.reserve(block)
        self.blocks[block] = content
        self.disk.writes += 1
        self.disk.trace.add("disk write", file=self.name, block=block)

    def discard(self, first: int, last: int | None = None) -> None:
        """Gives blocks `[first, last)` back; they are holes then."""
        for block in [b for b in self.blocks if first <= b and (last is None or b < last)]:
            del self.blocks[block]
            self.disk.used -= 1
