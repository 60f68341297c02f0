"""A page table: a tree of tables in physical frames, read by the hardware, written by the system.

The tables lie in frames of `PhysicalMemory` as they would in a machine: entries of 8 bytes, in the
bits of the geometry's `EntryFormat`. A table without a valid entry is freed at once, up to the
root.

The page table is a cache: every translation in it follows from mappings and pages, and may be
thrown away at any time; the next access brings it back by a fault (Rashid et al.,
"Machine-independent virtual memory management", 1987, of the pmap layer).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from quire.model.geometry import Geometry
    from quire.model.physical_memory import PhysicalMemory

__all__ = ["Leaf", "PageTable", "Step"]

_ENTRY = struct.Struct("<Q")
_FLAG_BITS = 12
"""The low bits of an entry hold flags, even where a toy's pages are smaller than that."""


@dataclass(frozen=True, slots=True)
class Step:
    """One entry that a walk read."""

    level: int
    table: int
    index: int
    entry: int


@dataclass(frozen=True, slots=True)
class Leaf:
    """A translation: the entry that ends a walk, where it lies, and the pages it covers."""

    entry: int
    level: int
    table: int
    index: int
    start: int
    size: int


class PageTable:
    """The translations of one address space."""

    def __init__(self, geometry: Geometry, memory: PhysicalMemory) -> None:
        self.geometry = geometry
        self.format = geometry.entries
        self.memory = memory
        self._table_bytes = _ENTRY.size << max(geometry.index_bits)
        self.root = memory.allocate_table(self._table_bytes)
        self._valid_counts = {self.root: 0}
        self._frame_shift = max(geometry.page_bits, _FLAG_BITS)

    @property
    def frames_max(self) -> int:
        """Frames that an entry can name."""
        return self.format.address + (1 << _FLAG_BITS) >> self._frame_shift

    def steps(self, address: int) -> Iterator[Step]:
        """The entries that hardware reads to translate `address`, from the root down."""
        table, level = self.root, self.geometry.levels
        for index in self.geometry.indices(address):
            level -= 1
            entry = self._read(table, index)
            yield Step(level, table, index, entry)
            if not entry & self.format.valid or self.format.is_leaf(entry, level):
                return
            table = self._frame_of(entry)

    def leaf(self, address: int) -> Leaf | None:
        """The translation of `address`; None when there is none."""
        return self.leaf_of(list(self.steps(address)), address)

    def leaf_of(self, steps: Sequence[Step], address: int) -> Leaf | None:
        """The translation at which the walk of `address` ended."""
        last = steps[-1]
        if not last.entry & self.format.valid:
            return None
        size = self.geometry.leaf_sizes[last.level]
        return Leaf(last.entry, last.level, last.table, last.index, address & -size, size)

    def frame(self, leaf: Leaf, address: int) -> int:
        """The frame that `leaf` shows at `address`."""
        inside = (address - leaf.start) >> self.geometry.page_bits
        return self._frame_of(leaf.entry) + inside

    def map(
        self, address: int, frame: int, *, writable: bool, executable: bool, level: int = 0
    ) -> None:
        """Makes the page (or, above level 0, the block) at `address` show `frame`, if free."""
        assert level in self.geometry.leaf_levels, f"no leaf at level {level}"
        table, here = self.root, self.geometry.levels
        indices = self.geometry.indices(address)
        for index in indices[: self.geometry.levels - 1 - level]:
            here -= 1
            entry = self._read(table, index)
            if not entry & self.format.valid:
                below = self.memory.allocate_table(self._table_bytes)
                self._valid_counts[below] = 0
                entry = self._address_of(below) | self.format.valid | self.format.table
                self._put(table, index, entry)
            assert not self.format.is_leaf(entry, here), "a block lies in the way"
            table = self._frame_of(entry)
        entry = self.format.leaf(self._address_of(frame), level, writable, executable)
        self._put(table, indices[self.geometry.levels - 1 - level], entry)

    def update(self, leaf: Leaf | Step, entry: int) -> None:
        """Rewrites an entry, which stays valid."""
        _ENTRY.pack_into(self.memory.frames[leaf.table], leaf.index * 8, entry)

    def unmap(self, leaf: Leaf) -> None:
        """Makes a translation invalid and frees the tables that have become empty."""
        path = list(self.steps(leaf.start))
        for step in reversed(path):
            _ENTRY.pack_into(self.memory.frames[step.table], step.index * 8, 0)
            self._valid_counts[step.table] -= 1
            if self._valid_counts[step.table] or step.table == self.root:
                return
            del self._valid_counts[step.table]
            self.memory.free(step.table)

    def leaves(self, start: int, end: int) -> list[Leaf]:
        """Translations that touch `[start, end)`; subtrees that do not exist cost nothing."""
        return list(self._leaves(self.root, self.geometry.levels - 1, 0, start, end))

    def table_frames(self) -> frozenset[int]:
        """The frames of all tables."""
        return frozenset(self._valid_counts)

    def destroy(self) -> None:
        """Frees every table; all translations must be gone."""
        assert self._valid_counts == {self.root: 0}, "translations outlive their address space"
        self.memory.free(self.root)
        self._valid_counts = {}

    def _leaves(self, table: int, level: int, base: int, start: int, end: int) -> Iterator[Leaf]:
        depth = self.geometry.levels - 1 - level
        shift, bits = self.geometry.shifts[depth], self.geometry.index_bits[depth]
        first = max(0, (start - base) >> shift)
        last = min((1 << bits) - 1, (end - 1 - base) >> shift)
        left = self._valid_counts[table]
        for index in range(first, last + 1):
            entry = self._read(table, index)
            if not entry & self.format.valid:
                continue
            here = base + (index << shift)
            if self.format.is_leaf(entry, level):
                yield Leaf(entry, level, table, index, here, 1 << shift)
            else:
                yield from self._leaves(self._frame_of(entry), level - 1, here, start, end)
            left -= 1
            if not left:
                return

    def _read(self, table: int, index: int) -> int:
        entry: int = _ENTRY.unpack_from(self.memory.frames[table], index * 8)[0]
        return entry

    def _put(self, table: int, index: int, entry: int) -> None:
        assert not self._read(table, index) & self.format.valid, "a translation is already there"
        _ENTRY.pack_into(self.memory.frames[table], index * 8, entry)
        self._valid_counts[table] += 1

    def _frame_of(self, entry: int) -> int:
        return (entry & self.format.address) >> self._frame_shift

    def _address_of(self, frame: int) -> int:
        return frame << self._frame_shift
