"""Hashed character n-grams: lines of text as rows of a float32 matrix.

Each line becomes `DIMENSIONS` numbers: every run of 3 and of 4 characters is hashed to a column
and a sign (Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", 2009), counts
are damped by a square root, and the row is scaled to length 1. The product of the matrix with
such a row is then the cosine of the angle between texts: 1 for the same text, about 0 for texts
that share no runs of characters.

When more rows are asked for than there are lines, the text is used again: the second pass makes
rows of two neighbouring lines taken together, the third of three, and so on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

DIMENSIONS = 256
NGRAM_CHARS = (3, 4)
ROW_BYTES = DIMENSIONS * 4
BLOCK_LINES = 4096

_NEWLINE = 10
_LOWER = np.arange(256, dtype=np.uint8)
_LOWER[65:91] += 32

Counts = npt.NDArray[np.float32]
Features = npt.NDArray[np.float32]


def row_count(size_bytes: int) -> int:
    """The least number of rows that fill `size_bytes`.

    >>> row_count(1025)
    2
    """
    return max(1, -(-size_bytes // ROW_BYTES))


def pass_count(rows: int, lines: int) -> int:
    """How many times `lines` lines of text are used to make `rows` rows."""
    return -(-rows // lines)


def row_text(lines: Sequence[bytes], row: int) -> str:
    """The text that row number `row` was made from, lines of one window joined by ` / `."""
    window, first = row // len(lines) + 1, row % len(lines)
    parts = [lines[(first + step) % len(lines)] for step in range(window)]
    return " / ".join(part.decode("utf-8", "replace") for part in parts)


def featurise(lines: Sequence[bytes]) -> Features:
    """One row of length 1 for each line; a line with fewer than 3 characters gives zeros.

    >>> rows = featurise([b"import numpy as np", b"import numpy", b"return False"])
    >>> bool(rows[0] @ rows[1] > 0.5 > rows[0] @ rows[2])
    True
    """
    return _scaled(_counts(lines))


def write_matrix(
    lines: Sequence[bytes],
    rows: int,
    path: Path,
    *,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes a `.npy` file of `rows` rows of float32, C order, a block at a time.

    `progress` is called with the number of rows written so far.

    Raises `ValueError` when there is not one line, `OSError` when the file cannot be written.
    """
    if not lines:
        raise ValueError("no Python sources were found to make a matrix from")
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, DIMENSIONS)}
    with path.open("wb") as out:
        np.lib.format.write_array_header_1_0(out, header)
        for first in range(0, rows, BLOCK_LINES):
            count = min(BLOCK_LINES, rows - first)
            out.write(_block(lines, first, count).astype("<f4", copy=False).tobytes())
            if progress is not None:
                progress(first + count)


def _block(lines: Sequence[bytes], first: int, count: int) -> Features:
    """Rows `first` to `first + count`; windows may wrap around the end of the text."""
    window_first, window_last = first // len(lines) + 1, (first + count - 1) // len(lines) + 1
    need = [lines[(first + step) % len(lines)] for step in range(count + window_last - 1)]
    counts = _counts(need)
    summed = counts[:count].copy()
    for step in range(1, window_last):
        # A block that straddles two passes: its first rows belong to the narrower window.
        start = 0 if step < window_first else step * len(lines) - first
        summed[start:] += counts[step + start : step + count]
    return _scaled(summed)


def _counts(lines: Sequence[bytes]) -> Counts:
    """Signed counts of hashed n-grams, shape (lines, DIMENSIONS)."""
    text = _LOWER[np.frombuffer(b"\n".join(lines) + b"\n", dtype=np.uint8)]
    ends = text == _NEWLINE
    line_of = np.cumsum(ends) - ends
    counts = np.zeros(len(lines) * DIMENSIONS)
    for size in NGRAM_CHARS:
        if len(text) < size:
            continue
        hashed, inside = _hash_ngrams(text, line_of, size)
        column = (hashed >> np.uint32(24)) & np.uint32(DIMENSIONS - 1)
        sign = 1.0 - 2.0 * ((hashed >> np.uint32(23)) & np.uint32(1))[inside]
        index = line_of[: len(hashed)][inside] * DIMENSIONS + column[inside]
        counts += np.bincount(index, weights=sign, minlength=len(counts))
    return counts.reshape(len(lines), DIMENSIONS).astype(np.float32)


def _hash_ngrams(
    text: npt.NDArray[np.uint8], line_of: npt.NDArray[np.int64], size: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
    """A 32-bit hash of each run of `size` bytes, and whether the run lies within one line."""
    count = len(text) - size + 1
    hashed = np.full(count, size, dtype=np.uint32)
    for step in range(size):
        hashed = (hashed ^ text[step : step + count]) * np.uint32(0x01000193)
        hashed ^= hashed >> np.uint32(15)
    hashed *= np.uint32(0x9E3779B1)
    # The newline ends its line: a run that reaches it is not text of the line alone.
    inside = line_of[:count] == line_of[size - 1 :]
    inside &= text[size - 1 :] != _NEWLINE
    return hashed, inside


def _scaled(counts: Counts) -> Features:
    damped = np.sign(counts) * np.sqrt(np.abs(counts))
    length = np.sqrt(np.einsum("ij,ij->i", damped, damped))
    return np.asarray(damped / np.maximum(length, 1e-12)[:, None], dtype=np.float32)
