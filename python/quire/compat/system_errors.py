"""Refusals of the system as the modules raise them that the drop-ins stand for: as `OSError`."""

from __future__ import annotations

import errno
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import quire

__all__ = ["TOO_LARGE", "as_system", "require_addresses"]

ADDRESSES = 1 << 56
TOO_LARGE = "Python int too large to convert to C ssize_t"


def as_system(refused: quire.Error, filename: object = None) -> Exception:
    """The `OSError` of the same number, whose class is that of the number; what has none as it is.

    >>> import quire
    >>> as_system(quire.SourceError("open: no", errno=13), "a.bin")
    PermissionError(13, 'open: no')
    """
    if isinstance(refused, OSError) or refused.errno is None:
        return refused
    return OSError(refused.errno, refused.message, filename)


def require_addresses(length: int) -> None:
    """Refuses more bytes than any address space has, as the system would.

    Raises:
        OverflowError: it is no number of bytes in C.
        OSError: ENOMEM.
    """
    if length > sys.maxsize:
        raise OverflowError(TOO_LARGE)
    if length >= ADDRESSES:
        raise OSError(errno.ENOMEM, f"no address space has {length} bytes")
