"""Turns an exception of a store into the numbers and words of a reply.

The codes are those of ``FaultCode`` in ``crates/quire-core/src/errors.rs``.
"""

from __future__ import annotations

import errno as errno_names
import json
import struct

from quire import errors

__all__ = ["REPLY", "REQUEST", "refusal", "reply"]

REQUEST = struct.Struct("<IIQ")
"""slot, length in bytes, offset in bytes."""
REPLY = struct.Struct("<Iii")
"""slot, code (0: the bytes are in the slot), errno (0: none); a message may follow."""

MESSAGE_BYTES_MAX = 512

IO = 1
CODES: tuple[tuple[type[BaseException], int], ...] = (
    (errors.ChecksumError, 5),
    (errors.CorruptError, 4),
    (errors.ChangedError, 3),
    (errors.TruncatedError, 2),
    (errors.PageTimeoutError, 7),
    (errors.PagerDiedError, 6),
)


def code_of(error: BaseException) -> int:
    """The number of the fault that ``error`` stands for.

    >>> code_of(errors.ChangedError("overwritten")), code_of(ZeroDivisionError())
    (3, 1)
    """
    return next((code for kind, code in CODES if isinstance(error, kind)), IO)


def errno_of(error: BaseException) -> int:
    """The operating system's error number in ``error`` or its causes, or 0."""
    seen: BaseException | None = error
    for _ in range(10):
        if seen is None:
            return 0
        number = getattr(seen, "errno", None)
        if isinstance(number, int) and 0 < number < 4096:
            return number
        if isinstance(seen, TimeoutError):
            return errno_names.ETIMEDOUT
        if isinstance(seen, MemoryError):
            return errno_names.ENOMEM
        seen = seen.__cause__
    return 0


def message_of(error: BaseException) -> str:
    """The sentence a person reads; names the class of an exception that is not quire's own."""
    if isinstance(error, errors.Error):
        return error.message or type(error).__name__
    try:
        words = str(error)
    except Exception:  # noqa: BLE001 - __str__ of a user's class
        words = ""
    name = type(error).__name__
    return f"the store raised {name}: {words}" if words else f"the store raised {name}"


def reply(slot: int, error: BaseException | None) -> bytes:
    """The packet that answers the request of ``slot``: success, or ``error`` in short."""
    if error is None:
        return REPLY.pack(slot, 0, 0)
    words = message_of(error).encode("utf-8", "replace")[:MESSAGE_BYTES_MAX]
    whole = words.decode("utf-8", "ignore").encode("utf-8")
    return REPLY.pack(slot, code_of(error), errno_of(error)) + whole


def refusal(error: BaseException) -> bytes:
    """The packet sent in place of a hello when the store could not be opened."""
    code = "format" if isinstance(error, errors.FormatError) else "source"
    packet = {"code": code, "errno": errno_of(error) or None, "message": message_of(error)}
    return b"E" + json.dumps(packet).encode()
