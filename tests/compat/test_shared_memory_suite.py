"""The standard library's own tests of `multiprocessing.shared_memory`, over quire's classes.

They are those of the running interpreter, under each way to start a process, and compared with the
same tests over the standard classes. Two of them start an isolated interpreter, which has the
standard module whatever is replaced here (those of `INSIDES` cannot pass for that reason);
`test_shared_memory.py` does the same over quire's.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).with_name("cpython_shared_memory.py")

# Tests that look at the insides of what is replaced, with the reason.
INSIDES = {
    "test_shared_memory_tracking": (
        "Python 3.13: an isolated interpreter attaches by the standard class, to see that its "
        "resource tracker deletes the segment"
    ),
    "test_shared_memory_untracking": (
        "Python 3.13: an isolated interpreter attaches by the standard class, to see that its "
        "resource tracker does not delete the segment"
    ),
}


def outcomes(method: str, module: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, str(RUNNER), method, module], capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_none_regresses_and_none_is_newly_skipped(method: str) -> None:
    assert importlib.util.find_spec("test._test_multiprocessing") is not None, (
        "this Python came without its tests: install them (Debian: libpython3-testsuite)"
    )
    standard, ours = outcomes(method, "standard"), outcomes(method, "quire")
    assert ours.keys() == standard.keys()
    assert len(ours) >= 13
    wrong = {
        name: outcome
        for name, outcome in ours.items()
        if name not in INSIDES and outcome != "ok" and standard[name] == "ok"
    }
    assert wrong == {}
    assert sum(outcome == "ok" for outcome in ours.values()) >= 13
    for name in INSIDES.keys() & ours.keys():
        assert "multiprocessing/shared_memory.py" in ours[name], "it does not look at them any more"
