"""Long calls release the interpreter lock, and what closes or moves memory waits for them.

The switch interval is made endless, so that another thread runs only when a call gives the lock up
by itself: over the standard module these tests would hang.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import quire
from quire.compat import mmap

SIZE = 4 << 20
NEVER = 1000.0
HANG_S = 60
EVERY_OTHER = slice(None, None, 2)
LINES = 48
LINE = 1 << 20

CALLS: dict[str, Callable[[mmap.mmap], object]] = {
    "find": lambda m: m.find(b"no", 0),
    "rfind": lambda m: m.rfind(b"no", 0),
    "in": lambda m: b"n" in m,
    "readline": lambda m: (m.seek(0), m.readline()),
    "read": lambda m: (m.seek(0), m.read()),
    "a slice": lambda m: m[:],
    "a slice with a step": lambda m: m[::2],
    "write": lambda m: (m.seek(0), m.write(bytes(SIZE))),
    "setting a slice": lambda m: m.__setitem__(slice(None), bytes(SIZE)),
    "setting a slice with a step": lambda m: m.__setitem__(EVERY_OTHER, bytes(SIZE // 2)),
    "move": lambda m: m.move(0, 1, SIZE - 1),
    "flush": lambda m: m.flush(),
    "madvise": lambda m: m.madvise(mmap.MADV_WILLNEED),
    "resize": lambda m: (m.resize(SIZE + 1), m.resize(SIZE)),
}


@pytest.fixture
def m(tmp_path: Path) -> Iterator[mmap.mmap]:
    path = tmp_path / "file.bin"
    path.write_bytes(bytes(SIZE))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        yield mapped


@pytest.fixture
def _no_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(NEVER)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_no_switches")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_another_thread_runs_meanwhile(m: mmap.mmap, call: Callable[[mmap.mmap], object]) -> None:
    ran: list[bool] = []
    other = threading.Thread(target=lambda: ran.append(True))
    other.start()
    other.join()
    ran.clear()
    begin = threading.Lock()
    begin.acquire()

    def work() -> None:
        with begin:
            ran.append(True)

    other = threading.Thread(target=work)
    other.start()
    begin.release()
    while not ran:
        call(m)
    other.join()


def test_close_waits_for_who_reads(m: mmap.mmap) -> None:
    """Every read gives all of the bytes, or says that it is closed: never freed memory."""
    expected = bytes(SIZE)
    wrong: list[object] = []
    started = threading.Barrier(4)

    def read() -> None:
        started.wait()
        try:
            while True:
                if m[:] != expected or m.find(b"x", 0) != -1:
                    wrong.append("other bytes")
        except ValueError as error:
            if "closed" not in str(error):
                wrong.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    started.wait()
    m.find(b"x", 0)
    m.close()
    for reader in readers:
        reader.join()
    assert wrong == []


def in_threads(work: Callable[[], object]) -> None:
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.fixture(name="numbered")
def _numbered() -> Iterator[mmap.mmap]:
    """Lines that begin with their number, each copied without the interpreter lock."""
    with mmap.mmap(-1, LINES * LINE) as m:
        for number in range(LINES):
            m.write(b"%03d" % number + bytes(LINE - 4) + b"\n")
        m.seek(0)
        yield m


@pytest.mark.usefixtures("_no_switches")
@pytest.mark.parametrize("call", [lambda m: m.read(LINE), lambda m: m.readline()])
def test_threads_read_on_where_others_are(
    numbered: mmap.mmap, call: Callable[[mmap.mmap], bytes]
) -> None:
    found: list[bytes] = []

    def read() -> None:
        while line := call(numbered):
            found.append(line[:3])
            assert len(line) == LINE

    in_threads(read)
    assert sorted(found) == [b"%03d" % number for number in range(LINES)]
    assert numbered.tell() == LINES * LINE


@pytest.mark.usefixtures("_no_switches")
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_threads_write_on_where_others_are(
    numbered: mmap.mmap, kind: Callable[[bytes], bytes]
) -> None:
    numbers = iter(range(LINES))

    def write() -> None:
        for number in numbers:
            numbered.write(kind(bytes([number]) * LINE))

    in_threads(write)
    assert sorted(numbered[:: LINE // 2][::2]) == list(range(LINES))
    assert all(numbered[at] == numbered[at + LINE - 1] for at in range(0, LINES * LINE, LINE))


def fill_to_its_end(m: mmap.mmap, data: bytes, started: threading.Event) -> None:
    started.set()
    with contextlib.suppress(ValueError):  # it is closed
        while True:
            m[EVERY_OTHER] = data


@pytest.mark.usefixtures("_no_switches")
def test_close_waits_for_who_sets_bytes_apart() -> None:
    """The bytes that are set are first copied, and nobody may close between the two."""
    data = bytes(SIZE // 2)
    for _ in range(40):
        m = mmap.mmap(-1, SIZE)
        started = threading.Event()

        filler = threading.Thread(target=fill_to_its_end, args=(m, data, started))
        filler.start()
        started.wait()
        m.close()
        filler.join()


def test_resize_waits_for_who_reads_and_they_for_it(m: mmap.mmap) -> None:
    wrong: list[object] = []
    ended = threading.Event()

    def read() -> None:
        try:
            while not ended.is_set():
                found = m[: SIZE // 2]
                if found.count(0) != SIZE // 2 or m[5] != 0 or m.find(b"x", 0) != -1:
                    wrong.append("other bytes")
        except BaseException as error:
            wrong.append(error)
            raise

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for size in (2 * SIZE, SIZE, 3 * SIZE, SIZE // 2, SIZE) * 5:
        m.resize(size)
    ended.set()
    for reader in readers:
        reader.join()
    assert wrong == []


def test_threads_that_resize_leave_file_and_mapping_of_one_length(m: mmap.mmap) -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(100):
            sizes = iter((SIZE, 2 * SIZE, SIZE // 2, 3 * SIZE))
            in_threads(lambda sizes=sizes: m.resize(next(sizes)))
            assert m.size() == len(m)
    finally:
        sys.setswitchinterval(before)


def test_a_view_is_refused_or_whole_while_others_resize(m: mmap.mmap) -> None:
    ended = threading.Event()
    wrong: list[object] = []

    def look() -> None:
        while not ended.is_set():
            with memoryview(m) as view:
                if view[100] != 0 or len(view) not in (SIZE, 2 * SIZE):
                    wrong.append(len(view))

    looker = threading.Thread(target=look)
    looker.start()
    for number in range(40):
        with contextlib.suppress(BufferError):  # a view was there
            m.resize(SIZE << (number % 2))
    ended.set()
    looker.join()
    assert wrong == []


def test_a_forked_child_does_not_wait_for_threads_of_its_parent() -> None:
    """The child has none of the threads that are at work on it in the parent when it forks."""
    m = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE)
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            m.find(b"x", 0)

    reader = threading.Thread(target=read)
    reader.start()
    codes = []
    for _ in range(20):
        child = os.fork()
        if child == 0:
            try:
                m.resize(SIZE // 2)
                m.close()
                os._exit(0)
            finally:
                os._exit(1)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    ended.set()
    reader.join()
    assert codes == [0] * 20


@pytest.mark.usefixtures("_no_switches")
@pytest.mark.parametrize("change", ["close", "resize"])
def test_a_forked_child_does_not_wait_for_who_changes_it_in_its_parent(change: str) -> None:
    """The fork gets the lock when the other thread gives it up: in the midst of its change."""
    m = mmap.mmap(-1, SIZE)
    m[0] = 7
    ended = threading.Event()

    def keep_changing() -> None:
        nonlocal m
        for number in itertools.count():
            if ended.is_set():
                return
            if change == "resize":
                m.resize(SIZE << (number % 2))
                continue
            m = mmap.mmap(-1, SIZE)
            m[0] = 7
            reader = threading.Thread(target=read_to_its_end, args=(m,))
            reader.start()
            m.close()
            reader.join()

    changer = threading.Thread(target=keep_changing)
    changer.start()
    codes = []
    for _ in range(30):
        child = os.fork()
        if child == 0:
            signal.alarm(HANG_S)
            os._exit(not use_as_a_child(m))
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    ended.set()
    changer.join()
    assert codes == [0] * 30


def read_to_its_end(m: mmap.mmap) -> None:
    with contextlib.suppress(ValueError):  # it is closed
        while True:
            m.find(b"x", 0)


def use_as_a_child(m: mmap.mmap) -> bool:
    """Whether it is whole, or closed."""
    try:
        whole = m[0] == 7 and len(m[:]) == len(m)
        m.resize(2 * SIZE)
        with memoryview(m) as view:
            whole = whole and len(view) == 2 * SIZE and view[0] == 7
        m.close()
    except ValueError as error:
        return "closed" in str(error)
    return whole


@pytest.mark.usefixtures("_no_switches")
def test_mapping_itself_is_resized_without_the_lock() -> None:
    ran: list[bool] = []
    with quire.map(size=SIZE, sharing="private", reserve=4 * SIZE) as mapping:
        other = threading.Thread(target=lambda: ran.append(True))
        other.start()
        ran.clear()
        other.join()
        other = threading.Thread(target=lambda: ran.append(True))
        other.start()
        while not ran:
            mapping.resize(2 * SIZE)
            mapping.resize(SIZE)
        other.join()
