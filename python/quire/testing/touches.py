"""A mapped source under test, and ways to touch its pages that an exception can leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import quire

__all__ = ["TOUCHES", "Array", "MappedSource", "Touch", "equals", "touch"]

Array = np.ndarray[Any, Any]
Touch = Callable[[Array], object]


@dataclass
class MappedSource:
    """A mapping and its array; the array can be let go."""

    mapping: quire.Mapping

    def __post_init__(self) -> None:
        self._array: Array | None = self.mapping.array

    @property
    def array(self) -> Array:
        """All bytes of the source."""
        assert self._array is not None, "the array was dropped"
        return self._array

    def drop_array(self) -> None:
        """Lets the array go, so that the mapping can be closed."""
        self._array = None


def touch(array: Array, index: int, value: int | None = None) -> int:
    """A write where there is a ``value``, and a read; then a moment for their exception to come.

    >>> touch(np.arange(5), 3)
    3
    """
    if value is not None:
        array[index] = value
    found = int(array[index])
    for _ in range(10):
        pass
    return found


def equals(one: Array, other: Array) -> bool:
    """Whether two arrays hold the same; false while a page error is on its way cannot be seen.

    The loop gives the interpreter a check at which a page error of the comparison is raised.
    """
    same = np.array_equal(one, other)
    for _ in range(10):
        pass
    return same


def touch_item(part: Array) -> object:
    """One element: the thread holds the interpreter lock."""
    return _checked(part[-1])


def touch_sum(part: Array) -> object:
    """A reduction: numpy lets the interpreter lock go."""
    return _checked(part.sum())


def touch_copy(part: Array) -> object:
    """A copy: numpy lets the interpreter lock go."""
    return _checked(part.copy())


def touch_bytes(part: Array) -> object:
    """A copy by the interpreter: the thread holds the lock."""
    return _checked(bytes(part.data))


TOUCHES: dict[str, Touch] = {
    "item": touch_item,
    "sum": touch_sum,
    "copy": touch_copy,
    "bytes": touch_bytes,
}
"""Touches by name. Each touches the last byte of what it is given."""


def _checked(value: object) -> object:
    """Passes on; the loop gives the interpreter a check at which a page error is raised."""
    for _ in range(10):
        pass
    return value
