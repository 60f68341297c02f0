"""Python's faulthandler beside mappings: enabled before them, after them, and in between."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import functools
import inspect
import json
import mmap
import os
import signal
import sys
import tempfile
import threading
import traceback

import numpy as np
import pytest

import quire
from quire import _core
from quire.testing import children
from quire.testing.content import random_content
from quire.testing.touches import TOUCHES

PAGE = mmap.PAGESIZE
SIZE = 64 * PAGE + 77
CONTENT = random_content(SIZE, 17)
MODEL = np.frombuffer(CONTENT, "u1")
BAD_OFFSET = 40 * PAGE
BAD = {"offset": BAD_OFFSET, "length": 1, "errno": errno.EIO}
CRASH = "Fatal Python error: Segmentation fault"
# Each scenario is a list of steps.
READS = [
    "enable open read",
    "enable open read disable read",
    "open read enable read",
    "open read enable read disable read enable read disable read",
    "open enable open read disable read",
    "enable open enable open read disable enable read",
    "open enable_unseen read read",
    "enable open disable_unseen open read",
]
ENABLED = [
    "enable open read",
    "open read enable read",
    "open enable_unseen",
    "open enable_unseen open read",
    "enable open disable open enable open read",
]
DISABLED = ["open read", "enable open read disable", "open enable_unseen open disable_unseen read"]
CRASHES = ["null", "write_null", "crash_in_thread"]
HANG_S = 20


def map_content(pmap: str, **faults: object) -> quire.Mapping:
    """Maps `CONTENT` under a budget that holds a quarter, so that every pass faults."""
    store = _core.open_memory(CONTENT, "content")
    if faults:
        store = _core.open_faulty(store, **faults)  # type: ignore[arg-type]
    return quire.open(store, dtype="u1", pmap=pmap, granule=PAGE, budget=16 * PAGE, retries=0)


def check(array: np.ndarray) -> None:
    """All of it, and in another order."""
    assert np.array_equal(array, MODEL)
    assert np.array_equal(array[::-4096], MODEL[::-4096])


class Steps:
    """What a process does with faulthandler, mappings and signals; one method a step."""

    def __init__(self, pmap: str) -> None:
        self.pmap = pmap
        self.mappings: list[quire.Mapping] = []

    def enable(self) -> None:
        faulthandler.enable()

    def disable(self) -> None:
        faulthandler.disable()

    def enable_unseen(self) -> None:
        """As by code that took the function before quire was imported: quire is not told."""
        inspect.unwrap(faulthandler.enable)()

    def disable_unseen(self) -> None:
        inspect.unwrap(faulthandler.disable)()

    def open(self) -> None:
        self.mappings.append(map_content(self.pmap))

    def read(self) -> None:
        for mapping in self.mappings:
            check(mapping.array)
            assert mapping.failed is None

    def fail(self) -> None:
        """A page error in a mapping that is new, and in one from before faulthandler's changes."""
        old, new = (map_content(self.pmap, **BAD) for _ in range(2))
        TOUCHES["item"](old.array[:1])
        for mapping, touch in ((new, "item"), (old, "sum")):
            part = mapping.array[: BAD_OFFSET + 1]
            with pytest.raises(quire.PageIOError):
                TOUCHES[touch](part)
            self.disable()
            self.enable()

    def null(self) -> None:
        ctypes.string_at(0)

    def write_null(self) -> None:
        ctypes.memset(0, 1, 1)

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def crash_in_thread(self) -> None:
        thread = threading.Thread(target=ctypes.string_at, args=(0,))
        thread.start()
        thread.join()


def child_takes_steps(pmap: str) -> None:
    """Reads scenarios, runs each in a fork of its own, and writes how each ended."""
    for scenario in sys.stdin.read().splitlines():
        ended = {}
        with tempfile.TemporaryFile("w+") as said:
            pid = os.fork()
            if pid == 0:
                take_steps(scenario, pmap, said.fileno())
            ended["status"] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            said.seek(0)
            ended["said"] = said.read()
        print(json.dumps([scenario, ended]), flush=True)


def take_steps(scenario: str, pmap: str, said: int) -> None:
    """Never returns."""
    os.dup2(said, 1)
    os.dup2(said, 2)
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    try:
        steps = Steps(pmap)
        for step in scenario.split():
            getattr(steps, step)()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


@functools.cache
def ends(pmap: str) -> dict[str, tuple[int, str]]:
    """How every scenario ends, and what it says; one interpreter for all of them."""
    scenarios = [*READS, *(f"{order} fail read" for order in ENABLED)]
    scenarios += [f"{order} {crash}" for order in ENABLED for crash in [*CRASHES, "kill"]]
    scenarios += [f"{order} {crash}" for order in DISABLED for crash in CRASHES]
    scenarios += ["open read kill", "enable open read disable kill"]
    lines = children.run(child_takes_steps, pmap, stdin="\n".join(scenarios)).check().splitlines()
    return {steps: (ended["status"], ended["said"]) for steps, ended in map(json.loads, lines)}


def check_false_alarms_only(steps: str, said: str) -> None:
    """Where faulthandler stands above quire it reports a fault that quire then resolves."""
    assert said.count("Fatal Python error: ") == said.count("(most recent call first)"), said
    assert not said or "enable_unseen" in steps, said
    assert not said or said.startswith("Fatal Python error: "), said


@pytest.mark.parametrize("steps", READS)
def test_faulthandler_does_not_change_what_is_read(steps: str, pmap: str) -> None:
    status, said = ends(pmap)[steps]
    assert status == 0, said
    check_false_alarms_only(steps, said)


@pytest.mark.parametrize("steps", ENABLED)
def test_page_errors_are_raised_beside_faulthandler(steps: str, pmap: str) -> None:
    status, said = ends(pmap)[f"{steps} fail read"]
    assert status == 0, said
    check_false_alarms_only(steps, said)


@pytest.mark.parametrize("crash", [*CRASHES, "kill"])
@pytest.mark.parametrize("steps", ENABLED)
def test_a_crash_is_a_crash_with_faulthandler(steps: str, crash: str, pmap: str) -> None:
    """The process ends by the signal, and faulthandler says where."""
    status, said = ends(pmap)[f"{steps} {crash}"]
    assert status == -signal.SIGSEGV, said
    # A false alarm ends faulthandler's care for its own signal; a crash by SIGSEGV is reported.
    assert said.count(CRASH) == 1, said
    assert "in take_steps" in said or crash == "crash_in_thread"


@pytest.mark.parametrize("crash", CRASHES)
@pytest.mark.parametrize("steps", DISABLED)
def test_a_crash_is_a_crash_without_faulthandler(steps: str, crash: str, pmap: str) -> None:
    """Also where faulthandler lies disabled among the handlers before quire's."""
    status, said = ends(pmap)[f"{steps} {crash}"]
    assert (status, said) == (-signal.SIGSEGV, "")


def test_a_signal_that_was_sent_ends_the_process(pmap: str) -> None:
    for steps in ("open read kill", "enable open read disable kill"):
        assert ends(pmap)[steps] == (-signal.SIGSEGV, "")


if __name__ == "__main__":
    children.main()
