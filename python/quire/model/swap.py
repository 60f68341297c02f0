"""Swap: slots for pages that have no file to go to.

A page keeps its slot when it is read back. As long as it is not stored into, both hold the same,
and the next eviction writes nothing; else the slot is written anew (Linux's swap cache).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.model.page import Page
    from quire.model.trace import Trace

__all__ = ["Swap"]


class Swap:
    """`size` slots (0: no swap; None: without end)."""

    def __init__(self, trace: Trace, size: int | None) -> None:
        self.trace = trace
        self.size = size
        self.slots: dict[int, bytes] = {}
        self.owners: dict[int, Page] = {}
        self.writes = 0
        self.reads = 0
        self._next = 0

    @property
    def full(self) -> bool:
        """Whether no slot is free."""
        return self.size is not None and len(self.slots) >= self.size

    def store(self, page: Page, content: bytes) -> None:
        """Writes a page out, into its slot or into a new one."""
        if page.slot is None:
            assert not self.full, "asked for a slot of a full swap"
            page.slot = self._next
            self.owners[page.slot] = page
            self._next += 1
        self.slots[page.slot] = content
        self.writes += 1
        self.trace.add("swap out", slot=page.slot)

    def load(self, slot: int) -> bytes:
        """Reads a page back; the slot stays."""
        self.reads += 1
        self.trace.add("swap in", slot=slot)
        return self.slots[slot]

    def discard(self, page: Page) -> None:
        """Frees the slot of a page, if it has one: its content is gone, or no longer good."""
        if page.slot is not None:
            del self.slots[page.slot], self.owners[page.slot]
            page.slot = None
