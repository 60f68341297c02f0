"""Swap: slots for pages that have no file to go to."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.model.trace import Trace

__all__ = ["Swap"]


class Swap:
    """`size` slots (0: no swap; None: without end)."""

    def __init__(self, trace: Trace, size: int | None) -> None:
        self.trace = trace
        self.size = size
        self.slots: dict[int, bytes] = {}
        self.writes = 0
        self.reads = 0
        self._next = 0

    @property
    def full(self) -> bool:
        """Whether no slot is free."""
        return self.size is not None and len(self.slots) >= self.size

    def store(self, content: bytes) -> int:
        """Writes a page out and returns its slot."""
        assert not self.full, "asked for a slot of a full swap"
        slot = self._next
        self._next += 1
        self.slots[slot] = content
        self.writes += 1
        self.trace.add("swap out", slot=slot)
        return slot

    def load(self, slot: int) -> bytes:
        """Reads a page back and frees its slot."""
        self.reads += 1
        self.trace.add("swap in", slot=slot)
        return self.slots.pop(slot)

    def discard(self, slot: int) -> None:
        """Frees a slot whose page is gone."""
        del self.slots[slot]
