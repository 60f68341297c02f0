"""Random reads and writes, done to an array and to a model of it at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import quire
    from quire.testing.touches import Array

__all__ = ["WriteModel", "same_bytes"]


def same_bytes(one: Array, other: Array) -> bool:
    """Whether two arrays hold the same bytes; a pending page error is raised first.

    They are compared in the order of memory, which touches each page once.

    >>> same_bytes(np.array([1.0, np.nan]), np.array([1.0, np.nan]))
    True
    """
    same = one.ravel("K").tobytes() == other.ravel("K").tobytes()
    for _ in range(10):
        pass
    return same


@dataclass
class WriteModel:
    """A writable mapping beside a numpy array of the same content.

    ``read_back`` gives all bytes of the source; ``header`` are those before the array. ``budgets``
    are set in turn, in random order.
    """

    mapping: quire.Mapping
    model: Array
    read_back: Callable[[], bytes]
    budgets: list[int]
    rng: np.random.Generator
    header: bytes = b""
    log: list[str] = field(default_factory=list)

    def run(self, steps: int) -> None:
        """Does ``steps`` random operations and compares all at the end.

        Raises:
            AssertionError: array, model and source differ; the message has what was done.
        """
        kinds = [self.assign, self.pick, self.change, self.read, self.sync, self.set_budget]
        weights = np.array([6, 3, 3, 6, 2, 1]) / 21
        for _ in range(steps):
            kinds[int(self.rng.choice(len(kinds), p=weights))]()
        self.log.append("all")
        self.mapping.sync()
        assert same_bytes(self.mapping.array, self.model), self.log
        assert self.read_back() == self.header + self.model.tobytes("A"), self.log

    def assign(self) -> None:
        """Writes random values to a part."""
        part = self._part()
        self.log.append(f"assign {part}")
        values = self._values(self.model[part].shape)
        self.model[part] = values
        self.mapping.array[part] = values

    def pick(self) -> None:
        """Writes to scattered elements."""
        count = int(self.rng.integers(1, 200))
        picked = tuple(self.rng.integers(0, length, count) for length in self.model.shape)
        values = self._values((count,))
        self.log.append(f"pick {picked}")
        self.model[picked] = values
        self.mapping.array[picked] = values

    def change(self) -> None:
        """Reads and writes a part in place."""
        part = self._part()
        self.log.append(f"change {part}")
        for array in (self.model, self.mapping.array):
            numbers = array if array.dtype.names is None else array[array.dtype.names[0]]
            numbers[part] += 3
            numbers[part] ^= 5

    def read(self) -> None:
        """Compares a part."""
        part = self._part()
        self.log.append(f"read {part}")
        assert same_bytes(self.mapping.array[part], self.model[part]), self.log

    def sync(self) -> None:
        """Syncs a range of the source and compares it."""
        size = self.mapping.size_bytes
        offset = int(self.rng.integers(0, size))
        length = int(self.rng.integers(0, size >> int(self.rng.integers(0, 10))) + 1)
        self.log.append(f"sync {offset}, {length}")
        self.mapping.sync(offset, length)
        expected = self.header + self.model.tobytes("A")
        ours, theirs = (
            content[offset : offset + length] for content in (expected, self.read_back())
        )
        assert ours == theirs, self.log

    def set_budget(self) -> None:
        """Gives the mapping another budget."""
        budget = int(self.rng.choice(self.budgets))
        self.log.append(f"budget {budget}")
        self.mapping.set_budget(budget)

    def _part(self) -> tuple[slice, ...]:
        """Random slices, of one axis at least half the time all of the rest."""
        return tuple(self._slice(length) for length in self.model.shape)

    def _slice(self, length: int) -> slice:
        longest = max(length >> int(self.rng.integers(0, max(length.bit_length(), 1))), 1)
        start = int(self.rng.integers(0, length))
        step = int(self.rng.choice([1, 1, 1, 2, 7, 4099]))
        return slice(start, min(start + longest, length), step)

    def _values(self, shape: tuple[int, ...]) -> Any:
        dtype = self.model.dtype
        count = int(np.prod(shape))
        return np.frombuffer(self.rng.bytes(count * dtype.itemsize), dtype).reshape(shape)
