"""The records behind the names of shared memory: files with locks, in a folder of the user's.

```
/dev/shm/quire-UID/KEY           mode 0600 in a folder of mode 0700
offset  0   "quireSM1"
        8   size of the segment, device and inode of its memory file: 8 bytes each
       64   slots of 16 bytes, one for each mapping that holds the segment:
            PID namespace (8 bytes), process (4), its descriptor (4); zeros in a free one
```

Locks are those of open file descriptions (F_OFD_SETLK, fcntl(2)): the kernel drops them when the
last descriptor of the opening is closed, at the latest with its process. Nothing that a record says
is trusted: it is bounded when it is read, and what it leads to is checked by who opens it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from quire.errors import FormatError, SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "FREE",
    "HEADER",
    "MAGIC",
    "SLOT",
    "Held",
    "Identity",
    "checked_folder",
    "first_lock",
    "folder_path",
    "identity_in",
    "offset_of",
    "open_record",
    "read_record",
    "remedy",
    "set_lock",
    "slots_in",
    "take_away",
    "write_record",
]

MAGIC = b"quireSM1"
HEADER = struct.Struct("=8sQQQ32x")
SLOT = struct.Struct("=QII")
FREE = bytes(SLOT.size)
FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit systems
PAGE_BYTES = 4096
RECORD_BYTES_MAX = 1 << 20
OPEN_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Identity(NamedTuple):
    """What tells one memory file from another."""

    size: int
    device: int
    inode: int

    @classmethod
    def of(cls, descriptor: int) -> Identity:
        """That of an open one."""
        found = os.fstat(descriptor)
        return cls(found.st_size, found.st_dev, found.st_ino)


class Held(NamedTuple):
    """What a slot says."""

    namespace: int
    process: int
    descriptor: int


def folder_path() -> str:
    """Where this user's records are."""
    return f"/dev/shm/quire-{os.geteuid()}"  # noqa: S108 (checked to be ours alone)


@functools.cache
def checked_folder(path: str, user: int) -> str:
    """The folder, made if need be, and checked to be this user's alone."""
    try:
        found = os.lstat(path)
    except OSError:
        found = _made_folder(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user or found.st_mode & 0o077:
        raise SourceError(
            f"the folder of shared names is not safe to use: it must be a folder of user {user} "
            f"with mode 0700, and is {stat.filemode(found.st_mode)} of user {found.st_uid}. Have "
            "it removed, or share without a name and hand it over with send()",
            source=path,
        )
    return path


def _made_folder(path: str) -> os.stat_result:
    try:
        Path(path).mkdir(0o700)
    except FileExistsError:
        pass  # another process was quicker
    except OSError as error:
        raise SourceError(
            f"the folder of shared names cannot be made: {error.strerror}. Share without a name, "
            "and hand it over with send()",
            source=path,
            errno=error.errno,
        ) from None
    return os.lstat(path)


def open_record(key: str, flags: int = 0) -> int:
    """Opens a record of this user's, made if the flags say so; nothing else of its name.

    Raises:
        FileNotFoundError: there is none.
        BlockingIOError: somebody removed the folder: try again.
        quire.SourceError: it cannot be opened, or is another's.
    """
    user = os.geteuid()
    path = f"{checked_folder(folder_path(), user)}/{key}"
    try:
        record = os.open(path, OPEN_FLAGS | flags, 0o600)
    except FileNotFoundError:
        if not flags:
            raise
        checked_folder.cache_clear()  # somebody removed the folder; the next try makes it again
        raise BlockingIOError from None
    except OSError as error:
        raise SourceError(
            f"the record of a shared name cannot be opened: {error.strerror}. {remedy(error)}",
            source=path,
            errno=error.errno,
        ) from None
    found = os.fstat(record)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != user:
        os.close(record)
        raise SourceError(
            f"the record of a shared name is no file of user {user}: remove it", source=path
        )
    return record


def read_record(record: int) -> bytes:
    """All of a record, which may be of any length if it is none."""
    data = os.pread(record, PAGE_BYTES, 0)
    return data if len(data) < PAGE_BYTES else os.pread(record, RECORD_BYTES_MAX, 0)


def write_record(record: int, data: bytes, at: int) -> None:
    """Writes into a record, all of it or nothing.

    Raises:
        quire.SourceError: it cannot be written.
    """
    done = 0
    try:
        while done < len(data):  # what has room for a part only says why at the next call
            done += os.pwrite(record, data[done:], at + done)
    except OSError as error:
        if done:
            with contextlib.suppress(OSError):
                os.pwrite(record, bytes(done), at)
        advice = "See `ulimit -f`" if error.errno == errno.EFBIG else "Make room"
        raise SourceError(
            f"the record of a shared name cannot be written: {error.strerror}. {advice}, or share "
            "without a name, and hand it over with send()",
            source=folder_path(),
            errno=error.errno,
        ) from None


def remedy(error: OSError) -> str:
    """What to do about a record that cannot be opened."""
    if error.errno == errno.ELOOP:
        return "It is a symbolic link, which quire never makes: remove it"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "No more descriptors: a named segment takes two, see `ulimit -n`"
    return "Remove it, or take another name"


def identity_in(key: str, data: bytes) -> Identity | None:
    """What a record is of; None for one that is not written yet."""
    if not data:
        return None
    if len(data) < HEADER.size or not data.startswith(MAGIC):
        raise FormatError(
            "this is no record of a shared name that this version of quire knows: take another "
            "name, or remove it when nobody uses it",
            source=f"{folder_path()}/{key}",
        )
    return Identity(*HEADER.unpack_from(data)[1:])


def slots_in(data: bytes) -> Iterator[tuple[int, Held]]:
    """The slots of a record that are not free, with their numbers."""
    for number in range((len(data) - HEADER.size) // SLOT.size):
        slot = Held(*SLOT.unpack_from(data, offset_of(number)))
        if slot.process:
            yield number, slot


def take_away(key: str, record: int) -> bool:
    """Removes the record if nobody has a slot; says whether it did. May leave it locked."""
    if not set_lock(record, fcntl.F_WRLCK, 0, 0):
        return False
    if os.fstat(record).st_nlink:
        Path(folder_path(), key).unlink(missing_ok=True)
    return True


def set_lock(record: int, kind: int, start: int, length: int) -> bool:
    """Sets or drops a lock on bytes; False where another has one there."""
    try:
        fcntl.fcntl(record, fcntl.F_OFD_SETLK, FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True


def first_lock(record: int) -> int | None:
    """Where the first byte is that another has locked: 0 when all are, None when none is."""
    ask = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, start, _, _ = FLOCK.unpack(fcntl.fcntl(record, fcntl.F_OFD_GETLK, ask))
    return None if kind == fcntl.F_UNLCK else int(start)


def offset_of(slot: int) -> int:
    """The first byte of a slot."""
    return HEADER.size + slot * SLOT.size
