"""What can come back from the machine: a failed call, a signal, the end of a process.

::

    ModelError
    ├── CallError      a system call failed: an errno name and why
    ├── Signalled      an access raised SIGSEGV or SIGBUS
    ├── OutOfMemory    no frame could be had: the caller is killed
    └── DiskError      the disk is full or broken (a call gets its errno, an access SIGBUS)

`as_call_error` makes the last two the errno of a system call.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CallError", "DiskError", "ModelError", "OutOfMemory", "Signalled", "as_call_error"]


class ModelError(Exception):
    """Base of all that the model raises on purpose."""


class CallError(ModelError):
    """A system call failed with an errno, by name."""

    def __init__(self, errno: str, why: str) -> None:
        self.errno = errno
        self.why = why
        super().__init__(f"{errno}: {why}")


class Signalled(ModelError):  # noqa: N818 - it is no error of anybody
    """An access could not be done. `code` is the si_code, `address` the exact byte (si_addr).

    `done` counts the bytes that were accessed before it.
    """

    done = 0

    def __init__(self, signal: str, code: str, address: int) -> None:
        self.signal = signal
        self.code = code
        self.address = address
        super().__init__(f"{signal} {code} at {address:#x}")


class OutOfMemory(ModelError):  # noqa: N818 - it is no error of anybody
    """Nothing can be evicted and every frame is in use."""


class DiskError(ModelError):
    """The disk refused: `errno` is ENOSPC or EIO."""

    def __init__(self, errno: str, why: str) -> None:
        self.errno = errno
        self.why = why
        super().__init__(f"{errno}: {why}")


@contextmanager
def as_call_error() -> Iterator[None]:
    """A system call: what the disk refuses has its errno, and without a frame it gives ENOMEM.

    Simplified: Linux would first end a process, as it does for an access.
    """
    try:
        yield
    except DiskError as error:
        raise CallError(error.errno, error.why) from error
    except OutOfMemory as error:
        raise CallError("ENOMEM", str(error)) from error
