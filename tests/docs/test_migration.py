"""The sessions in the pages of `docs/migration`, typed again."""

import doctest
from pathlib import Path

import pytest

MIGRATION = Path(__file__).resolve().parents[2] / "docs/migration"
PAGES = sorted(page for page in MIGRATION.glob("*.md") if ">>> " in page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_sessions_show_what_they_show(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = doctest.ELLIPSIS | doctest.REPORT_NDIFF
    failed, done = doctest.testfile(str(page), module_relative=False, optionflags=flags)
    assert (failed, done > 0) == (0, True)


def test_there_are_pages() -> None:
    assert {"README", "mmap"} <= {page.stem for page in PAGES}
