"""Shared memory: handing 256 MiB to a running process, and attaching to a segment by its name.

*Handing*: the bytes lie in the sender's memory; the time ends when the other process has said that
it has them. By a pipe they are written and read into a buffer that is there already, both ways with
the largest pipe that the system grants; by a segment that both have mapped, a byte says that they
are there. A second figure has the sender copy them into the segment first.

*Attaching*: a segment of 256 MiB that another process holds is attached to, its first byte read,
and closed again; the first time of a process, and again and again. The first time
`multiprocessing.shared_memory` starts its helper, the resource tracker (to Python 3.12, and later
unless told not to); imports are not counted.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from multiprocessing import shared_memory
from typing import IO, TYPE_CHECKING

import numpy as np

import quire
from bench.result import Context, Topic, ratio, require, topic_main
from bench.timing import pretouch, rounds_of, wake_processor

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

SIZE = 256 << 20
PIPE_BYTES = 1 << 20
AGAIN = 200
FIRST_ROUNDS_MIN = 9
HANDED_LIMIT = 0.05
ATTACH_LIMIT = 0.5
POSIX = "multiprocessing.shared_memory"
QUIRE = "quire.shared"
PIPE = "a pipe"
COPIED = "quire.shared, copied in first"

ATTACH = {
    QUIRE: (
        "import quire; quire.shared, quire.SharedMapping",
        "segment = quire.shared({name!r}, create=False); found = segment.read(0, 1)[0]; "
        "segment.close()",
    ),
    POSIX: (
        "from multiprocessing import shared_memory, resource_tracker",
        "segment = shared_memory.SharedMemory({name!r}); found = segment.buf[0]; segment.close()",
    ),
}


@dataclass
class Receiver:
    """The process that is handed things: a program of this file, told what to do by a pipe."""

    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, name: str) -> Self:
        """Starts it; it attaches to the segment."""
        argv = [sys.executable, "-m", "bench.shared", "receive", name]
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        made = cls(process)
        fcntl.fcntl(made.input, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        made.answer()
        return made

    @property
    def input(self) -> IO[bytes]:
        """Where it reads."""
        assert self.process.stdin is not None
        return self.process.stdin

    def answer(self) -> int:
        """What it says: eight bytes."""
        assert self.process.stdout is not None
        said = self.process.stdout.read(8)
        return int.from_bytes(said, "little")

    def checksum(self, of: bytes) -> int:
        """Of what it has from a pipe (p) or in the segment (s)."""
        self.input.write(of)
        return self.answer()


def receive(name: str) -> None:
    """What the receiver does."""
    segment = quire.shared(name, create=False)
    buffer = bytearray(SIZE)
    parts = {b"p": memoryview(buffer), b"s": memoryview(segment)}
    np.asarray(parts[b"s"])[::4096].sum()  # mapped, and each page touched
    os.write(1, bytes(8))
    while command := os.read(0, 1):
        number = 0
        if command == b"P":  # what follows
            at = 0
            while at < SIZE:
                at += os.readv(0, [parts[b"p"][at : at + PIPE_BYTES]])
        elif command != b"S":  # it is there
            number = zlib.crc32(parts[command])
        os.write(1, number.to_bytes(8, "little"))


def run(context: Context) -> Topic:
    """Hands over, attaches, and compares."""
    pretouch(SIZE)
    topic = Topic("shared memory")
    content = np.random.default_rng(context.seed).integers(0, 256, SIZE, np.uint8)
    name = f"bench-{os.getpid()}"
    with quire.shared(name, SIZE, create=True) as segment:
        _handing(topic, context, segment, content)
        segment.array[:] = content
        posix = shared_memory.SharedMemory(name, create=True, size=SIZE)
        try:
            posix.buf[:SIZE] = memoryview(content)
            _attaching(topic, context, name, int(content[0]))
        finally:
            posix.close()
            posix.unlink()
    return topic


def _handing(
    topic: Topic, context: Context, segment: quire.SharedMapping, content: np.ndarray
) -> None:
    assert segment.shared_name is not None
    receiver = Receiver.start(segment.shared_name)
    memory, array = memoryview(content), segment.array

    def by_pipe() -> None:
        receiver.input.write(b"P")
        at = 0
        while at < SIZE:
            at += os.write(receiver.input.fileno(), memory[at : at + PIPE_BYTES])
        receiver.answer()

    def by_segment() -> None:
        receiver.input.write(b"S")
        receiver.answer()

    def copied() -> None:
        array[:] = content
        by_segment()

    calls = {PIPE: by_pipe, QUIRE: by_segment, COPIED: copied}
    of = {PIPE: b"p", QUIRE: b"s", COPIED: b"s"}

    def timed(way: str) -> Callable[[], float]:
        def call() -> float:
            content[:] += 1  # other bytes each time
            if way == QUIRE:
                array[:] = content
            wake_processor(0.03)
            began = time.perf_counter()
            calls[way]()
            took = time.perf_counter() - began
            require(receiver.checksum(of[way]) == zlib.crc32(content), f"what came by {way}")
            return took

        return call

    times = rounds_of({way: timed(way) for way in calls}, context.rounds, context.seed)
    receiver.input.close()
    receiver.process.wait()
    topic.add(times, "ms", 1e3, "256 MiB handed over")
    topic.want(
        "256 MiB handed over by a segment: time beside a pipe",
        ratio(times, QUIRE, PIPE),
        HANDED_LIMIT,
        at_least=False,
    )
    topic.checks.append("the receiver's CRC-32 of what it has, each time other bytes")


def _attaching(topic: Topic, context: Context, name: str, first: int) -> None:
    firsts = rounds_of(
        {way: (lambda way=way: _attach(way, name, 1, first)) for way in ATTACH},
        max(FIRST_ROUNDS_MIN, context.rounds),
        context.seed,
    )
    again = rounds_of(
        {way: (lambda way=way: _attach(way, name, AGAIN, first)) for way in ATTACH},
        max(FIRST_ROUNDS_MIN, context.rounds),
        context.seed,
    )
    for what, times in (("first of a process", firsts), ("again", again)):
        topic.add(times, "µs", 1e6, f"attach and close, {what}")
        topic.want(
            f"attach and close, {what}: time beside {POSIX}",
            ratio(times, QUIRE, POSIX),
            ATTACH_LIMIT,
            at_least=False,
        )
    topic.checks.append("the first byte of what was attached")


def _attach(way: str, name: str, count: int, first: int) -> float:
    """Seconds of one attach and close in a new process; the first, or the median of later ones."""
    prepare, work = ATTACH[way]
    code = f"""
import statistics, time
{prepare}
times = []
for _ in range({count}):
    began = time.perf_counter()
    {work.format(name=name)}
    times.append(time.perf_counter() - began)
    assert found == {first}
print(statistics.median(times))
"""
    if way == POSIX:  # else the tracker takes the segment away at the end, as if it were its own
        code += f"resource_tracker.unregister('/{name}', 'shared_memory')\n"
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive(sys.argv[2])
    else:
        topic_main(run)
