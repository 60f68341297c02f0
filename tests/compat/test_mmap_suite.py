"""CPython's own tests of `mmap`, over the standard module and over the drop-in, side by side."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

RUN = """
import importlib, json, sys, unittest
if sys.argv[1] != "mmap":
    sys.modules["mmap"] = importlib.import_module(sys.argv[1])
import test.test_mmap as suite
assert suite.mmap.__name__ == sys.argv[1]

class Outcomes(unittest.TextTestResult):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.found = {}

    def stopTest(self, test):
        super().stopTest(test)
        self.found.setdefault(test.id(), "ok")

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.found[test.id()] = f"skipped: {reason}"

    def addError(self, test, error):
        super().addError(test, error)
        self.found[test.id()] = f"error: {error[1]!r}"

    def addFailure(self, test, error):
        super().addFailure(test, error)
        self.found[test.id()] = f"failed: {error[1]!r}"

    def addSubTest(self, test, subtest, error):
        super().addSubTest(test, subtest, error)
        if error:
            self.found[test.id()] = f"failed: {subtest}: {error[1]!r}"

tests = unittest.defaultTestLoader.loadTestsFromModule(suite)
done = unittest.TextTestRunner(sys.stderr, resultclass=Outcomes, verbosity=0).run(tests)
print(json.dumps(done.found))
"""
NEEDED = (
    "this interpreter has no test.test_mmap, which is run over quire.compat.mmap: Debian and "
    "Ubuntu have it in the package libpython3-testsuite (apt-get install libpython3-testsuite), "
    "Fedora in python3-test"
)
TESTS_AT_LEAST = 38


def outcomes(module: str, folder: Path) -> dict[str, str]:
    """What became of each test of the suite over a module."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN, module],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=110,
    )
    if "No module named 'test.test_mmap'" in done.stderr or "No module named 'test'" in done.stderr:
        raise AssertionError(NEEDED)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_the_interpreters_own_suite(tmp_path: Path) -> None:
    standard = outcomes("mmap", tmp_path)
    ours = outcomes("quire.compat.mmap", tmp_path)
    assert len(standard) >= TESTS_AT_LEAST
    assert set(standard.values()) - {"ok"} == {
        found for found in standard.values() if found.startswith("skipped")
    }
    assert ours == standard
