"""Readahead: columns and walks backwards are filled ahead, random rows are not."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

import quire
from quire.testing.pmaps import working_pmaps
from quire.testing.waiting import wait_until

PAGE = 4096
ROWS = 1500
# Rows of 5.3 granules: those of a column are not at one distance from each other.
COLUMNS = 21_760 // 8


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("readahead") / "matrix"
    np.arange(ROWS * COLUMNS, dtype="i8").tofile(path)
    return path


@pytest.fixture(params=working_pmaps())
def mapping(request: pytest.FixtureRequest, path: Path) -> Iterator[quire.Mapping]:
    shape = (ROWS, COLUMNS)
    with quire.open(path, dtype="i8", shape=shape, granule=PAGE, pmap=request.param) as mapping:
        yield mapping


def touch(mapping: quire.Mapping, places: Iterable[tuple[int, int]]) -> None:
    """Reads one number of each place."""
    for row, column in places:
        assert mapping.array[row, column] == row * COLUMNS + column


# Of a walk from granule to granule: four huge pages, whose use no fault tells.
LAST_WINDOW = 4 * (2 << 20) // PAGE


def check_read_ahead(mapping: quire.Mapping, granules: int, last_window: int = 0) -> None:
    """Nearly all of what was touched was filled ahead, and little else."""
    # All pages of a run can be read as soon as they are there, a moment before they are counted.
    wait_until(lambda: mapping.statistics().readahead_fills >= granules * 7 // 8, "fills")
    counted = mapping.statistics()
    assert counted.faults <= granules // 8
    assert granules * 7 // 8 <= counted.readahead_fills <= granules * 9 // 8
    assert counted.readahead_hits >= granules * 7 // 8 - last_window
    assert counted.readahead_wasted <= granules // 50


def test_a_column_is_read_ahead(mapping):
    assert mapping.array[:, 7].sum() == (np.arange(ROWS) * COLUMNS + 7).sum()
    check_read_ahead(mapping, ROWS)


def test_a_column_backwards_is_read_ahead(mapping):
    touch(mapping, ((row, 1000) for row in reversed(range(ROWS))))
    check_read_ahead(mapping, ROWS)


def test_a_walk_backwards_is_read_ahead(mapping):
    flat = mapping.array.reshape(-1)
    for place in range(flat.size - 1, 0, -PAGE // 8):
        assert flat[place] == place
    check_read_ahead(mapping, flat.nbytes // PAGE, LAST_WINDOW)


def test_two_columns_in_turns_are_read_ahead(mapping):
    touch(mapping, ((row, column) for row in range(ROWS) for column in (3, 1300)))
    check_read_ahead(mapping, 2 * ROWS)


def test_random_rows_are_not(mapping):
    order = np.random.default_rng(5).permutation(ROWS)
    touch(mapping, ((int(row), 7) for row in order))
    counted = mapping.statistics()
    assert counted.readahead_fills <= ROWS // 100
    assert counted.faults >= ROWS * 98 // 100
