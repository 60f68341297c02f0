"""Every exception that quire raises.

```
Error
├── SourceError            the source cannot be opened
│   └── FormatError        (also ValueError) its bytes are not of the format asked for
├── BudgetError            (also ValueError) a budget that cannot hold what must be held
├── PmapError              (also RuntimeError) no such pmap, or it does not work here
├── ModeError              (also ValueError) the mode does not allow it
├── ClosedError            (also ValueError) the mapping or store is closed
├── RingFullError          (also BufferError) a ring buffer has no room for so many bytes
├── ProtectionError        a write reached a page that may only be read
├── SyncError              (also OSError) dirty pages could not be written back, and are dirty still
├── SwapFullError          the swap space is used up
└── PageIOError            (also OSError) a page could not be had
    ├── TruncatedError     the source is shorter than it was at open
    ├── ChangedError       the source is another one than at open
    ├── CorruptError       the container does not decode
    │   └── ChecksumError  it decodes to other bytes than were packed
    ├── PagerDiedError     the external pager process ended and could not be started again
    ├── PageTimeoutError   no bytes within the mapping's deadline
    └── InterruptedPageError   the wait for the page was ended by Ctrl-C
```

A `PageIOError` reaches the thread that touched the page as an asynchronous exception: the
interpreter is given a class, not an object, and makes the object itself at its next check. Made
so, without arguments, an error takes its fields from the native core, which keeps one undelivered
page error for each thread.
"""

from __future__ import annotations

import errno as errno_names
import sys
from typing import Any

__all__ = [
    "BudgetError",
    "ChangedError",
    "ChecksumError",
    "ClosedError",
    "CorruptError",
    "Error",
    "FormatError",
    "InterruptedPageError",
    "ModeError",
    "PageIOError",
    "PageTimeoutError",
    "PagerDiedError",
    "PmapError",
    "ProtectionError",
    "RingFullError",
    "SourceError",
    "TruncatedError",
    "error_of_failure",
]


class Error(Exception):
    """The base of every quire exception.

    Attributes:
        message: one sentence: what happened and what to do next.
        source: the path, URL or label of what was read, where known.
        offset: offset in bytes within the source, where known.
        page: index of the page within the mapping, where known.
        errno: the operating system's error number, where there is one.

    >>> str(Error("the read failed", source="a.npy", offset=4096, errno=5))
    'the read failed (source a.npy, offset 4096, EIO)'
    """

    def __init__(
        self,
        message: str = "",
        *,
        source: str | None = None,
        offset: int | None = None,
        page: int | None = None,
        errno: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.source = source
        self.offset = offset
        self.page = page
        self.errno = errno

    def __str__(self) -> str:
        facts = []
        if self.source is not None and self.source not in self.message:
            facts.append(f"source {self.source}")
        if self.offset is not None:
            facts.append(f"offset {self.offset}")
        if self.errno is not None:
            facts.append(errno_names.errorcode.get(self.errno, f"errno {self.errno}"))
        words = self.message or type(self).__name__
        return f"{words} ({', '.join(facts)})" if facts else words

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, _fields(self)))


class SourceError(Error):
    """The source cannot be opened: absent, refused, or not of a kind that quire reads."""


class FormatError(SourceError, ValueError):
    """The bytes of the source are not of the format that was asked for, or are damaged."""


class BudgetError(Error, ValueError):
    """The budget cannot hold what a mapping needs to make progress."""


class PmapError(Error, RuntimeError):
    """There is no pmap of that name, or it does not work here; `quire doctor` says why."""


class ModeError(Error, ValueError):
    """The mode is not known, or does not allow what was asked."""


class ClosedError(Error, ValueError):
    """The mapping or store was closed."""


class RingFullError(Error, BufferError):
    """A ring buffer has no room for so many bytes before some are consumed."""


class DeliveredError(Error):
    """Internal: an error that the core raises by class in the thread that touched the page.

    Made without arguments, it takes its fields from the calling thread's undelivered page error.
    """

    def __init__(
        self,
        message: str = "",
        *,
        source: str | None = None,
        offset: int | None = None,
        page: int | None = None,
        errno: int | None = None,
    ) -> None:
        fields = (source, offset, page, errno)
        if not message and all(field is None for field in fields):
            pending = take_pending_failure()
            if pending is not None:
                message = pending["message"]
                fields = tuple(pending[name] for name in ("source", "offset", "page", "errno"))
        source, offset, page, errno = fields
        super().__init__(message, source=source, offset=offset, page=page, errno=errno)


class PageIOError(DeliveredError, OSError):
    """A page could not be had after all retries; the mapping is failed from then on."""


class TruncatedError(PageIOError):
    """The source is shorter than it was when it was opened."""


class ChangedError(PageIOError):
    """The source is no longer the one that was opened; open it again to use the new one."""


class CorruptError(PageIOError):
    """The bytes of a compressed source do not decode."""


class ChecksumError(CorruptError):
    """The bytes of a compressed source decode, but not to what was packed."""


class PagerDiedError(PageIOError):
    """The external pager process ended and could not be started again."""


class PageTimeoutError(PageIOError):
    """The source gave no bytes within the deadline (`timeout=` of `quire.open`)."""


class InterruptedPageError(PageIOError):
    """The wait for a page was ended by Ctrl-C."""


class ProtectionError(DeliveredError):
    """A write reached a page that may only be read."""


class SyncError(DeliveredError, OSError):
    """Dirty pages could not be written back, or made durable; they are dirty still.

    Nothing is lost: the array holds what was written to it. Free space or mend the disk and call
    `quire.Mapping.sync` again, which writes it again; or give it up with
    ``mapping.close(discard=True)``. ``offset`` is that of the write that failed, ``errno``
    says why.
    """


class SwapFullError(DeliveredError):
    """The swap space is used up: pages can neither be evicted nor be had until some is free."""


CLASS_OF_CODE: dict[str, type[Error]] = {
    "io": PageIOError,
    "truncated": TruncatedError,
    "changed": ChangedError,
    "corrupt": CorruptError,
    "checksum": ChecksumError,
    "pager_died": PagerDiedError,
    "timeout": PageTimeoutError,
    "interrupted": InterruptedPageError,
    "closed": PageIOError,
    "protection": ProtectionError,
    "swap_full": SwapFullError,
    "write_back": SyncError,
}
"""The class for each name of a ``FaultCode`` of the core."""


def error_of_failure(failure: dict[str, Any]) -> Error:
    """The exception that stands for a failure the native core describes.

    >>> error_of_failure({"code": "truncated", "source": "a", "offset": 8, "page": 0,
    ...                   "errno": None, "message": "short"})
    TruncatedError('short')
    """
    kind = CLASS_OF_CODE.get(failure["code"], PageIOError)
    fields = {name: failure[name] for name in ("source", "offset", "page", "errno")}
    return kind(failure["message"] or "the page could not be read", **fields)


def take_pending_failure() -> dict[str, Any] | None:
    """The calling thread's undelivered page error, taken out of the core; None without one.

    The core is looked up, not imported: an error made before it is loaded, or in a process that
    never loads it (the external pager), has nothing to take.
    """
    core = sys.modules.get("quire._core")
    if core is None:
        return None
    failure: dict[str, Any] | None = core.take_pending_error()
    return failure


def _fields(error: Error) -> dict[str, Any]:
    return {name: getattr(error, name) for name in ("source", "offset", "page", "errno")}


def _rebuild(kind: type[Error], message: str, fields: dict[str, Any]) -> Error:
    return kind(message or kind.__name__, **fields)
