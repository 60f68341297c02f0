"""Runs the standard library's tests of shared memory, over its classes or over quire's.

Usage: cpython_shared_memory.py fork|forkserver|spawn standard|quire

Prints a JSON object: the outcome of each test. A process that the tests start with spawn or
forkserver runs this file first, as `__mp_main__`, and so replaces the module there too.
"""

import json
import multiprocessing
import sys
import unittest


def replace_module() -> None:
    """Has `multiprocessing.shared_memory` be quire's, for who imports it from now on."""
    import quire.compat.shared_memory as ours

    sys.modules["multiprocessing.shared_memory"] = ours
    multiprocessing.shared_memory = ours


if sys.argv[2:3] == ["quire"]:
    replace_module()


class Outcomes(unittest.TestResult):
    """Keeps the outcome of each test, and the traceback of what failed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}

    def _set(self, test: unittest.TestCase, outcome: str) -> None:
        name = test.id().rpartition(".")[2]
        if self.found.get(name, "ok") == "ok":
            self.found[name] = outcome

    def addSuccess(self, test):  # noqa: N802
        self._set(test, "ok")

    def addError(self, test, error):  # noqa: N802
        self._set(test, f"error: {self._exc_info_to_string(error, test)}")

    def addFailure(self, test, error):  # noqa: N802
        self._set(test, f"failed: {self._exc_info_to_string(error, test)}")

    def addSkip(self, test, reason):  # noqa: N802
        self._set(test, f"skipped: {reason}")

    def addSubTest(self, test, subtest, error):  # noqa: N802
        if error is not None:
            self._set(test, f"failed: {self._exc_info_to_string(error, test)}")


def main() -> None:
    from test import _test_multiprocessing

    names: dict[str, object] = {"__name__": "__main__"}
    _test_multiprocessing.install_tests_in_module_dict(names, sys.argv[1])
    tests = unittest.defaultTestLoader.loadTestsFromTestCase(names["WithProcessesTestSharedMemory"])
    outcomes = Outcomes()
    names["setUpModule"]()
    tests.run(outcomes)
    names["tearDownModule"]()
    print(json.dumps(outcomes.found))


if __name__ == "__main__":
    main()
