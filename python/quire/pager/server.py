"""The loop of the pager process: takes requests off the socket, fills slots, answers.

Workers wait on the socket themselves, so no Python thread hands a request to another: that would
cost one more wake. Only two wait at a time, the others are parked: the kernel wakes those that
wait in turn, and sixteen taking turns made a serial request 15 to 25 % slower than one or two (the
thread that ran last has the warm cache). A worker that takes the last place calls the next one.

A worker reads straight into the shared memory of its slot. An exception of the store, of
whatever class, becomes a reply; the process ends only when the core closes the socket or dies.
"""

from __future__ import annotations

import json
import mmap
import operator
import os
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from quire.errors import SourceError, TruncatedError
from quire.pager.recipe import open_recipe
from quire.pager.replies import REQUEST, refusal, reply

if TYPE_CHECKING:
    from quire.store.abc import Store

__all__ = ["PagerServer", "serve"]

THREADS_MAX = 64
WAITING_MAX = 2
CLOSE_TIMEOUT_S = 1.0


class PagerServer:
    """Answers the requests of one core for one store.

    Threads: `run` waits while workers, as many as there are slots, call the store at once.
    """

    def __init__(
        self, store: Store, control: socket.socket, memory: mmap.mmap, slot_bytes: int
    ) -> None:
        """``memory`` holds one slot of ``slot_bytes`` for each request in flight."""
        self._store = store
        self._control = control
        self._memory = memoryview(memory)
        self._slot_bytes = slot_bytes
        self._slots = len(memory) // slot_bytes
        self._ended = threading.Event()
        self._threads_max = min(self._slots, THREADS_MAX)
        self._lock = threading.Lock()
        # guarded by _lock: workers alive, those in recv or called to it, locks of those parked
        self._threads = 0
        self._waiting = 0
        self._parked: list[threading.Lock] = []

    def run(self) -> None:
        """Says hello, answers until the core hangs up, and closes the store."""
        self._control.send(hello(self._store))
        for _ in range(min(WAITING_MAX, self._threads_max)):
            self._start_worker()
        self._ended.wait()
        closer = threading.Thread(target=_close_quietly, args=(self._store,), daemon=True)
        closer.start()
        closer.join(CLOSE_TIMEOUT_S)

    def _start_worker(self) -> None:
        self._threads += 1
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        packet = bytearray(REQUEST.size + 1)
        try:
            while self._receive(packet) == REQUEST.size:
                slot, length, offset = REQUEST.unpack_from(packet)
                self._control.send(reply(slot, self._fill(slot, length, offset)))
        except OSError:
            pass
        finally:
            self._ended.set()

    def _receive(self, packet: bytearray) -> int:
        """Waits for a request, parked first while enough others do; keeps one waiting behind it."""
        with self._lock:
            turn = None
            if self._waiting < WAITING_MAX:
                self._waiting += 1
            else:
                turn = threading.Lock()
                turn.acquire()
                self._parked.append(turn)
        if turn is not None:
            turn.acquire()
        got = self._control.recv_into(packet)
        with self._lock:
            self._waiting -= 1
            if self._waiting == 0:
                if self._parked:
                    self._waiting += 1
                    self._parked.pop().release()
                elif self._threads < self._threads_max:
                    self._start_worker()
        return got

    def _fill(self, slot: int, length: int, offset: int) -> BaseException | None:
        """Reads into the slot; returns what the store raised, without its traceback.

        The traceback is dropped because its frames would keep the store's buffers alive.
        """
        if slot >= self._slots or length > self._slot_bytes:
            return ValueError(f"slot {slot} of {length} bytes is outside the shared memory")
        start = slot * self._slot_bytes
        view = self._memory[start : start + length]
        try:
            filled: Any = self._store.read_into(offset, view)
        except BaseException as error:  # noqa: BLE001 - user code must not end the pager
            return error.with_traceback(None)
        finally:
            with suppress(BufferError):  # the store kept a view of it; it must not, but may
                view.release()
        if isinstance(filled, int) and filled != length:
            return TruncatedError(f"the store gave {filled} of {length} bytes")
        return None


def hello(store: Store) -> bytes:
    """The packet that introduces an open store.

    Raises:
        quire.SourceError: its size, label or version is not of the right type.
    """
    try:
        size = operator.index(store.size)
    except TypeError:
        size = -1
    if size < 0:
        raise SourceError(
            f"the size of a store must be an int of at least 0, not {store.size!r}: "
            "return the number of bytes from its `size` property"
        )
    version = store.version
    facts = {
        "size": size,
        "label": str(store.label),
        "version": None if version is None else str(version),
        "kind": getattr(store, "kind", type(store).__name__),
        "details": getattr(store, "details", {}),
    }
    return b"H" + json.dumps(facts, default=str).encode()


def serve(control_fd: int, memory_fd: int, recipe_fd: int, slots: int, slot_bytes: int) -> int:
    """The whole life of a pager process; returns its exit status."""
    for fd in (control_fd, memory_fd, recipe_fd):
        os.set_inheritable(fd, False)
    control = socket.socket(fileno=control_fd)
    with open(recipe_fd, "rb") as file:
        recipe = file.read()
    memory = mmap.mmap(memory_fd, slots * slot_bytes)
    os.close(memory_fd)
    try:
        PagerServer(open_recipe(recipe), control, memory, slot_bytes).run()
    except BrokenPipeError:
        return 0
    except BaseException as error:  # noqa: BLE001 - all of it is told to the core
        with suppress(OSError):
            control.send(refusal(error))
        return 1
    return 0


def _close_quietly(store: Store) -> None:
    with suppress(BaseException):
        store.close()
