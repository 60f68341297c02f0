"""What can come back from the machine: a failed call, a signal, the end of a process.

::

    ModelError
    ├── CallError      a system call failed: an errno name and why
    ├── Signalled      an access raised SIGSEGV or SIGBUS
    ├── OutOfMemory    no frame could be had: the caller is killed
    └── DiskError      the disk is full or broken (a call gets its errno, an access SIGBUS)
"""

from __future__ import annotations

__all__ = ["CallError", "DiskError", "ModelError", "OutOfMemory", "Signalled"]


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
        super().__init__(f"{errno}: {why}")
