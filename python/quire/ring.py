"""`Ring`: a ring buffer whose contents are always contiguous, wherever they begin."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from quire import _core
from quire.arena import Arena
from quire.errors import ClosedError, RingFullError
from quire.memory_file import new_memory_file
from quire.sizes import SizeLike, format_size, parse_size

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from typing_extensions import Buffer

__all__ = ["Ring"]

LABEL = "ring buffer"


class Ring:
    """A ring buffer of bytes for one producer and one consumer, in one process.

    Its memory is mapped twice, side by side, so that the bytes after the last are the first again:
    whatever is written or read is one piece of memory, never two.

    ```
      addresses   |<------ memory ------>|<-- the same memory -->|
                           |<-- readable: one piece -->|
    ```

    The producer calls `reserve` and `commit`, or `write`; the consumer `peek` and `consume`, or
    `read`. Views given out are memoryviews of the memory itself: ``numpy.frombuffer`` makes arrays
    of them without copying. What `peek` showed may be overwritten once it was consumed.

    Threads: one that produces and one that consumes at the same time. A forked child shares the
    memory but not the positions: use it in one process only.

    >>> import quire
    >>> with quire.Ring("64 KiB") as ring:
    ...     ring.write(b"virtual memory")
    ...     bytes(ring.peek(7)), ring.read(8), ring.readable
    14
    (b'virtual', b'virtual ', 6)
    """

    def __init__(self, size: SizeLike) -> None:
        """Makes one of ``size`` bytes, rounded up to whole pages: see `size_bytes`.

        Raises:
            quire.Error: the kernel refuses; the message says which limit was hit.
            ValueError: it is no size, or 0.
        """
        asked = parse_size(size)
        if asked == 0:
            raise ValueError("a ring has at least one byte")
        page = _core.page_bytes()
        self._size = -(-asked // page) * page
        self._arena = Arena(2 * self._size, label=LABEL)
        try:
            _map_twice(self._arena, self._size)
        except BaseException:
            self._arena.close()
            raise
        self._view: memoryview | None = memoryview(self._arena)
        self._produced = 0  # bytes since the beginning; changed by the producer alone
        self._consumed = 0  # ... by the consumer alone
        self._moved = threading.Condition()

    @property
    def size_bytes(self) -> int:
        """Bytes it holds: those asked for, rounded up to whole pages."""
        return self._size

    @property
    def readable(self) -> int:
        """Bytes that were committed and not consumed."""
        return self._produced - self._consumed

    @property
    def writable(self) -> int:
        """Bytes that can be committed before some are consumed."""
        return self._size - self.readable

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._view is None

    def reserve(self, length: int) -> memoryview:
        """The next ``length`` bytes to fill, in one piece; `commit` makes them readable.

        Raises:
            quire.RingFullError: there is no room for so many.
        """
        memory = self._memory()
        self._require_room(length)
        start = self._produced % self._size
        return memory[start : start + length]

    def commit(self, length: int) -> None:
        """Makes the next ``length`` bytes readable.

        Raises:
            quire.RingFullError: there is no room for so many.
        """
        self._memory()
        self._require_room(length)
        with self._moved:
            self._produced += length
            self._moved.notify_all()

    def write(self, data: Buffer) -> int:
        """Copies ``data`` in and commits it; returns how many bytes. All of it goes in, or nothing.

        Raises:
            quire.RingFullError: there is no room for it.
        """
        with memoryview(data) as view, view.cast("B") as source:
            length = len(source)
            if length:
                with self.reserve(length) as room:
                    room[:] = source
            self.commit(length)
        return length

    def peek(self, length: int | None = None) -> memoryview:
        """The next ``length`` bytes, or all that are readable, in one piece and read-only.

        Raises:
            ValueError: so many are not readable.
        """
        memory = self._memory()
        length = self._require_readable(length)
        start = self._consumed % self._size
        return memory[start : start + length].toreadonly()

    def consume(self, length: int) -> None:
        """Gives the room of the next ``length`` bytes back to the producer.

        Raises:
            ValueError: so many are not readable.
        """
        self._memory()
        self._require_readable(length)
        with self._moved:
            self._consumed += length
            self._moved.notify_all()

    def read(self, length: int | None = None) -> bytes:
        """Copies the next ``length`` bytes out, or all that are readable, and consumes them.

        Raises:
            ValueError: so many are not readable.
        """
        with self.peek(length) as view:
            data = bytes(view)
        self.consume(len(data))
        return data

    def wait_readable(self, length: int = 1, timeout: float | None = None) -> bool:
        """Waits until ``length`` bytes are readable; False when ``timeout`` seconds passed before.

        True also when the ring was closed meanwhile.

        Raises:
            ValueError: the ring never holds so many.
        """
        self._require_possible(length)
        with self._moved:
            return self._moved.wait_for(lambda: self.readable >= length or self.closed, timeout)

    def wait_writable(self, length: int = 1, timeout: float | None = None) -> bool:
        """Waits until there is room for ``length`` bytes; False when ``timeout`` passed before.

        True also when the ring was closed meanwhile.

        Raises:
            ValueError: the ring never holds so many.
        """
        self._require_possible(length)
        with self._moved:
            return self._moved.wait_for(lambda: self.writable >= length or self.closed, timeout)

    def close(self) -> None:
        """Unmaps it; threads that wait go on. Does nothing when that was done before.

        Raises:
            BufferError: a view that was given out is alive.
        """
        if self._view is None:
            return
        self._view.release()
        if self._arena.exports:
            self._view = memoryview(self._arena)
            raise BufferError("cannot close: views of the ring are alive; delete them first")
        self._view = None
        self._arena.close()
        with self._moved:
            self._moved.notify_all()

    def __enter__(self) -> Self:
        self._memory()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes; while views are alive its memory stays until the last of them goes."""
        if self._view is not None:
            self._view.release()
            self._view = None
            self._arena.__exit__(kind, error, traceback)
            with self._moved:
                self._moved.notify_all()

    def __len__(self) -> int:
        return self.readable

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.readable:,} bytes readable"
        return f"<quire.Ring {format_size(self._size)}, {state}>"

    def _memory(self) -> memoryview:
        view = self._view
        if view is None:
            raise ClosedError("the ring is closed: make another", source=LABEL)
        return view

    def _require_room(self, length: int) -> None:
        if length < 0:
            raise ValueError(f"{length} bytes: a length may not be negative")
        room = self.writable
        if length > room:
            more = (
                "wait_writable until some are consumed"
                if length <= self._size
                else f"make a larger ring, this one has {self._size:,}"
            )
            raise RingFullError(
                f"{length:,} bytes do not fit, there is room for {room:,}: {more}", source=LABEL
            )

    def _require_readable(self, length: int | None) -> int:
        there = self.readable
        if length is None:
            return there
        if not 0 <= length <= there:
            raise ValueError(f"{length:,} bytes of {there:,} that are readable: see wait_readable")
        return length

    def _require_possible(self, length: int) -> None:
        if not 0 <= length <= self._size:
            raise ValueError(f"the ring holds {self._size:,} bytes, never {length:,}")


def _map_twice(arena: Arena, size_bytes: int) -> None:
    descriptor = new_memory_file("quire-ring", size_bytes, LABEL)
    try:
        for at in (0, size_bytes):
            arena.map(at, descriptor, size_bytes, sharing="shared", protection="rw")
    finally:
        os.close(descriptor)
