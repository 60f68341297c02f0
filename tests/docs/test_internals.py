"""The traces of `docs/internals`, run again: each block goes on where the last one ended."""

import re
from pathlib import Path

import pytest

from quire.model.session import Session

INTERNALS = Path(__file__).resolve().parents[2] / "docs/internals"
PAGES = sorted(INTERNALS.glob("*.md"))
TRACE = re.compile(r"^```trace\n(.*?)^```", re.MULTILINE | re.DOTALL)


def traced(block: str, session: Session) -> str:
    """What a block should be: its lines done, with all they show."""
    lines = [line[2:] for line in block.splitlines() if line.startswith("> ")]
    return "".join(f"{session.do(line)}\n" for line in lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_traces_are_what_the_model_shows(page: Path) -> None:
    session = Session()
    for block in TRACE.findall(page.read_text()):
        assert traced(block, session) == block


def test_every_page_is_listed_and_has_traces() -> None:
    index = (INTERNALS / "README.md").read_text()
    for page in PAGES:
        if page.name != "README.md":
            assert f"({page.name})" in index
            assert TRACE.search(page.read_text())
