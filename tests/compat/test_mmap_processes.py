"""Several processes at one file, a kill after a flush, and what advice does."""

from __future__ import annotations

import mmap as standard
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import quire
from quire.compat import mmap

PAGE = mmap.PAGESIZE

WRITER = """
import sys
from quire.compat import mmap
with open(sys.argv[1], "r+b") as file:
    m = mmap.mmap(file.fileno(), 0)
for number in range(int(sys.argv[2])):
    m[number * 16 : number * 16 + 16] = b"record %08d\\n" % number
    m.flush()
print("written", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file.bin"
    path.write_bytes(bytes(4 * PAGE))
    return path


def in_child(work: object) -> int:
    """The exit code of a forked child that does something: 0, or 1 where it raises."""
    child = os.fork()
    if child == 0:
        try:
            work()  # type: ignore[operator]
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_all_who_map_a_file_see_one_memory(path: Path) -> None:
    with open(path, "r+b") as file:
        ours, theirs = mmap.mmap(file.fileno(), 0), standard.mmap(file.fileno(), 0)
    ours[5:9] = b"ours"
    assert theirs[5:9] == b"ours"
    assert in_child(lambda: ours.__setitem__(slice(5, 9), b"kids")) == 0
    assert theirs[5:9] == ours[5:9] == b"kids" == path.read_bytes()[5:9]
    theirs.close()
    ours.close()


@pytest.mark.parametrize(("flags", "seen"), [(mmap.MAP_SHARED, 7), (mmap.MAP_PRIVATE, 0)])
def test_anonymous_memory_and_children(flags: int, seen: int) -> None:
    m = mmap.mmap(-1, PAGE, flags=flags)
    assert in_child(lambda: m.__setitem__(3, 7)) == 0
    assert m[3] == seen


def test_what_was_flushed_is_there_after_a_kill(path: Path) -> None:
    count = 100
    argv = [sys.executable, "-c", WRITER, str(path), str(count)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    assert writer.returncode == -signal.SIGKILL
    records = b"".join(b"record %08d\n" % number for number in range(count))
    assert path.read_bytes().startswith(records)


def test_private_changes_are_nobodys(path: Path) -> None:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as m:
        m[:4] = b"mine"
        m.flush()
        assert path.read_bytes() == bytes(4 * PAGE)
        m.madvise(mmap.MADV_DONTNEED)
        assert m[:4] == bytes(4)


def test_advice_that_takes_away() -> None:
    m = mmap.mmap(-1, 2 * PAGE, flags=mmap.MAP_PRIVATE)
    m[:] = b"x" * (2 * PAGE)
    m.madvise(mmap.MADV_DONTNEED, PAGE, 1)
    assert m[:] == b"x" * PAGE + bytes(PAGE)


@pytest.mark.parametrize(
    ("advice", "flag"),
    [("MADV_RANDOM", "rr"), ("MADV_SEQUENTIAL", "sr"), ("MADV_DONTDUMP", "dd")],
)
def test_advice_that_the_kernel_shows(path: Path, advice: str, flag: str) -> None:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as m:
        m.madvise(getattr(mmap, advice))
        smaps = Path("/proc/self/smaps").read_text()
        found = re.search(rf"{re.escape(str(path))}\n(?:\w+:.*\n)*?VmFlags: (.*)\n", smaps)
        assert found is not None
        assert flag in found[1].split()


def test_a_child_that_has_not_inherited_is_told(path: Path) -> None:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as m:
        m.madvise(mmap.MADV_DONTFORK)

        def touch() -> None:
            with pytest.raises(quire.PageIOError, match="not inherited"):
                m[0]

        assert in_child(touch) == 0
        assert m[0] == 0
