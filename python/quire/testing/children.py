"""Runs a function of a test file in an interpreter of its own: for what may kill or hang it.

The file ends with ``if __name__ == "__main__": children.main()``. A child that does not end in
time writes the stacks of its threads before it is killed.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from quire.testing.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

__all__ = ["Child", "Ended", "in_fork", "main", "run", "start"]

TIMEOUT_S = 60.0
STACKS_TIMEOUT_S = 5.0
IDLE_LOOKS = 40
STACKS_SIGNAL = signal.SIGUSR2


@dataclass(frozen=True)
class Ended:
    """How a child ended, and what it said."""

    status: int
    output: str
    errors: str

    def check(self) -> str:
        """The output of a child that ended well and said nothing on standard error.

        Raises:
            AssertionError: it did not; the message has all that it said.
        """
        if self.status != 0 or self.errors:
            raise AssertionError(f"status {self.status}\n{self.output}\n{self.errors}")
        return self.output


@dataclass
class Child:
    """A child that runs; a context manager that ends it. ``lines`` grows as it prints."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._readers = [
            threading.Thread(target=_collect, args=pair, daemon=True)
            for pair in ((self.process.stdout, self.lines), (self.process.stderr, self.errors))
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._join_readers()

    def wait_line(self, line: str, timeout_s: float = TIMEOUT_S, *, count: int = 1) -> None:
        """Waits until the child has printed ``line``, ``count`` times.

        Raises:
            AssertionError: it has not within ``timeout_s``, or ended without it.
        """

        def done() -> bool:
            return self.lines.count(f"{line}\n") >= count or self.process.poll() is not None

        try:
            wait_until(done, line, timeout_s)
        except TimeoutError:
            self._fail(f"no line {line!r} in {timeout_s} s")
        if self.process.poll() is not None:
            self._join_readers()
            if self.lines.count(f"{line}\n") < count:
                self._fail(f"ended without the line {line!r}")

    def wait_idle(self, timeout_s: float = TIMEOUT_S) -> None:
        """Waits until the process has come to a halt: for a while it has used no processor time.

        Raises:
            TimeoutError: it has not within ``timeout_s``.
        """
        used: list[str] = []

        def halted() -> bool:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
            used.append(" ".join(stat.rpartition(")")[2].split()[11:13]))  # utime and stime
            return len(used) > IDLE_LOOKS and used[-1] == used[-IDLE_LOOKS]

        wait_until(halted, "the process comes to a halt", timeout_s)

    def finish(self, timeout_s: float = TIMEOUT_S) -> Ended:
        """Waits for the end.

        Raises:
            AssertionError: it has not ended within ``timeout_s``; the message has the stacks.
        """
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._fail(f"not ended in {timeout_s} s")
        self._join_readers()
        return Ended(self.process.returncode, "".join(self.lines), "".join(self.errors))

    def _fail(self, what: str) -> None:
        if self.process.poll() is None:
            self.process.send_signal(STACKS_SIGNAL)
            deadline = time.monotonic() + STACKS_TIMEOUT_S
            while not any("most recent call first" in line for line in self.errors):
                if time.monotonic() > deadline:
                    break
                self._readers[1].join(0.1)
            self.process.kill()
        self.process.wait()
        self._join_readers()
        said = "".join(self.lines) + "".join(self.errors)
        raise AssertionError(f"{what} (status {self.process.returncode}):\n{said}")

    def _join_readers(self) -> None:
        for reader in self._readers:
            reader.join(STACKS_TIMEOUT_S)


def start(
    function: Callable[..., object],
    *arguments: object,
    flags: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
    stdin: str = "",
) -> Child:
    """Starts ``function(*arguments)`` in a new interpreter; the arguments arrive as text.

    ``flags`` are options of the interpreter, ``env`` is added to the environment, ``stdin`` is
    what it can read.

    Raises:
        ValueError: the function's file does not call `main`: a child of it would do nothing.
    """
    if f"{main.__name__}()" not in Path(function.__code__.co_filename).read_text():
        raise ValueError(f"{function.__code__.co_filename} does not end with children.main()")
    words = [sys.executable, *flags, function.__code__.co_filename, function.__name__]
    with tempfile.TemporaryFile("w+") as said:
        said.write(stdin)
        said.seek(0)
        process = subprocess.Popen(
            [*words, *map(str, arguments)],
            stdin=said,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
    return Child(process)


def run(
    function: Callable[..., object],
    *arguments: object,
    flags: tuple[str, ...] = (),
    env: dict[str, str] | None = None,
    stdin: str = "",
    timeout_s: float = TIMEOUT_S,
) -> Ended:
    """Runs ``function(*arguments)`` in a new interpreter to its end; see `start`."""
    with start(function, *arguments, flags=flags, env=env, stdin=stdin) as child:
        return child.finish(timeout_s)


def main() -> None:
    """What a test file does when it is run as a program: ``FILE FUNCTION ARGUMENT...``."""
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    module: Any = sys.modules["__main__"]
    sys.path.insert(0, str(Path(module.__file__).parent))
    getattr(module, sys.argv[1])(*sys.argv[2:])


def in_fork(function: Callable[[], object], timeout_s: int = 60) -> str:
    """Runs ``function`` in a forked child and returns "" or, when it raised, what it raised.

    Raises:
        AssertionError: the child died, or did not end within ``timeout_s``; it then wrote its
            stacks to standard error.
    """
    ours, theirs = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads is the test
        pid = os.fork()
    if pid == 0:
        _run_in_fork(function, theirs, timeout_s)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status != 0:
        raise AssertionError(f"the forked child ended with status {status}: {said}")
    return said


def _run_in_fork(function: Callable[[], object], pipe: int, timeout_s: int) -> None:
    """Never returns: the child must not run its parent's clean-up."""
    status = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)
        signal.alarm(timeout_s)
        function()
        status = 0
    except BaseException as error:
        os.write(pipe, f"{type(error).__name__}: {error}".encode()[:4096])
        status = 0
    finally:
        os._exit(status)


def _collect(stream: IO[str], lines: list[str]) -> None:
    with stream:
        for line in stream:
            lines.append(line)  # noqa: PERF402 (readers look at the list while it grows)
