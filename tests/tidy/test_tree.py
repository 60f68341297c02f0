"""The tree's shape: Python's layers and sizes, honest tests, links that lead somewhere."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python/quire"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [
    *MODULES,
    *sorted((ROOT / "bench").glob("*.py")),
    *sorted((ROOT / "examples").glob("*.py")),
    *sorted((ROOT / "tests").rglob("*.py")),
]
LINES_MAX = 600
FUNCTION_LINES_MAX = 70

# From the top; a module may import those of its own row and of the rows below it.
LAYERS = (
    ("tools", "testing", "compat"),
    ("_concatenate", "ring"),
    ("arena",),
    ("_api", "_map", "_shared", "packing"),
    ("creation", "shared_mapping", "opened_file"),
    ("kernel_mapping", "shared_names", "mapped_file", "memory_file"),
    ("mapping", "stats"),
    ("pager", "store"),
    ("npy", "layout", "limits"),
    ("shared_records", "pmap"),
    ("map_flags", "devices", "sizes", "errors", "_fork", "swap", "residency"),
    ("model",),  # independent of all above, which may look at it
)


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring, whose length is its reader's gain."""
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    saved = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
    return (function.end_lineno or 0) - function.lineno + 1 - saved


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LINES_MAX
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert body_lines(node) < FUNCTION_LINES_MAX, f"{path}:{node.lineno} {node.name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    rows = {name: number for number, names in enumerate(LAYERS) for name in names}
    own = rows.get(path.relative_to(PACKAGE).with_suffix("").parts[0])
    if own is None:
        assert path.name == "__init__.py"  # the public names
        return
    used = set(re.findall(r"^\s*(?:from|import) quire\.(\w+)", path.read_text(), re.MULTILINE))
    assert {name for name in used & rows.keys() if rows[name] < own} == set()


def sleeps_of(source: str) -> list[int]:
    """Lines that sleep, or import what does."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            of, _, named = ast.unparse(node.func).rpartition(".")
            named = "" if of == "asyncio" else named  # that one waits to be cancelled
        elif isinstance(node, ast.ImportFrom):
            named = "sleep" if "sleep" in {alias.name for alias in node.names} else ""
        else:
            continue
        if named == "sleep":
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=str)
def test_tests_wait_for_conditions(path: Path) -> None:
    assert sleeps_of(path.read_text()) == []


def test_every_sleep_is_seen() -> None:
    for source in (
        "import time\ntime.sleep(1)",
        "import time as t\nt.sleep(1)",
        "pass\nfrom time import sleep as nap",
        "pass\nsleep(1)",
    ):
        assert sleeps_of(source) == [2]
    assert sleeps_of("asleep(1)\nsleep = 1") == []


def test_links_of_documents_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "bench/README.md"]:
        for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_no_path_of_a_developers_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    homes = re.compile(r"/(?:root|home/\w+|work)/(?:main|shared|\.library|\.pyenv)\b")
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.suffix in {".py", ".rs", ".md", ".toml", ".pyi", ".sh", ".c"} and path.exists():
            assert not homes.search(path.read_text()), name
