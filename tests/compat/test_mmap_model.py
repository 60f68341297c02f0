"""The drop-in beside the standard class: the same operations give the same results and errors."""

from __future__ import annotations

import contextlib
import mmap as standard
import os
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from quire.compat import mmap

PAGE = mmap.PAGESIZE
SIZES = (1, 300, PAGE, 2 * PAGE + 100)
FAST = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # each step reads and flushes files
FLUSH_TO_END = "flush with an offset alone: the standard class refuses it before 3.15"

index = st.integers(-3 * PAGE, 3 * PAGE) | st.integers(-12, 12)
bound = st.none() | index
word = st.binary(max_size=5) | st.sampled_from([b"\n", b"ab", b"b\na", bytes(PAGE)])
number = index | st.sampled_from([-(1 << 70), 1 << 70, 255, 256]) | st.just(2.5) | st.just("x")
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"access": mmap.ACCESS_READ},
    {"access": mmap.ACCESS_WRITE},
    {"access": mmap.ACCESS_COPY},
    {"flags": mmap.MAP_PRIVATE},
    {"prot": mmap.PROT_READ},
    {"prot": mmap.PROT_READ | mmap.PROT_EXEC},
    {"flags": mmap.MAP_PRIVATE, "prot": mmap.PROT_READ | mmap.PROT_WRITE},
)


def outcome(call: Any) -> Any:
    """What a call returns, or the kind of what it raises: of OSErrors, their number."""
    try:
        return call()
    except OSError as error:
        return "OSError", error.errno
    except Exception as error:
        return type(error)


class Beside(RuleBasedStateMachine):
    """One of each, over files of the same bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory(dir=FAST)))
        self.paths = folder / "ours", folder / "theirs"
        self.views: list[tuple[memoryview, memoryview]] = []

    @initialize(
        size=st.sampled_from(SIZES),
        content=st.binary(max_size=40),
        way=st.sampled_from(WAYS),
        offset=st.sampled_from([0, PAGE]),
        anonymous=st.booleans(),
    )
    def open(
        self, size: int, content: bytes, way: dict[str, Any], offset: int, anonymous: bool
    ) -> None:
        self.growing = not anonymous
        made = []
        for path, module in zip(self.paths, (mmap, standard), strict=True):
            filled = bytes(offset) + (content * size + bytes(size))[:size]
            path.write_bytes(filled)
            descriptor = -1 if anonymous else os.open(path, os.O_RDWR)
            made.append(module.mmap(descriptor, size, offset=offset, **way))
            if not anonymous:
                os.close(descriptor)
        self.ours, self.theirs = made

    def same(self, call: Any) -> None:
        ours, theirs = outcome(lambda: call(self.ours)), outcome(lambda: call(self.theirs))
        if self.ours.closed:  # which of two mistakes is found first is nobody's business
            ours, theirs = isinstance(ours, type), isinstance(theirs, type)
        assert ours == theirs

    @rule(at=number)
    def get(self, at: Any) -> None:
        self.same(lambda m: m[at])

    @rule(start=bound, stop=bound, step=st.sampled_from([None, 1, 2, 7, -1, -3, 0]))
    def get_slice(self, start: int | None, stop: int | None, step: int | None) -> None:
        self.same(lambda m: m[start:stop:step])

    @rule(at=number, value=number)
    def set(self, at: Any, value: Any) -> None:
        self.same(lambda m: m.__setitem__(at, value))

    @rule(start=index, data=word, step=st.sampled_from([1, 2, -1]), more=st.integers(0, 1))
    def set_slice(self, start: int, data: bytes, step: int, more: int) -> None:
        part = slice(start, start + (len(data) + more) * step, step)
        self.same(lambda m: m.__setitem__(part, data))

    @rule(at=index)
    def delete(self, at: int) -> None:
        self.same(lambda m: m.__delitem__(at))
        self.same(lambda m: m.__delitem__(slice(at, at + 1)))

    @rule(count=number | st.none())
    def read(self, count: Any) -> None:
        self.same(lambda m: m.read(count))

    @rule()
    def read_little(self) -> None:
        self.same(lambda m: m.read_byte())
        self.same(lambda m: m.readline())

    @rule(data=word)
    def write(self, data: bytes) -> None:
        self.same(lambda m: m.write(data))
        self.same(lambda m: m.write(bytearray(data)))

    @rule(value=number)
    def write_byte(self, value: Any) -> None:
        self.same(lambda m: m.write_byte(value))

    @rule(data=word, start=index, end=index, backwards=st.booleans(), given=st.integers(0, 2))
    def find(self, data: bytes, start: int, end: int, backwards: bool, given: int) -> None:
        bounds = (start, end)[:given]
        self.same(lambda m: (m.rfind if backwards else m.find)(data, *bounds))

    @rule(dest=index, src=index, count=index)
    def move(self, dest: int, src: int, count: int) -> None:
        self.same(lambda m: m.move(dest, src, count))

    @rule(to=number, whence=st.sampled_from([0, 1, 2, 3]))
    def seek(self, to: Any, whence: int) -> None:
        self.same(lambda m: (m.seek(to, whence), None)[1])  # it returns the position since 3.13

    @rule(data=word)
    def contains(self, data: bytes) -> None:
        self.same(lambda m: data in m)

    @rule()
    def iterate(self) -> None:
        self.same(lambda m: list(m) + list(reversed(m)))

    @rule(pages=st.integers(-1, 2), size=st.integers(-1, 2 * PAGE))
    def flush(self, pages: int, size: int) -> None:
        if size != -1:  # FLUSH_TO_END
            self.same(lambda m: m.flush(pages * PAGE, size))
        self.same(lambda m: m.flush())

    @rule(option=st.sampled_from([0, 1, 2, 3, 9999]), start=index, length=index)
    def madvise(self, option: int, start: int, length: int) -> None:
        self.same(lambda m: m.madvise(option))
        self.same(lambda m: m.madvise(option, start, length))

    @precondition(lambda self: self.growing)
    @rule(size=st.integers(1, 3 * PAGE) | st.sampled_from([-1, 1 << 63]))
    def resize(self, size: int) -> None:
        self.same(lambda m: m.resize(size))

    @precondition(lambda self: not self.growing and not self.ours.closed)
    @rule(less=st.integers(0, 2 * PAGE))
    def shrink(self, less: int) -> None:
        size = max(len(self.ours) - less, 1)
        self.same(lambda m: m.resize(size))

    @precondition(lambda self: not self.ours.closed)
    @rule()
    def view(self) -> None:
        self.views.append((memoryview(self.ours), memoryview(self.theirs)))
        ours, theirs = self.views[-1]
        assert (ours.readonly, ours.nbytes) == (theirs.readonly, theirs.nbytes)

    @rule()
    def release(self) -> None:
        for pair in self.views:
            for view in pair:
                view.release()
        self.views.clear()

    @rule(really=st.integers(0, 5))
    def close(self, really: int) -> None:
        if really == 0 or self.views:
            self.same(lambda m: m.close())

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "ours"):
            for call in (len, repr, lambda m: m.tell(), lambda m: m[:], lambda m: m.size()):
                self.same(call)
            assert self.ours.closed == self.theirs.closed
            assert self.paths[0].read_bytes() == self.paths[1].read_bytes()

    def teardown(self) -> None:
        self.release()
        if hasattr(self, "ours"):
            self.ours.close()
            self.theirs.close()
        self.stack.close()


TestBeside = Beside.TestCase
TestBeside.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, print_blob=True
)
