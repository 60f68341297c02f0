"""Signals beside mappings: others' handlers, Ctrl-C, stopping, blocked signals."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import mmap
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

import numpy as np
import pytest

import quire
from quire import _core
from quire.testing import children
from quire.testing.census import child_processes
from quire.testing.content import random_content
from quire.testing.pmaps import takes_system_calls
from quire.testing.stores import BytesStore
from quire.testing.touches import TOUCHES

PAGE = mmap.PAGESIZE
SIZE = 64 * PAGE + 77
CONTENT = random_content(SIZE, 11)
MODEL = np.frombuffer(CONTENT, "u1")
LATE_OFFSET = 40 * PAGE
BAD = {"offset": LATE_OFFSET, "length": 1, "errno": errno.EIO}
LATE_S = 30.0
INTERRUPT_LIMIT_S = 2.0
SIGNALS = [signal.SIGBUS, signal.SIGSEGV]
FAULT_SIGNALS = [-signal.SIGBUS, -signal.SIGSEGV]


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


# Others' handlers.


class Sigaction(ctypes.Structure):
    """`struct sigaction` of glibc and musl."""

    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * (1024 // (8 * ctypes.sizeof(ctypes.c_ulong)))),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


SA_SIGINFO = 4
SI_ADDR_OFFSET = 16
# With the interpreter lock held throughout, as a fault may come while it is.
HANDLER = ctypes.PYFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
LIBC = ctypes.CDLL(None, use_errno=True)


class Foreign:
    """Another library with handlers for both signals, which mends faults in memory of its own.

    SIGSEGV: a page without access, which it makes readable. SIGBUS: a page of a memfd that has no
    bytes yet. What is not its own goes to the handler that stood before, as it should.
    """

    def __init__(self) -> None:
        self.mended: list[signal.Signals] = []
        self.passed_on = 0
        self._guarded = self._map(0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        self._file = os.memfd_create("foreign")
        self._empty = self._map(mmap.PROT_READ, mmap.MAP_SHARED, self._file)
        self._callback = CALLBACK(self._handle)
        self._before = {number: Sigaction() for number in SIGNALS}
        for number, before in self._before.items():
            action = Sigaction(ctypes.cast(self._callback, ctypes.c_void_p).value, flags=SA_SIGINFO)
            assert LIBC.sigaction(number, ctypes.byref(action), ctypes.byref(before)) == 0

    @staticmethod
    def _map(access: int, flags: int, descriptor: int) -> int:
        LIBC.mmap.restype = ctypes.c_void_p
        address = LIBC.mmap(None, ctypes.c_size_t(PAGE), access, flags, descriptor, 0)
        assert address not in (None, ctypes.c_void_p(-1).value)
        return int(address)

    def _handle(self, number: int, info: int, context: int) -> None:
        address = ctypes.c_void_p.from_address(info + SI_ADDR_OFFSET).value or 0
        if number == signal.SIGSEGV and self._guarded <= address < self._guarded + PAGE:
            assert LIBC.mprotect(ctypes.c_void_p(self._guarded), PAGE, mmap.PROT_READ) == 0
            self.mended.append(signal.SIGSEGV)
        elif number == signal.SIGBUS and self._empty <= address < self._empty + PAGE:
            os.ftruncate(self._file, PAGE)
            self.mended.append(signal.SIGBUS)
        else:
            self.passed_on += 1
            HANDLER(self._before[signal.Signals(number)].handler or 0)(number, info, context)

    def fault(self) -> None:
        """Touches both pages after making them inaccessible again."""
        assert LIBC.mprotect(ctypes.c_void_p(self._guarded), PAGE, 0) == 0
        os.ftruncate(self._file, 0)
        self.mended.clear()
        for address in (self._guarded, self._empty):
            assert ctypes.string_at(address + 5, 1) == b"\0"
        assert self.mended == [signal.SIGSEGV, signal.SIGBUS]


def child_shares_with_another(order: str, pmap: str) -> None:
    if order == "before":
        foreign = Foreign()
        mapping = map_content(pmap)
    else:
        mapping = map_content(pmap)
        check(mapping.array)
        foreign = Foreign()
    if order == "between":
        check(mapping.array)
        mapping = map_content(pmap)
    for _ in range(3):
        foreign.fault()
        check(mapping.array)
    if order == "before":
        assert foreign.passed_on == 0
    failing = map_content(pmap, **BAD)
    foreign.fault()
    with pytest.raises(quire.PageIOError):
        TOUCHES["sum"](failing.array)
    foreign.fault()
    check(mapping.array)


@pytest.mark.parametrize("order", ["before", "after", "between"])
def test_another_library_that_mends_its_own_faults(order: str, pmap: str) -> None:
    children.run(child_shares_with_another, order, pmap).check()


def child_handles_in_python(order: str, pmap: str) -> None:
    """Python's own handlers of the two signals: for signals that are sent."""
    mapping = map_content(pmap)
    if order == "before":
        del mapping
    seen: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        seen.append(number)

    for number in SIGNALS:
        signal.signal(number, handle)
    mapping = map_content(pmap)  # puts quire's handlers on top
    for _ in range(3):
        check(mapping.array)
        seen.clear()
        for number in SIGNALS:
            os.kill(os.getpid(), number)
        for _ in range(10):
            pass
        assert seen == SIGNALS
        check(mapping.array)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    mapping = map_content(pmap)
    for number in SIGNALS:
        os.kill(os.getpid(), number)
    check(mapping.array)
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    mapping = map_content(pmap)
    check(mapping.array)
    print("now", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize("order", ["before", "after"])
def test_handlers_in_python_see_what_is_sent(order: str, pmap: str) -> None:
    ended = children.run(child_handles_in_python, order, pmap)
    assert (ended.status, ended.output, ended.errors) == (-signal.SIGSEGV, "now\n", ""), ended


# Ctrl-C while a store is late.


def late(pmap: str, late_s: float = LATE_S) -> quire.Mapping:
    """The first read of one page takes `late_s`; all others do not."""
    faults = {"offset": LATE_OFFSET, "length": 1, "count": 1, "code": "ok", "delay_s": late_s}
    return map_content(pmap, **faults)


def note_interrupt(error: BaseException, mapping: quire.Mapping) -> None:
    """Says what ended the wait; the mapping is whole again."""
    print(type(error).__name__, flush=True)
    for _ in range(10):
        pass
    check(mapping.array)
    assert mapping.failed is None


class UserStopError(Exception):
    """What a program's own SIGINT handler raises."""


def handler_that_raises(_number: int, _frame: FrameType | None) -> None:
    raise UserStopError


HANDLERS: dict[str, Callable[[int, FrameType | None], None]] = {
    "python's": signal.default_int_handler,
    "raises": handler_that_raises,
    "notes": lambda _number, _frame: None,
}


def child_stalls(handler: str, when: str, pmap: str) -> None:
    """Stalls in the main thread, with and without the interpreter lock, each ended by Ctrl-C."""
    if when == "before":
        signal.signal(signal.SIGINT, HANDLERS[handler])
    for touch in ("item", "copy", "sum"):
        mapping = late(pmap)
        if when == "after":
            signal.signal(signal.SIGINT, HANDLERS[handler])
        part = mapping.array[LATE_OFFSET - PAGE : LATE_OFFSET + 1]
        try:
            print("stalling", flush=True)
            TOUCHES[touch](part)
        except (KeyboardInterrupt, UserStopError, quire.InterruptedPageError) as error:
            note_interrupt(error, mapping)
        print("whole", flush=True)


def interrupt(child: children.Child) -> None:
    """Sends Ctrl-C when the child has come to a halt."""
    child.wait_idle()
    child.process.send_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("handler", "when", "raised"),
    [
        ("python's", "before", "KeyboardInterrupt"),
        ("python's", "after", "KeyboardInterrupt"),
        ("raises", "before", "UserStopError"),
        ("notes", "after", "InterruptedPageError"),
    ],
)
def test_ctrl_c_ends_a_stalled_read(handler: str, when: str, raised: str, pmap: str) -> None:
    with children.start(child_stalls, handler, when, pmap) as child:
        for number in (1, 2, 3):
            child.wait_line("stalling", count=number)
            interrupt(child)
            child.wait_line("whole", INTERRUPT_LIMIT_S, count=number)
        assert child.finish().check().split() == ["stalling", raised, "whole"] * 3


def child_stalls_in_threads(main_waits: str, pmap: str) -> None:
    """Two threads wait for the page, with or without the main thread."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    mapping = late(pmap)
    array, ended = mapping.array, []

    def wait() -> None:
        try:
            TOUCHES["copy"](array[LATE_OFFSET - PAGE : LATE_OFFSET + 1])
        except quire.InterruptedPageError as error:
            ended.append(error)

    threads = [threading.Thread(target=wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        print("stalling", flush=True)
        if main_waits == "True":
            TOUCHES["copy"](array[LATE_OFFSET - PAGE : LATE_OFFSET + 1])
        else:
            threading.Event().wait(LATE_S)
    except KeyboardInterrupt as error:
        for thread in threads:
            thread.join(INTERRUPT_LIMIT_S)
        assert not any(thread.is_alive() for thread in threads)
        # One that was late sees the page whole again and has nothing to raise.
        assert ended or main_waits == "True"
        note_interrupt(error, mapping)


@pytest.mark.parametrize("main_waits", [False, True])
def test_ctrl_c_ends_the_waits_of_threads(main_waits: bool, pmap: str) -> None:
    with children.start(child_stalls_in_threads, main_waits, pmap) as child:
        child.wait_line("stalling")
        interrupt(child)
        child.wait_line("KeyboardInterrupt", 2 * INTERRUPT_LIMIT_S)
        child.finish().check()


def child_stalls_in_asyncio(how: str, pmap: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    mapping = late(pmap)
    part = mapping.array[LATE_OFFSET - PAGE : LATE_OFFSET + 1]

    async def touch() -> None:
        print("stalling", flush=True)
        if how == "in a thread":
            await asyncio.to_thread(TOUCHES["copy"], part)
        else:
            TOUCHES["copy"](part)

    async def catch() -> None:
        try:
            await touch()
        except quire.InterruptedPageError:
            await asyncio.sleep(LATE_S)  # cancelled by asyncio's own handling of Ctrl-C

    try:
        asyncio.run(catch() if how == "caught" else touch())
    except (KeyboardInterrupt, quire.InterruptedPageError) as error:
        note_interrupt(error, mapping)


@pytest.mark.parametrize(
    ("how", "raised"),
    [
        ("in the loop", "InterruptedPageError"),
        ("caught", "KeyboardInterrupt"),
        ("in a thread", "KeyboardInterrupt"),
    ],
)
def test_ctrl_c_under_asyncio(how: str, raised: str, pmap: str) -> None:
    with children.start(child_stalls_in_asyncio, how, pmap) as child:
        child.wait_line("stalling")
        interrupt(child)
        child.wait_line(raised, INTERRUPT_LIMIT_S)
        child.finish().check()


def child_has_no_handler(action: str, late_s: str, pmap: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL if action == "default" else signal.SIG_IGN)
    mapping = late(pmap, float(late_s))
    print("stalling", flush=True)
    TOUCHES["item"](mapping.array[: LATE_OFFSET + 1])
    note_interrupt(InterruptedError(), mapping)


def test_ctrl_c_kills_a_program_that_wants_that(pmap: str) -> None:
    with children.start(child_has_no_handler, "default", LATE_S, pmap) as child:
        child.wait_line("stalling")
        interrupt(child)
        assert child.finish(INTERRUPT_LIMIT_S).status == -signal.SIGINT


def test_ctrl_c_is_nothing_to_a_program_that_ignores_it(pmap: str) -> None:
    with children.start(child_has_no_handler, "ignore", 1.5, pmap) as child:
        child.wait_line("stalling")
        interrupt(child)
        assert child.finish().check().split() == ["stalling", "InterruptedError"]


# Stopping and going on.


def child_reads_for_a_while(kind: str, pmap: str) -> None:
    source = BytesStore(CONTENT) if kind == "python" else _core.open_memory(CONTENT, "content")
    budget = "2 MiB" if kind == "python" else 16 * PAGE
    mapping = quire.open(source, dtype="u1", pmap=pmap, granule=PAGE, budget=budget)
    stop, wrong = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                check(mapping.array)
            except BaseException as error:
                wrong.append(error)
                raise

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    print(*child_processes(), flush=True)
    print("reading", flush=True)
    threading.Event().wait(0.7)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert mapping.failed is None
    print("done", flush=True)


@pytest.mark.parametrize("who", ["process", "pager"])
def test_stop_and_go_on(who: str, pmap: str) -> None:
    kind = "python" if who == "pager" else "memory"
    with children.start(child_reads_for_a_while, kind, pmap) as child:
        child.wait_line("reading")
        target = child.process.pid if who == "process" else int(child.lines[0])
        for _ in range(4):
            os.kill(target, signal.SIGSTOP)
            threading.Event().wait(0.1)
            os.kill(target, signal.SIGCONT)
            threading.Event().wait(0.03)
        assert child.finish().check().endswith("done\n")


# Threads that block signals.


def block_all_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def child_blocks(when: str, pmap: str) -> None:
    """All signals are blocked before the mapping is made, or in each thread that touches it."""
    if when == "before":
        block_all_signals()
    mapping = map_content(pmap)
    ended: list[bool] = []

    def read() -> None:
        if when == "after":
            block_all_signals()
        check(mapping.array)
        ended.append(True)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == [True] * 3
    if when == "before":
        check(mapping.array)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        assert signal.SIGINT in blocked  # only what faults need was let through
        with pytest.raises(quire.PageIOError):
            TOUCHES["sum"](map_content(pmap, offset=LATE_OFFSET, length=1).array)
    print("done", flush=True)


def test_blocked_before_the_mapping_was_made(pmap: str) -> None:
    """Opening lets the two fault signals through, in its thread and those that it starts."""
    assert children.run(child_blocks, "before", pmap).check() == "done\n"


def test_blocked_by_the_thread_that_touches(pmap: str) -> None:
    """Right where the kernel lets the thread wait; where faults are signals, it ends the process.

    No handler can prevent that: the kernel sets a blocked fault signal to its default action
    (`force_sig_info` of Linux). Never is anything wrong read.
    """
    ended = children.run(child_blocks, "after", pmap)
    if takes_system_calls(pmap):
        assert ended.check() == "done\n"
    else:
        assert ended.status in FAULT_SIGNALS, ended
        assert ended.output == ""


if __name__ == "__main__":
    children.main()
