"""`Store`: the interface that a source of your own implements, to be mapped by `quire.open`."""

from __future__ import annotations

from abc import ABC, abstractmethod

__all__ = ["Store"]


class Store(ABC):
    """Bytes somewhere, read by offset.

    An instance is pickled and sent to a process of its own, the *external pager*, where quire
    calls it: no Python may run in the process that touches a page, because the touching thread
    can hold the interpreter lock. So keep in it only what can be pickled, and open files and
    connections on first use in `read_into`. Print nothing that you rely on: standard output there
    is standard error.

    Threads: quire calls `read_into` from several threads at once.

    Subclasses may also define ``kind`` (a word for what it is) and ``details`` (a dict that
    ``quire info`` shows).

    """

    @property
    @abstractmethod
    def size(self) -> int:
        """Size in bytes; must not change while the store is open."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What errors call it: a path or URL without credentials, or a name of your choice."""

    @property
    def version(self) -> str | None:
        """Names the content: another content has another version. None when it cannot be told.

        A pager process that is started again, and a mapping that is unpickled, must find the
        same version, or they raise `quire.ChangedError`.
        """
        return None

    @abstractmethod
    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills all of ``buffer`` (writable bytes) from ``offset``, or raises.

        quire never asks past `size`. ``buffer`` must not be used after the return.

        Raises:
            quire.PageIOError: or a subclass that says more: `quire.ChangedError`,
                `quire.TruncatedError`, `quire.CorruptError`. Any other exception counts as a
                `quire.PageIOError` and carries its words and errno.
        """

    def close(self) -> None:
        """Releases what the store holds. No call follows it. Does nothing by default."""
        return
