"""numpy's own tests of `memmap`, over quire's.

All of `test_memmap`, and of the tests of `.npy` files and of `load` those that map. They are those
of the installed numpy, and are compared with the same tests over its own class.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

NUMPY = Path(np.__file__).parent
HERE = Path(__file__).parent
SUITES = [
    (["_core/tests/test_memmap.py"], "", 21),
    (["lib/tests/test_format.py", "lib/tests/test_io.py"], "memmap or mmap", 5),
]


def outcomes(files: list[str], keyword: str, plugin: list[str], folder: Path) -> dict[str, str]:
    """What became of each test."""
    report = folder / f"report-{len(plugin)}.xml"
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    argv += ["-c", os.devnull, f"--rootdir={NUMPY}", f"--junitxml={report}", *plugin]
    argv += ["-k", keyword, *(str(NUMPY / name) for name in files)]
    done = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        timeout=110,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )
    assert report.exists(), done.stdout + done.stderr
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        what = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        text = "".join(child.text or "" for child in case)
        found[f"{case.get('classname')}.{case.get('name')}"] = (
            f"{what[0]}: {text}" if what else "ok"
        )
    return found


@pytest.mark.parametrize(("files", "keyword", "count"), SUITES, ids=["memmap", "format"])
def test_none_regresses_and_none_is_newly_skipped(
    files: list[str], keyword: str, count: int, tmp_path: Path
) -> None:
    for name in files:
        assert (NUMPY / name).exists(), (
            "this numpy came without its tests (Debian splits them off): pip install numpy"
        )
    standard = outcomes(files, keyword, [], tmp_path)
    ours = outcomes(files, keyword, ["-p", "numpy_memmap_plugin"], tmp_path)
    assert ours.keys() == standard.keys()
    wrong = {
        name: outcome
        for name, outcome in ours.items()
        if outcome != "ok" and standard[name] == "ok"
    }
    assert wrong == {}
    assert sum(outcome == "ok" for outcome in ours.values()) >= count
