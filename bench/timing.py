"""Rounds in random order, medians, and memory that the machine really has.

Contenders take turns within each round, in an order drawn anew each time, so that a slow moment
of the machine does not fall on one of them alone. The figure is the median over the rounds.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

WARM_SECONDS = 0.3
SETTLE_SECONDS = 0.03


def pretouch(size_bytes: int) -> None:
    """Touches that much memory once: a virtual machine gets the first touch of a page slowly."""
    np.ones(size_bytes, dtype=np.uint8)


def wake_processor(for_seconds: float = WARM_SECONDS) -> None:
    """Keeps this CPU busy for a moment, so that its clock is up when the measuring begins.

    `SETTLE_SECONDS` are enough between calls of contenders that have kept it busy themselves.
    """
    until = time.perf_counter() + for_seconds
    while time.perf_counter() < until:
        pass


def rounds_of(
    contenders: Mapping[str, Callable[[], float]], rounds: int, seed: int
) -> dict[str, list[float]]:
    """Runs each contender once to warm up and then `rounds` times; what each call returned.

    A contender returns its own time, so that what it has to prepare is not counted.
    """
    order = random.Random(seed)
    for call in contenders.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        names = list(contenders)
        order.shuffle(names)
        for name in names:
            found[name].append(contenders[name]())
    return found


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def median(values: list[float]) -> float:
    """The median."""
    return float(statistics.median(values))
