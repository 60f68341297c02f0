"""The world of a row on the live kernel: forked children that do operations one at a time.

Each named process of the row is a process; they are told what to do over socket pairs made
beforehand, so that a child of a child can be told, too. Linux on x86-64 only.
"""

from __future__ import annotations

import json
import os
import platform
import select
import signal
import socket
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from quire.testing.replay.kernel_process import KernelProcess
from quire.testing.replay.model_world import malformed
from quire.testing.replay.native import helper
from quire.testing.replay.rows import Missing, pattern

if TYPE_CHECKING:
    from types import TracebackType

    from quire.testing.replay.rows import Op, Outcome, Row

__all__ = ["KernelWorld"]

_PROCESSES_MAX = 4
_ANSWER_SECONDS = 60


class KernelWorld:
    """A context manager around the processes of one row."""

    def __init__(self, row: Row) -> None:
        if sys.platform != "linux" or platform.machine() != "x86_64":
            raise RuntimeError("rows can be replayed on the kernel of Linux on x86-64 alone")
        helper()  # compiled before anything is forked
        self.row = row
        self._kept: list[int] = []
        self._directory = tempfile.TemporaryDirectory()
        self._paths = {name: self._make(name) for name in row.files}
        self._numbers: dict[str, int | None] = {"p0": 0}
        self._ends: dict[int, int] = {}
        """A pidfd of each child of a row, by number."""
        self._sockets: list[socket.socket] = []
        self._buffers = [b""] * _PROCESSES_MAX
        self._pid = 0

    def __enter__(self) -> KernelWorld:
        pairs = [socket.socketpair() for _ in range(_PROCESSES_MAX)]
        self._sockets = [ours for ours, _ in pairs]
        theirs = [other for _, other in pairs]
        sys.stdout.flush()
        with warnings.catch_warnings():
            # Python 3.12 warns of threads, for one may hold a lock: the child takes none of theirs.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if self._pid == 0:
            try:
                for ours in self._sockets:
                    ours.close()
                os.setpgid(0, 0)
                _serve(self._paths, theirs)
            finally:
                os._exit(99)
        for other in theirs:
            other.close()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for ours in self._sockets:
            ours.close()
        for kill, target in ((os.killpg, self._pid), (os.kill, self._pid)):
            try:
                kill(target, signal.SIGKILL)
            except ProcessLookupError:
                continue
        os.waitpid(self._pid, 0)
        for number in list(self._ends):
            self._wait_end(number)
        for fd in self._kept:
            os.close(fd)
        self._directory.cleanup()

    def do(self, op: Op) -> Outcome:
        """The outcome of one operation."""
        process = op.get("proc", "p0")
        number = self._numbers.get(process)
        if number is None:
            return malformed(op, Missing(process))
        if op["op"] == "fork":
            child = len(self._numbers)
            self._numbers[op["child"]] = child
            op = {**op, "number": child}
        try:
            self._sockets[number].sendall(json.dumps(op).encode() + b"\n")
        except BrokenPipeError:
            return {"harness": "process died"}
        outcome = self._answer(number)
        if op["op"] == "fork" and "pid" in outcome:
            self._ends[op["number"]] = os.pidfd_open(outcome.pop("pid"))
        elif op["op"] == "exit":
            self._wait_end(number)
            self._numbers[process] = None
        return outcome

    def _wait_end(self, number: int) -> None:
        """Waits until a child is gone: until then others do not get the huge pages that it had."""
        if number in self._ends:
            end = self._ends.pop(number)
            select.select([end], [], [], _ANSWER_SECONDS)
            os.close(end)

    def _answer(self, number: int) -> Outcome:
        while b"\n" not in self._buffers[number]:
            ready, _, _ = select.select([self._sockets[number]], [], [], _ANSWER_SECONDS)
            try:
                received = self._sockets[number].recv(1 << 16) if ready else b""
            except ConnectionResetError:
                received = b""
            if not received:
                return {"harness": "process died" if ready else "no answer"}
            self._buffers[number] += received
        line, self._buffers[number] = self._buffers[number].split(b"\n", 1)
        outcome: Outcome = json.loads(line)
        return outcome

    def _make(self, name: str) -> str:
        """A file of the row, on disk or in memory."""
        file = self.row.files[name]
        if self.row.on_disk:
            path = str(Path(self._directory.name) / name)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        else:
            fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            path = f"/proc/{os.getpid()}/fd/{fd}"
        self._kept.append(fd)
        if "seed" in file:
            content = pattern(file["seed"], 0, file["size"])
        else:
            content = bytes([0xC3 if file.get("code") else file.get("byte", 0)]) * file["size"]
        os.pwrite(fd, content, 0)
        return path


def _serve(paths: dict[str, str], sockets: list[socket.socket]) -> NoReturn:
    """Does what it is told, for ever; a fork goes on in the child with the child's socket."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    process = KernelProcess(paths)
    process.native.touch_start()
    own, buffer = sockets[0], b""
    while True:
        while b"\n" not in buffer:
            received = own.recv(1 << 16)
            if not received:
                os._exit(0)
            buffer += received
        line, buffer = buffer.split(b"\n", 1)
        op = json.loads(line)
        outcome: Outcome = {"ok": 0}
        if op["op"] == "fork":
            pid = os.fork()
            if pid == 0:
                own, buffer = sockets[op["number"]], b""
                process.native.touch_start()
                continue
            outcome["pid"] = pid
        elif op["op"] == "exit":
            own.sendall(b'{"ok": 0}\n')
            os._exit(0)
        else:
            try:
                outcome = process.do(op)
            except MemoryError:  # at vm.max_map_count the interpreter cannot grow either
                outcome = {"harness": "out of memory"}
        own.sendall(json.dumps(outcome).encode() + b"\n")
