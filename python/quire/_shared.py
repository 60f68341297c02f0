"""`shared`, `unlink` and `receive`: memory that several processes have mapped."""

from __future__ import annotations

import errno
import math
import operator
import os
from typing import TYPE_CHECKING

import numpy as np

from quire import shared_names
from quire.errors import SourceError
from quire.kernel_mapping import RawArray
from quire.layout import shape_of
from quire.map_flags import protection_bits
from quire.memory_file import refusal
from quire.shared_mapping import SharedMapping, attached, label_of, make_segment, received
from quire.shared_names import LOCK
from quire.sizes import SizeLike, parse_size

if TYPE_CHECKING:
    import socket

    import numpy.typing as npt

    from quire.layout import Order, ShapeLike

__all__ = ["receive", "shared", "unlink"]


def shared(
    name: str | None = None,
    size: SizeLike | None = None,
    *,
    create: bool | None = None,
    protection: str = "rw",
    permissions: int = 0o600,
    dtype: npt.DTypeLike | None = None,
    shape: ShapeLike | None = None,
    order: Order = "C",
) -> SharedMapping:
    r"""Memory that several processes have mapped: a new segment, or the one of a name.

    A segment lives while any process has it mapped, and is gone after the last, killed or not:
    nothing has to be unlinked, and attaching never deletes. Its bytes are zeros at first. Its size
    is sealed: nobody can take pages away from others.

    Without a name it goes to others as an argument of `multiprocessing` and the like, by
    `SharedMapping.send`, or by a fork.

    Args:
        name: what others attach by, up to 200 bytes without "/"; None for a segment without. Names
            are those of one user: two users may have segments of the same name.
        size: bytes, an int or text such as "64 MiB". When absent, that of the array with ``shape``
            and ``dtype``, or of the segment that is there. One that is there must have it.
        create: True: a new one, refused where the name is held; False: one that is there; None:
            whichever it is.
        protection: "r", or "rw"; with "r" nothing can make the mapping writable later.
        permissions: who may open a new segment's memory for reading and writing, as the mode of a
            file. As names are those of one user, bits for others say what they may do with a
            descriptor that `SharedMapping.send` handed to them for reading.
        dtype: type of the elements of `Mapping.array`; bytes when absent.
        shape: lengths of the array; one may be -1.
        order: "C" or "F".

    Raises:
        quire.SourceError: with errno EEXIST, the name is held; with ENOENT, it is not; another
            size; the segment is held by a process that does not let its descriptors be opened, or
            in another container: the message says so, and to use `SharedMapping.send`.
        quire.Error: the system refuses the memory; the message says which limit was hit.
        quire.FormatError: the bytes hold no such array.
        ValueError, TypeError: an argument is out of range.

    Threads: may be called from any thread. A fork waits until it has returned.

    >>> import quire
    >>> with quire.shared("quire-example", "1 MiB") as ours:
    ...     ours.array[:5] = list(b"hello")
    ...     with quire.shared("quire-example", protection="r") as theirs:
    ...         theirs.read(0, 5), theirs.size_bytes
    (b'hello', 1048576)
    >>> quire.shared("quire-example", create=False)
    Traceback (most recent call last):
    ...
    quire.errors.SourceError: nobody holds shared memory 'quire-example': it was never made...
    """
    if "r" not in protection or "x" in protection:
        raise ValueError(f'shared memory has protection "r" or "rw", not {protection!r}')
    protection_bits(protection)
    raw = RawArray(dtype, shape, order)
    size_bytes = _size_of(size, raw)
    permissions = operator.index(permissions)
    if permissions & ~0o666:
        raise ValueError(f"permissions {permissions:#o} have more than reading and writing (0o666)")
    if name is None:
        if create is False:
            raise ValueError("a segment without a name cannot be attached to: give its name")
        with LOCK:
            return _new(None, size_bytes, protection, permissions, raw)
    key = shared_names.key_of(name)
    label = label_of(name)
    for _ in shared_names.tries():
        if create is not True:
            try:
                return attached(key, label, protection, raw, size_bytes)
            except FileNotFoundError as error:
                if create is False:
                    raise _absent(label, error) from None
        try:
            made = _created(key, name, size_bytes, protection, permissions, raw)
        except BlockingIOError:
            continue
        if made is not None:
            return made
        if create is True:
            raise SourceError(
                f"{label} is held by somebody: take another name, or attach with create=False",
                source=label,
                errno=errno.EEXIST,
            )
    raise _busy(label)


def receive(
    connection: socket.socket,
    protection: str | None = None,
    *,
    dtype: npt.DTypeLike | None = None,
    shape: ShapeLike | None = None,
    order: Order = "C",
) -> SharedMapping:
    """Attaches to the segment that the process at the other end of a Unix socket sends.

    It calls `SharedMapping.send`. Works between users and between containers; the segment's name
    comes along where this process may use it.

    Args:
        connection: a Unix socket that is connected and blocks.
        protection: "r" or "rw"; what the sender allows when absent.
        dtype: type of the elements of the array; the sender's when this and shape are absent.
        shape: lengths of the array.
        order: "C" or "F".

    Raises:
        quire.SourceError: it was sent for reading only, and "rw" is asked for.
        quire.FormatError: what came is no segment, or does not hold such an array.
        EOFError: the other end closed the connection.
        OSError: of the socket's.

    >>> import quire, socket
    >>> here, there = socket.socketpair()
    >>> with here, there, quire.shared(shape=(2, 3), dtype="f4") as ours:
    ...     ours.send(here, "r")
    ...     with quire.receive(there) as theirs:
    ...         theirs.array.shape, theirs.writable
    ((2, 3), False)
    """
    return received(connection, protection, RawArray(dtype, shape, order))


def unlink(name: str) -> None:
    r"""Takes the name of a segment away (shm_unlink(3)); those who have it mapped keep it.

    Nobody can attach by the name any more, and it may be given to another segment at once. There
    is no need to call it: a name ends with the last process that has its segment mapped.

    Raises:
        quire.SourceError: with errno ENOENT, nobody holds the name.
        ValueError, TypeError: it is no name.

    >>> import quire
    >>> with quire.shared("quire-example", "1 MiB") as segment:
    ...     quire.unlink("quire-example")
    ...     segment.shared_name, segment.read(0, 1)
    (None, b'\x00')
    """
    key = shared_names.key_of(name)
    for _ in shared_names.tries():
        try:
            return shared_names.unlink(key)
        except FileNotFoundError as error:
            raise _absent(label_of(name), error) from None
        except BlockingIOError:
            continue
    raise _busy(label_of(name))


def _size_of(size: SizeLike | None, raw: RawArray) -> int | None:
    if size is not None:
        return parse_size(size)
    lengths = (-1,) if raw.shape is None else shape_of(raw.shape)
    if -1 in lengths:
        return None
    return math.prod(lengths) * np.dtype("u1" if raw.dtype is None else raw.dtype).itemsize


def _created(
    key: str, name: str, size: int | None, protection: str, permissions: int, raw: RawArray
) -> SharedMapping | None:
    """A new segment of a name; None where it is held."""
    with LOCK:
        mapping = _new(name, size, protection, permissions, raw)
        try:
            mapping._lease = _lease_of_new(key, mapping.fileno())
        except BaseException:
            mapping.close()
            raise
        if mapping._lease is None:
            mapping.close()
            return None
        return mapping


def _lease_of_new(key: str, memory: int) -> shared_names.Lease | None:
    quick = shared_names.publish_new(key, memory)
    if quick is not None:
        return quick
    reserved = shared_names.reserve(key)
    if reserved is None:
        return None
    with reserved:
        lease = reserved.publish(memory)
        lease.show(memory)
        return lease


def _new(
    name: str | None, size: int | None, protection: str, permissions: int, raw: RawArray
) -> SharedMapping:
    """A new memory file, sealed and mapped."""
    if size is None:
        raise ValueError("a new segment needs a size, or a shape without -1")
    shown = os.fsencode(f"quire:{name or ''}")
    label = label_of(name)
    try:
        return make_segment(shown, label, size, permissions, protection_bits(protection), raw)
    except OSError as error:
        raise refusal(error, size, label) from None


def _busy(label: str) -> SourceError:
    return SourceError(
        f"another process is making or removing {label}, and does not go on", source=label
    )


def _absent(label: str, error: OSError) -> SourceError:
    return SourceError(
        f"nobody holds {label}: it was never made, or has ended with its last holder",
        source=label,
        errno=error.errno,
    )
