"""Random bytes and random ranges of them, from a seed that is printed."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["new_seed", "random_content", "random_ranges"]


def new_seed() -> int:
    """A seed, printed so that a failure can be repeated; ``QUIRE_TEST_SEED`` sets it."""
    given = os.environ.get("QUIRE_TEST_SEED")
    seed = int(given) if given else random.SystemRandom().getrandbits(32)
    print(f"QUIRE_TEST_SEED={seed}")
    return seed


def random_content(size: int, seed: int) -> bytes:
    """``size`` bytes, none of them 0 or 255: what stands for missing data is never content.

    >>> content = random_content(10_000, seed=1)
    >>> len(content), min(content), max(content)
    (10000, 1, 254)
    """
    table = bytes(1 + value % 254 for value in range(256))
    return random.Random(seed).randbytes(size).translate(table)


def random_ranges(size: int, count: int, seed: int) -> Iterator[tuple[int, int]]:
    """``count`` pairs (offset, length) within ``size`` bytes; short ones and long ones alike.

    >>> all(0 <= at <= at + length <= 50 for at, length in random_ranges(50, 100, seed=1))
    True
    """
    rng = random.Random(seed)
    for _ in range(count):
        longest = max(size >> rng.randrange(max(size.bit_length(), 1)), 1)
        length = rng.randint(0, min(longest, size))
        yield rng.randint(0, size - length), length
