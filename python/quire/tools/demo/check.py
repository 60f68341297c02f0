"""Compares the answers that quire's array gave with those of plain numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

SCORE_TOLERANCE = 1e-4
EXACT = "equal in every bit"


@dataclass(frozen=True)
class Check:
    """One comparison: what was compared, how many values, whether all agreed, and words."""

    name: str
    compared: int
    passed: bool
    detail: str


def compare(folder: Path, quire_result: dict[str, Any], plain: dict[str, Any]) -> list[Check]:
    """All comparisons of two runs of `workload.run` in `folder`.

    Rows must agree in every byte. Scores may differ as far as another order of summing floating
    point numbers allows, 1e-4 of the largest score, and by nothing at all for numbers read wrongly.
    """
    checks = [_rows(folder, "rows", "look-ups"), _rows(folder, "hot", "hot look-ups")]
    ours, theirs = quire_result["outcome"], plain["outcome"]
    queries = len(ours["nearest_rows"])
    checks.append(_all_scores([_scores(folder, number) for number in range(queries)]))
    if theirs is not None:
        same = ours["nearest_rows"] == theirs["nearest_rows"]
        count = sum(len(rows) for rows in ours["nearest_rows"])
        checks.append(Check("nearest rows", count, same, "same rows, same order"))
    if theirs is not None and theirs["digest"] is not None:
        same = ours["digest"] == theirs["digest"]
        size = quire_result["array"]["bytes"]
        checks.append(Check("all bytes", size, same, "BLAKE2b of the whole array"))
    if "queries_equal" in plain:
        checks.append(Check("queries", queries, plain["queries_equal"], "the rows looked for"))
    return checks


def _rows(folder: Path, kind: str, name: str) -> Check:
    ours, theirs = (np.load(folder / f"{side}-{kind}.npy") for side in ("quire", "numpy"))
    if len(ours) != len(theirs):
        return Check(name, len(ours), False, f"{len(ours)} rows against {len(theirs)}")
    wrong = int((ours != theirs).sum())
    detail = "CRC-32 of each row" if not wrong else f"{wrong} rows differ"
    return Check(name, len(ours), not wrong, detail)


def _all_scores(checks: list[Check]) -> Check:
    """One check of all queries: what failed, or the first that is not equal in every bit."""
    compared = sum(one.compared for one in checks)
    failed = [f"{one.name}: {one.detail}" for one in checks if not one.passed]
    details = failed or [one.detail for one in checks if one.detail != EXACT] or [EXACT]
    return Check("scores", compared, not failed, "; ".join(details[:3]))


def _scores(folder: Path, number: int) -> Check:
    ours, theirs = (np.load(folder / f"{side}-scores-{number}.npy") for side in ("quire", "numpy"))
    name = f"query {number + 1}"
    if ours.shape != theirs.shape:
        return Check(name, len(ours), False, f"{len(ours)} scores against {len(theirs)}")
    if np.array_equal(ours, theirs, equal_nan=True):
        return Check(name, len(ours), True, EXACT)
    finite = np.isfinite(ours) & np.isfinite(theirs)
    same_rest = np.array_equal(ours[~finite], theirs[~finite], equal_nan=True)
    scale = float(np.abs(theirs[finite]).max(initial=0.0)) or 1.0
    apart = float(np.abs(ours[finite] - theirs[finite]).max(initial=0.0)) / scale
    passed = same_rest and apart <= SCORE_TOLERANCE
    return Check(name, len(ours), passed, f"largest difference {apart:.1e} of the largest score")
