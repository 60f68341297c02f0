"""What all suites share."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from quire import _core
from quire.testing.pmaps import working_pmaps


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--best-pmap",
        action="store_true",
        help="of the contract tests, only those with the best pmap here, or with none",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves contract tests of other pmaps out, if asked for."""
    if not config.getoption("--best-pmap"):
        return
    others = {str(rung["name"]) for rung in _core.probe()} - set(working_pmaps()[:1])

    def is_left_out(item: pytest.Item) -> bool:
        given = getattr(item, "callspec", None)
        values = given.params.values() if given and "contract" in item.path.parts else ()
        return any(isinstance(value, str) and value.partition(":")[0] in others for value in values)

    config.hook.pytest_deselected(items=[item for item in items if is_left_out(item)])
    items[:] = [item for item in items if not is_left_out(item)]


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
