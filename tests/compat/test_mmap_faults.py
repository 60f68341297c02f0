"""Touches of a file that was truncated: an error at once, where a process would end with SIGBUS."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import quire
from quire.compat import mmap

PAGE = mmap.PAGESIZE
SIZE = 4 << 20  # more than is copied with the interpreter lock held
LEFT = 2 * PAGE

TOUCHES: dict[str, Callable[[mmap.mmap], object]] = {
    "an index": lambda m: m[LEFT],
    "an index from the end": lambda m: m[-1],
    "a slice": lambda m: m[LEFT - 5 : LEFT + 5],
    "a slice with a step": lambda m: m[0 : 4 * PAGE : 7],
    "all": lambda m: m[:],
    "one byte as a slice": lambda m: m[LEFT : LEFT + 1],
    "read": lambda m: m.read(LEFT + 1),
    "read all": lambda m: m.read(),
    "read_byte": lambda m: (m.seek(LEFT), m.read_byte()),
    "readline": lambda m: m.readline(),
    "find": lambda m: m.find(b"nowhere"),
    "find a byte": lambda m: m.find(b"n"),
    "rfind": lambda m: m.rfind(b"nowhere"),
    "in": lambda m: b"n" in m,
    "iteration": lambda m: list(m),
    "setting an item": lambda m: m.__setitem__(LEFT, 1),
    "setting a slice": lambda m: m.__setitem__(slice(LEFT, LEFT + 3), b"abc"),
    "setting a slice with a step": lambda m: m.__setitem__(slice(LEFT, LEFT + 6, 2), b"abc"),
    "write": lambda m: (m.seek(LEFT), m.write(b"abc")),
    "a long write": lambda m: m.write(bytes(SIZE)),
    "write_byte": lambda m: (m.seek(LEFT), m.write_byte(1)),
    "move": lambda m: m.move(0, LEFT, 10),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file.bin"
    path.write_bytes(b"." * SIZE)
    return path


@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES.keys())
def test_each_touch_says_so_itself_and_heals(
    path: Path, touch: Callable[[mmap.mmap], object]
) -> None:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as m:
        for _ in range(2):
            m.seek(0)
            os.truncate(path, LEFT)
            for _ in range(2):
                with pytest.raises(quire.TruncatedError, match="ends after 8192 bytes") as caught:
                    touch(m)
                assert isinstance(caught.value, mmap.error)
                assert caught.value.source == str(path)
            before = b"\0." if touch is TOUCHES["a long write"] else b"."
            assert m[: LEFT - 5].strip(before) == b""
            os.truncate(path, SIZE)
            m.seek(0)
            touch(m)
            m[:] = b"." * SIZE


def test_a_failed_call_leaves_the_position(path: Path) -> None:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as m:
        os.truncate(path, LEFT)
        for call in (m.read, m.readline, lambda: m.write(bytes(LEFT + 1))):
            m.seek(7)
            with pytest.raises(quire.TruncatedError):
                call()
            assert m.tell() == 7


def test_what_was_read_of_it_is_dropped(path: Path) -> None:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as m:
        os.truncate(path, LEFT)
        tracemalloc.start()
        for _ in range(100):
            with pytest.raises(quire.TruncatedError):
                m[LEFT - 5 : LEFT + 100_000]
            with pytest.raises(quire.TruncatedError):
                m.readline()
        assert tracemalloc.get_traced_memory()[0] < 5_000_000
        tracemalloc.stop()


def test_flush_close_and_resize_after_a_truncation(path: Path) -> None:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as m:
        m[0] = 1
        os.truncate(path, LEFT)
        m.flush()
        with pytest.raises(quire.TruncatedError):
            m[LEFT]
        m.resize(3 * LEFT)
        assert m[:LEFT] == b"\1" + b"." * (LEFT - 1)
        assert m[LEFT:] == bytes(2 * LEFT)


def test_numpy_over_it_raises_too(path: Path) -> None:
    with open(path, "r+b") as file:
        array = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
    os.truncate(path, LEFT)
    with pytest.raises(quire.TruncatedError):
        array.sum()


def test_copy_from_a_truncated_mapping_into_another(path: Path) -> None:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as m:
        os.truncate(path, LEFT)
        other = mmap.mmap(-1, SIZE)
        with memoryview(m) as view:
            for size in (LEFT + 10, SIZE):
                with pytest.raises(quire.TruncatedError) as caught:
                    other[:size] = view[:size]
                assert caught.value.source == str(path)
                assert other[:] == bytes(SIZE)


@pytest.mark.parametrize("size", [1, PAGE, SIZE])
def test_memory_that_may_not_be_read(size: int) -> None:
    m = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE, prot=0)
    with pytest.raises(quire.ProtectionError):
        m[:]
    with pytest.raises(quire.ProtectionError):
        m.find(b"x")
