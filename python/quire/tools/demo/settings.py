"""What the user chose, what the data are, and what can go wrong: shared by the other files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import quire

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
SLACK_BYTES = 32 * MIB
LOOKUP_COUNT = 10_000
QUERIES = (
    "import numpy as np",
    "for key, value in mapping.items():",
    "def __exit__(self, exc_type, exc_value, traceback):",
    "with open(path, 'rb') as file:",
    "if not isinstance(value, str):",
)


class DemoError(quire.Error):
    """The demonstration cannot go on; the message says what to do."""


@dataclass(frozen=True)
class Settings:
    """What the user chose. Sizes in bytes; `source` None means the demonstration's own data."""

    size_bytes: int
    budget_bytes: int
    out: Path
    source: str | None = None
    keep: Path | None = None
    pmap: str | None = None
    seed: int = 1
    lookup_count: int = LOOKUP_COUNT
    queries: tuple[str, ...] = QUERIES


@dataclass
class Data:
    """The data of one run: `source` is what quire opens, `plain` the same as a `.npy` file.

    `lines` is the text the rows were made from, empty for a user's own array; `seconds` is how
    long each part of the run took.
    """

    source: str
    plain: Path | None = None
    packed: Path | None = None
    queries: Path | None = None
    lines: list[bytes] = field(default_factory=list)
    plain_bytes: int | None = None
    packed_bytes: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
