"""The native core's side of the pager protocol in a few lines of Python, for tests.

It starts a pager process as the core does (inherited descriptors, decimal arguments), so the
process can be tested, stalled and killed without the native module.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import struct
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quire.pager import Recipe, command, encode_recipe

if TYPE_CHECKING:
    from types import TracebackType

    from quire.store.abc import Store

REQUEST = struct.Struct("<IIQ")
REPLY = struct.Struct("<Iii")
WAIT_S = 60.0


@dataclass(frozen=True)
class Answer:
    """One reply packet, and the bytes in its slot when it came."""

    slot: int
    code: int
    errno: int
    message: str


class CoreSide:
    """A pager process and the core's ends of its channel; a context manager."""

    def __init__(
        self,
        source: Recipe | Store | bytes,
        *,
        slots: int = 16,
        slot_bytes: int = 1 << 20,
        env: dict[str, str] | None = None,
    ) -> None:
        recipe = source if isinstance(source, bytes) else encode_recipe(source)
        self.slot_bytes = slot_bytes
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(WAIT_S)
        memory_fd = os.memfd_create("test-pager")
        os.ftruncate(memory_fd, slots * slot_bytes)
        self.memory = mmap.mmap(memory_fd, slots * slot_bytes)
        recipe_fd = os.memfd_create("test-recipe")
        os.write(recipe_fd, recipe)
        os.lseek(recipe_fd, 0, os.SEEK_SET)
        fds = (theirs.fileno(), memory_fd, recipe_fd)
        words = [*command(), *map(str, fds), str(slots), str(slot_bytes)]
        self.process = subprocess.Popen(
            words, pass_fds=fds, env=None if env is None else {**os.environ, **env}
        )
        theirs.close()
        os.close(memory_fd)
        os.close(recipe_fd)
        packet = self.control.recv(1 << 16)
        self.opened = packet[:1] == b"H"
        self.first: dict[str, Any] = json.loads(packet[1:]) if packet else {}

    def ask(self, slot: int, offset: int, length: int) -> None:
        """Sends one request."""
        self.control.send(REQUEST.pack(slot, length, offset))

    def answer(self) -> Answer | None:
        """The next reply, or None at the end of the channel."""
        try:
            packet = self.control.recv(1 << 16)
        except ConnectionResetError:
            return None
        if not packet:
            return None
        slot, code, number = REPLY.unpack_from(packet)
        return Answer(slot, code, number, packet[REPLY.size :].decode())

    def slot(self, slot: int, length: int) -> bytes:
        """The bytes now in a slot."""
        start = slot * self.slot_bytes
        return self.memory[start : start + length]

    def read(self, offset: int, length: int) -> bytes | Answer | None:
        """One request and its answer: the bytes, or the reply that refuses them."""
        self.ask(0, offset, length)
        answer = self.answer()
        if answer is None or answer.code:
            return answer
        return self.slot(answer.slot, length)

    def close(self) -> int:
        """Hangs up and returns the exit status of the process."""
        self.control.close()
        status = self.process.wait(WAIT_S)
        self.memory.close()
        return status

    def __enter__(self) -> CoreSide:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
