"""Every recorded row on the model: each configuration gives the same outcomes."""

from pathlib import Path

import pytest

from quire.model import GEOMETRIES
from quire.testing.replay.replay import Setting, replay
from quire.testing.replay.rows import read_rows

CASES = Path(__file__).parent / "cases"
FILES = ("cases", "more_cases", "huge_cases", "random_cases", "random_long_cases")
ROWS = {
    "cases": 189,
    "more_cases": 719,
    "huge_cases": 73,
    "random_cases": 1000,
    "random_long_cases": 40,
}
SKIPPED = {"arch:x86-64", "operations after advisory_from"}

SETTINGS = [
    Setting(frames=4, tlb=2, checked=True),
    Setting(frames=16, tlb=0),
    *(Setting(geometry=name) for name in GEOMETRIES),
    Setting(frames=6, tlb=3, geometry="aarch64-64k", checked=True),
]


def rows_of(name, every=1):
    return read_rows(CASES / f"{name}.jsonl.gz")[::every]


def check(rows, setting):
    total = replay(rows, setting)
    assert total.mismatches == []
    assert set(total.skipped) <= SKIPPED
    return total


@pytest.mark.parametrize("name", FILES)
def test_every_row(name):
    total = check(rows_of(name), Setting())
    assert total.rows == ROWS[name]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_every_configuration(setting):
    """A sample of rows; `make test-long` replays all of them."""
    check(rows_of("cases"), setting)
    check(rows_of("more_cases", every=9), setting)
    check(rows_of("random_cases", every=40), setting)


@pytest.mark.long
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("name", FILES)
def test_every_row_in_every_configuration(name, setting):
    check(rows_of(name), setting)


@pytest.mark.parametrize("every", [20])
def test_invariants_after_every_operation(every):
    check(rows_of("random_cases", every), Setting(checked=True))
    check(rows_of("random_long_cases", every), Setting(checked=True))
