"""Parts of a mapping by index, and what keeps them resident."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from quire import _core

__all__ = ["Pin", "bytes_of", "in_background"]


def bytes_of(array: np.ndarray[Any, Any], index: object) -> tuple[np.ndarray[Any, Any], int, int]:
    """The part of ``array`` that ``index`` selects, its first address and its length in bytes.

    A part with gaps (a column) counts from its first byte to its last.

    Raises:
        TypeError: the index selects no part but makes a copy (a list, an array, a mask).

    >>> part, address, length = bytes_of(np.zeros((4, 8), "u1"), np.s_[1:3])
    >>> part.shape, length
    ((2, 8), 16)
    """
    whole = index if isinstance(index, tuple) else (index,)
    if index is not None and not any(isinstance(item, type(...)) for item in whole):
        whole = (*whole, ...)  # a view, also of one element
    part = array if index is None else array[whole]
    if part.size == 0:
        return part, array.ctypes.data, 0
    if not np.may_share_memory(part, array):
        raise TypeError(
            f"the index {index!r} makes a copy: give a slice, an int or a tuple of them"
        )
    low, high = np.lib.array_utils.byte_bounds(part)
    return part, int(low), int(high - low)


class Pin:
    """Keeps a part of a mapping resident until `release`, or to the end of a ``with`` block.

    ``with mapping.pin(index) as part`` gives the pinned part of the array.
    """

    def __init__(
        self, mapping: _core.MappingBase, part: np.ndarray[Any, Any], offset: int, length: int
    ) -> None:
        """Pins; see `quire.Mapping.pin`."""
        mapping.pin_bytes(offset, length)
        self._held: tuple[_core.MappingBase, int, int] | None = (mapping, offset, length)
        self._lock = threading.Lock()
        self.array: np.ndarray[Any, Any] | None = part
        """The pinned part; None once it is released."""

    def release(self) -> None:
        """Ends the pin; does nothing when that was done before."""
        with self._lock:
            held, self._held, self.array = self._held, None, None
        if held is not None:
            mapping, offset, length = held
            mapping.unpin_bytes(offset, length)

    def __enter__(self) -> np.ndarray[Any, Any]:
        if self.array is None:
            raise ValueError("the pin was released: pin again")
        return self.array

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def __del__(self) -> None:
        if getattr(self, "_held", None) is not None:
            self.release()


def in_background(work: Callable[[], None], name: str) -> Future[None]:
    """Runs ``work`` in a thread of its own, which does not hold up the end of the interpreter."""
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - it is the future's to tell
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
