"""What the system refuses, through each of the drop-ins: an `OSError`, as of what it stands for."""

from __future__ import annotations

import contextlib
import errno
import mmap as standard
import os
import resource
from collections.abc import Callable
from multiprocessing import shared_memory as standard_shared_memory
from pathlib import Path

import numpy as np
import pytest

import quire
from quire.compat import mmap
from quire.compat.memmap import memmap, open_memmap
from quire.compat.shared_memory import SharedMemory
from quire.testing import children

LARGE = 1 << 30
NAME = f"test-refused-{os.getpid()}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file.bin"
    path.write_bytes(bytes(10_000))
    return path


@pytest.mark.parametrize("mode", ["r+", "w+"])
@pytest.mark.parametrize("of", [np.memmap, memmap])
def test_a_file_that_is_open_for_reading(path: Path, of: type[memmap], mode: str) -> None:
    with open(path, "rb") as file, pytest.raises(PermissionError) as caught:
        of(file, "u1", mode, shape=5)
    assert caught.value.errno == errno.EACCES
    if of is memmap:
        assert caught.value.filename == str(path)
        assert "open for reading and writing" in caught.value.strerror
        assert isinstance(caught.value.__cause__, quire.Error)


@pytest.mark.parametrize("mode", ["r", "c", "r+", "w+"])
@pytest.mark.parametrize("of", [np.memmap, memmap])
def test_a_folder(tmp_path: Path, of: type[memmap], mode: str) -> None:
    with pytest.raises(IsADirectoryError) as caught:
        of(tmp_path, "u1", mode, shape=5)
    assert str(caught.value.filename) == str(tmp_path)


def test_what_no_address_space_has() -> None:
    for length in (1 << 56, (1 << 63) - 1):
        with pytest.raises(OSError, match="no address space has") as caught:
            mmap.mmap(-1, length)
        assert caught.value.errno == errno.ENOMEM


@pytest.mark.parametrize("name", [None, NAME], ids=["unnamed", "named"])
@pytest.mark.parametrize("of", [standard_shared_memory.SharedMemory, SharedMemory])
@pytest.mark.parametrize(
    ("size", "refusal"),
    [
        (1 << 62, OSError),
        ((1 << 63) - 1, OSError),
        (1 << 63, OverflowError),
        (1 << 70, OverflowError),
        (5.0, TypeError),
    ],
)
def test_sizes_of_a_block_that_cannot_be(
    of: type[SharedMemory], name: str | None, size: int, refusal: type[Exception]
) -> None:
    try:
        with pytest.raises(refusal) as caught:
            of(name, create=True, size=size)
    finally:
        Path(f"/dev/shm/{NAME}").unlink(missing_ok=True)  # which the standard class leaves
    if refusal is OSError:
        assert caught.value.errno == errno.ENOMEM


@pytest.mark.parametrize("name", [None, NAME], ids=["unnamed", "named"])
def test_true_is_a_size(name: str | None) -> None:
    block = SharedMemory(name, create=True, size=True)
    assert block.size == 1
    block.close()
    block.unlink()


def refusals(path: str, number: int, **calls: Callable[[], object]) -> None:
    """In a child: says of each call whether the system has refused it with that number."""
    for name, call in calls.items():
        try:
            call()
        except OSError as error:
            print(name, error.errno == number and not isinstance(error, quire.Error), error)
        else:
            print(name, "was not refused")


def without_descriptors(path: str, name: str) -> None:
    """In a child: calls that need a descriptor more than there may be."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    file = open(path, "r+b")  # to the end of the process
    with contextlib.suppress(FileNotFoundError):
        SharedMemory("first")  # what is opened once
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limit))
    with contextlib.suppress(OSError):
        while True:
            os.dup(file.fileno())
    refusals(
        path,
        errno.EMFILE,
        unnamed=lambda: SharedMemory(create=True, size=5),
        named=lambda: SharedMemory("new", create=True, size=5),
        attached=lambda: SharedMemory(name),
        memmap=lambda: memmap(path, "u1", "r"),
        open_memmap=lambda: open_memmap(path, "w+", "u1", (5,)),
        memmap_of_a_file=lambda: memmap(file, "u1", "r"),
        mmap=lambda: mmap.mmap(file.fileno(), 0),
    )


def without_addresses(path: str, name: str) -> None:
    """In a child: calls that need more memory than it may have."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    with contextlib.suppress(FileNotFoundError):
        SharedMemory("first")
    memory = mmap.mmap(-1, 100, mmap.MAP_PRIVATE)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (used + LARGE // 2, limit))
    os.truncate(path, LARGE)
    refusals(
        path,
        errno.ENOMEM,
        unnamed=lambda: SharedMemory(create=True, size=LARGE),
        named=lambda: SharedMemory("new", create=True, size=LARGE),
        attached=lambda: SharedMemory(name),
        memmap=lambda: memmap(path, "u1", "r"),
        open_memmap=lambda: open_memmap(path, "w+", "u1", (LARGE,)),
        mmap=lambda: mmap.mmap(-1, LARGE),
        resize=lambda: memory.resize(LARGE),
    )


@pytest.mark.parametrize("work", [without_descriptors, without_addresses])
@pytest.mark.parametrize("kind", ["named", "unnamed", "POSIX"])
def test_limits_of_the_process(path: Path, work: Callable[[str, str], None], kind: str) -> None:
    posix = Path(f"/dev/shm/{NAME}-{work.__name__}")
    held = None
    if kind == "POSIX":
        with open(posix, "wb") as file:
            file.truncate(LARGE)
        name = posix.name
    else:
        held = SharedMemory(posix.name if kind == "named" else None, create=True, size=LARGE)
        name = held.name
    try:
        lines = children.run(work, str(path), name).check().splitlines()
    finally:
        if held is None:
            posix.unlink()
        else:
            held.close()
            held.unlink()
    assert len(lines) == 7
    for line in lines:
        assert line.split()[1] == "True", line


def test_a_source_that_only_quire_has_keeps_its_errors(tmp_path: Path) -> None:
    with pytest.raises(quire.SourceError):
        memmap(tmp_path / "absent.zst", "u1", "r")
    assert standard.error is mmap.error


if __name__ == "__main__":
    children.main()
