"""Corpus and features: the same text always gives the same rows, and rows mean something."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from quire.tools.demo import corpus, features

if TYPE_CHECKING:
    from pathlib import Path

LINES = [
    f"value_{number} = compute(number={number}, name='n{number}')".encode() for number in range(50)
]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A small folder of Python sources."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "one.py").write_text("import numpy as np\nx = 1\n\n    def compute(self):\n")
    (tmp_path / "inner" / "two.py").write_text("import numpy as np\nreturn the_second_file\n")
    (tmp_path / "data.txt").write_text("this is not a source of Python\n")
    return tmp_path


def test_lines_are_distinct_collapsed_and_of_the_right_length(sources: Path) -> None:
    lines = corpus.distinct_lines(100, 1, roots=[sources])
    assert sorted(lines) == [
        b"def compute(self):",
        b"import numpy as np",
        b"return the_second_file",
    ]


def test_the_seed_decides_the_order_and_the_limit_holds(sources: Path) -> None:
    orders = {tuple(corpus.distinct_lines(100, seed, roots=[sources])) for seed in range(20)}
    assert len(orders) == 2
    assert len(corpus.distinct_lines(2, 1, roots=[sources])) == 2


def test_this_installation_has_text() -> None:
    assert len(corpus.distinct_lines(5_000, 1)) == 5_000


def test_rows_have_length_one_and_do_not_depend_on_their_neighbours() -> None:
    together = features.featurise(LINES)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)
    for line, row in zip(LINES[:5], together[:5], strict=True):
        assert np.array_equal(features.featurise([line])[0], row)


def test_a_line_too_short_for_an_ngram_is_zero() -> None:
    assert not features.featurise([b"x"]).any()
    assert not features.featurise([b""]).any()


@pytest.mark.parametrize("block", [1, 7, 50, 1000])
def test_windows_are_the_same_whatever_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(features, "BLOCK_LINES", block)
    features.write_matrix(LINES, 130, tmp_path / "x.npy")
    found = np.load(tmp_path / "x.npy")
    assert found.shape == (130, features.DIMENSIONS)
    for row in (0, 49, 50, 99, 100, 129):
        window, first = row // 50 + 1, row % 50
        counts = sum(features._counts([LINES[(first + step) % 50]]) for step in range(window))
        np.testing.assert_allclose(found[row], features._scaled(counts)[0], atol=1e-6)


def test_the_text_of_a_window_names_its_lines() -> None:
    lines = [b"first", b"second", b"third"]
    assert features.row_text(lines, 1) == "second"
    assert features.row_text(lines, 5) == "third / first"


def test_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no Python sources"):
        features.write_matrix([], 10, tmp_path / "x.npy")
