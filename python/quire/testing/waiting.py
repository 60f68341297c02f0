"""Waiting for a condition."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["wait_until"]

LOOK_S = 0.005


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
    """Returns as soon as ``condition()`` is true.

    Raises:
        TimeoutError: it was not true within ``timeout_s``; the message says ``what`` was awaited.

    >>> wait_until(lambda: True, "nothing")
    """
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s} s in vain: {what}")
        pause.wait(LOOK_S)
