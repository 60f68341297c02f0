"""The pages of the folders of `docs`, done again: a block shows what stands in it.

Each page is done in a process and a folder of its own, in which the examples are, and each block
goes on where the last one ended. Its kind is the word after the fence: what is typed follows the
prompt of `SESSIONS`, and what was shown stands below it; "..." there stands for anything, as in
doctest. A block ``python`` is a file, named by its first line; a block without a kind is a drawing.
"""

import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import ClassVar

import pytest

from quire.model.session import Session
from quire.testing import children

DOCS = Path(__file__).resolve().parents[2] / "docs"
FOLDERS = ("guide", "internals", "migration")
PAGES = sorted(path for name in FOLDERS for path in (DOCS / name).glob("*.md"))
BLOCK = re.compile(r"^```(.*)\n((?:(?!```).*\n)*)```$", re.MULTILINE)
NEVER = r"(?!)"
FILE = re.compile(r"# ([\w.]+)\n")


class ModelSession:
    """The simulated machine, as `quire model` shows it."""

    prompt, more = "> ", NEVER

    def __init__(self) -> None:
        self.session = Session()

    def do(self, typed: str) -> str:
        step = str(self.session.do(typed.rstrip()))
        return "".join(f"{line}\n" for line in step.splitlines()[1:])  # the first is what is typed


class PythonSession:
    """Python, with all but the last line of a traceback left out."""

    prompt, more = ">>> ", r"\.\.\. ?"

    def __init__(self) -> None:
        self.names: dict[str, object] = {"__name__": "__main__"}

    def do(self, typed: str) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            try:
                exec(compile(typed, "<page>", "single"), self.names)
                for _ in range(10):  # a moment for the exception of a touched page to come
                    pass
            except Exception as error:
                print("Traceback (most recent call last):\n    ...")
                print(*traceback.format_exception_only(error), sep="", end="")
        return out.getvalue()


class ShellSession:
    """Commands, the project's interpreter and tools first."""

    prompt, more = r"\$ ", NEVER

    def do(self, typed: str) -> str:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            typed,
            shell=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PATH": path},
        )
        return done.stdout


class Page:
    """What its blocks have led to."""

    SESSIONS: ClassVar = {"trace": ModelSession, "pycon": PythonSession, "console": ShellSession}

    def __init__(self, text: str) -> None:
        self.text = text
        self.sessions = {kind: session() for kind, session in self.SESSIONS.items()}

    def as_shown(self) -> str:
        """The page as it should be: all that is typed, with what that shows now."""
        return BLOCK.sub(lambda found: self.block(found[1], found[2]), self.text)

    def block(self, kind: str, body: str) -> str:
        return f"```{kind}\n{self.body(kind, body)}```"

    def body(self, kind: str, body: str) -> str:
        if kind == "":
            return body
        if kind == "python":
            named = FILE.match(body)
            assert named, f"the first line of a file is a comment with its name: {body}"
            Path(named[1]).write_text(body)
            return body
        session = self.sessions[kind]
        typed = rf"^{session.prompt}.*\n(?:{session.more}.*\n)*"
        entry = re.compile(rf"({typed})((?:(?!{session.prompt}).*\n)*)", re.MULTILINE)
        prompts = re.compile(rf"^(?:{session.prompt}|{session.more})", re.MULTILINE)
        parts = []
        for found in entry.finditer(body):
            shown = session.do(prompts.sub("", found[1]))
            said = doctest.OutputChecker().check_output(found[2], shown, doctest.ELLIPSIS)
            parts.append(found[1] + (found[2] if said else shown))
        return "".join(parts)


def child_shows(page: str) -> None:
    # A page shows fork, beside threads of quire's own.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    Path("examples").symlink_to(DOCS.parent / "examples")
    print(Page(Path(page).read_text()).as_shown(), end="")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_blocks_are_what_they_show(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = children.run(child_shows, page, flags=("-W", "error")).check()
    assert shown == page.read_text()


def test_every_page_is_listed_and_has_blocks() -> None:
    for page in PAGES:
        if page.name != "README.md":
            assert f"({page.name})" in (page.parent / "README.md").read_text()
            assert any(kind for kind, _ in BLOCK.findall(page.read_text()))


WRONG = """
```{kind}
{typed}
something else
```
"""


@pytest.mark.parametrize(
    ("kind", "typed", "shown"),
    [
        ("trace", "> file f 100", "  f: 100 bytes\n"),
        ("pycon", ">>> 1 + 1", "2\n"),
        ("pycon", ">>> for n in range(2):\n...     n\n...", "0\n1\n"),
        ("pycon", ">>> 1 / 0", "    ...\nZeroDivisionError: division by zero\n"),
        ("pycon", ">>> print()", "\n\n"),
        ("console", "$ echo said; false", "said\n"),
        ("console", "$ python -c 'import quire'", "'\n```\n"),
    ],
)
def test_what_is_not_shown_is_found(kind: str, typed: str, shown: str) -> None:
    text = WRONG.format(kind=kind, typed=typed)
    found = Page(text).as_shown()
    assert "something else" not in found
    assert shown in found
    assert Page(found).as_shown() == found


def test_anything_may_be_elided_and_every_block_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = "```pycon\n>>> list(range(20))\n[0, 1, ... 19]\n```\n"
    assert Page(good).as_shown() == good
    file = "```python\n# hello.py\nprint(40 + 2)\n```\n\n```console\n$ python hello.py\n42\n```\n"
    assert Page(file).as_shown() == file
    with pytest.raises(KeyError):
        Page("```ruby\nputs 1\n```\n").as_shown()
    with pytest.raises(AssertionError, match="its name"):
        Page("```python\nprint(1)\n```\n").as_shown()


if __name__ == "__main__":
    children.main()
