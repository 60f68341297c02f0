"""The core's shape: layers, sizes, `unsafe`, counters, and no interpreter below the fault path."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "crates/quire-core/src"
FILES = sorted(CORE.rglob("*.rs")) + sorted((ROOT / "crates/quire-py/src").rglob("*.rs"))
LINES_MAX = 600
FUNCTION_LINES_MAX = 70

# From the top: a module may use those of its own row and of the rows below it.
LAYERS = (
    ("arena",),
    ("mapping", "kernel_mapping"),
    ("pmap/uffd", "runtime"),
    ("daemon", "kernel_daemon"),
    ("residency",),
    ("fault",),
    ("fill",),
    ("load", "pageout"),
    ("laundry", "watermark"),
    ("space",),
    ("memory_object",),
    ("page_cache", "pager", "pmap"),
    ("page", "policy", "standby", "readahead", "pressure", "dirty"),
    ("store", "swap"),
    ("interrupt", "buffers", "lease"),
    ("counters",),
    ("sys",),
    ("units", "errors", "range_set"),
)
# A handler thread of `pmap/uffd` calls `fault`; `space` holds the threads that fill (their type
# only); `runtime` starts what `fault` finds: the three places where a lower layer names an upper.
UPWARD = {("space", "fill"), ("fault", "runtime"), ("pmap", "pmap/uffd"), ("page", "interrupt")}


def module_of(path: Path) -> str:
    parts = path.relative_to(CORE).with_suffix("").parts
    return "pmap/uffd" if parts == ("pmap", "uffd") else parts[0]


def row(module: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if module in names)


def code_of(path: Path) -> str:
    """The file without its tests and comments."""
    code = path.read_text().split("#[cfg(test)]\nmod tests")[0]
    return re.sub(r"^\s*//.*$", "", code, flags=re.MULTILINE)


@pytest.mark.parametrize(
    "path", [p for p in FILES if CORE in p.parents and p.name != "lib.rs"], ids=str
)
def test_imports_point_down(path: Path) -> None:
    own = module_of(path)
    used = set(re.findall(r"crate::(\w+)", code_of(path)))
    upward = {
        name
        for name in used - {own.split("/")[0]}
        if row(name) < row(own) and (own, name) not in UPWARD
    }
    assert not upward


@pytest.mark.parametrize("path", FILES, ids=str)
def test_sizes(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= LINES_MAX
    started: tuple[int, str] | None = None
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if re.match(r"\s*(pub(\(\w+\))? )?(unsafe )?(extern \"C\" )?(const )?fn ", line):
            started = (number, " " * indent + "}")
        elif started is not None and line == started[1]:
            assert number - started[0] < FUNCTION_LINES_MAX, f"{path}:{started[0] + 1}"
            started = None


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_unsafe_block_states_why_it_is_sound(path: Path) -> None:
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        if re.search(r"\bunsafe (\{|impl\b)", line) and not line.lstrip().startswith("//"):
            before = "\n".join(lines[max(0, number - 8) : number + 1])
            assert "SAFETY:" in before, f"{path}:{number + 1}"


def test_unsafe_is_denied_at_the_root_of_the_core() -> None:
    assert "#![deny(unsafe_code)]" in (CORE / "lib.rs").read_text()


def test_the_core_knows_no_interpreter() -> None:
    cargo = shutil.which("cargo") or str(Path.home() / ".cargo/bin/cargo")
    tree = subprocess.run(
        [cargo, "tree", "--package", "quire-core", "--edges", "all", "--prefix", "none"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "quire-core" in tree
    assert not re.search(r"\b(pyo3|cpython|python3-sys)\b", tree)


def test_every_counter_is_counted() -> None:
    text = (CORE / "counters.rs").read_text()
    names = re.findall(r"^    (\w+), \"\w+\", \".+\";$", text, re.MULTILINE)
    assert len(names) >= 9
    everything = "".join(code_of(path) for path in FILES if path.name != "counters.rs")
    assert [name for name in names if f"counters.{name}" not in everything] == []
