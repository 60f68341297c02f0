"""What all suites share."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from quire import _core


@pytest.fixture
def rows() -> np.ndarray:
    """About 2 MiB of numbers that differ everywhere."""
    return np.random.default_rng(7).random((512, 512))


@pytest.fixture
def rows_file(rows: np.ndarray, tmp_path: Path) -> Path:
    """`rows` as a `.npy` file."""
    path = tmp_path / "rows.npy"
    np.save(path, rows)
    return path


@pytest.fixture
def no_mapping_left() -> Iterator[None]:
    """Fails a test after which a mapping is still open."""
    before = _core.live_mappings()
    yield
    gc.collect()
    assert _core.live_mappings() <= before
