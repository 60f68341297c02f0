"""The module `mmap` of the standard library, on quire's mappings.

All that CPython's module has in versions 3.11 to 3.14, and what is to come (``flush(flags=)``,
`mmap.set_name`), whichever the interpreter. Beside it:

- A touch of what cannot be had, because the file was truncated or its disk is full, raises
  `quire.PageIOError`, which is an `OSError`, where a process would end with SIGBUS.
- Long reads, writes, searches, `flush`, `madvise` and `resize` release the interpreter lock.
- Shared anonymous memory can grow, and ``offset`` may be any byte.

`docs/migration/mmap.md` says what differs.
"""

from __future__ import annotations

import errno
import operator
import os
import stat
import sys
from typing import TYPE_CHECKING, NoReturn, cast

import quire
from quire import MappedFile
from quire.compat.system_errors import TOO_LARGE, as_system, require_addresses

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self, SupportsIndex

ACCESS_DEFAULT = 0
ACCESS_READ = 1
ACCESS_WRITE = 2
ACCESS_COPY = 3

PROT_READ = 1
PROT_WRITE = 2
PROT_EXEC = 4

MAP_SHARED = 0x01
MAP_PRIVATE = 0x02
MAP_ANON = MAP_ANONYMOUS = 0x20
MAP_32BIT = 0x40
MAP_GROWSDOWN = 0x100
MAP_DENYWRITE = 0x800
MAP_EXECUTABLE = 0x1000
MAP_LOCKED = 0x2000
MAP_NORESERVE = 0x4000
MAP_POPULATE = 0x8000
MAP_NONBLOCK = 0x10000
MAP_STACK = 0x20000
MAP_HUGETLB = 0x40000

MADV_NORMAL = 0
MADV_RANDOM = 1
MADV_SEQUENTIAL = 2
MADV_WILLNEED = 3
MADV_DONTNEED = 4
MADV_FREE = 8
MADV_REMOVE = 9
MADV_DONTFORK = 10
MADV_DOFORK = 11
MADV_MERGEABLE = 12
MADV_UNMERGEABLE = 13
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MADV_DONTDUMP = 16
MADV_DODUMP = 17
MADV_HWPOISON = 100

MS_ASYNC = 1
MS_INVALIDATE = 2
MS_SYNC = 4

PAGESIZE = ALLOCATIONGRANULARITY = os.sysconf("SC_PAGE_SIZE")
error = OSError

MAP_TYPE = 0x0F
MAP_FIXED = 0x10
NOTHING_DONE = MAP_DENYWRITE | MAP_EXECUTABLE | MAP_NONBLOCK
"""Flags that Linux accepts and ignores, and `quire.map` refuses."""
ACCESS_NAMES = ("ACCESS_DEFAULT", "ACCESS_READ", "ACCESS_WRITE", "ACCESS_COPY")
OF_ACCESS = {
    ACCESS_READ: (MAP_SHARED, PROT_READ),
    ACCESS_WRITE: (MAP_SHARED, PROT_READ | PROT_WRITE),
    ACCESS_COPY: (MAP_PRIVATE, PROT_READ | PROT_WRITE),
}
LETTERS = ("none", "r", "w", "rw", "x", "rx", "wx", "rwx")
"""What `quire.map` calls the PROT_ bits."""
C_INT_MAX = (1 << 31) - 1


class mmap(MappedFile):  # noqa: N801 (the name that it stands for)
    """A file, or anonymous memory, as a file object and a bytearray of fixed length.

    Args:
        fileno: a descriptor, which is duplicated; -1 for anonymous memory.
        length: bytes; 0 for all of the file from ``offset`` on.
        flags: MAP_ bits.
        prot: PROT_ bits.
        access: instead of the two: ACCESS_READ, ACCESS_WRITE, ACCESS_COPY.
        offset: byte of the file at which it begins, any.
        trackfd: whether a duplicate of the descriptor is kept; `size` and `resize` need it.

    Raises:
        OSError: the kernel refuses.
        OverflowError, TypeError, ValueError: an argument is out of range.

    >>> from quire.compat import mmap
    >>> with mmap.mmap(-1, 13) as m:
    ...     m.write(b"hello, world!")
    ...     m[7:12], m.find(b"world"), m[0]
    13
    (b'world', -1, 104)
    """

    __slots__ = ("_access", "_aside", "_descriptor", "_offset", "_tracks")

    _access: int
    _aside: _Aside | None
    _descriptor: int
    _offset: int
    _tracks: bool

    def __new__(
        cls,
        fileno: SupportsIndex,
        length: SupportsIndex,
        flags: SupportsIndex = MAP_SHARED,
        prot: SupportsIndex = PROT_READ | PROT_WRITE,
        access: SupportsIndex = ACCESS_DEFAULT,
        offset: SupportsIndex = 0,
        *,
        trackfd: bool = True,
    ) -> Self:
        """Maps."""
        numbers = (operator.index(number) for number in (flags, prot, access, offset))
        flags, prot, access, offset = numbers
        fileno, length = operator.index(fileno), operator.index(length)
        _check_numbers((fileno, flags, prot, access), (length, offset))
        flags, prot, access = _resolved(flags, prot, access)
        sys.audit("mmap.__new__", fileno, length, access, offset)
        length = _length(fileno, length, offset)
        if fileno == -1:
            flags |= MAP_ANONYMOUS
        anonymous = bool(flags & MAP_ANONYMOUS)
        mapping = _map(None if anonymous else fileno, length, flags, prot, offset)
        self = super().__new__(cls, mapping)
        self._access, self._offset = access, offset
        self._tracks = trackfd
        if not trackfd:
            mapping.drop_descriptor()
        self._aside = _Aside(fileno) if trackfd and fileno != -1 and anonymous else None
        self._descriptor = mapping.descriptor if self._aside is None else self._aside.descriptor
        return self

    def size(self) -> int:
        """Length of the file, which may be more than is mapped.

        Raises:
            OSError: there is none, or its descriptor is not kept.
        """
        super().tell()  # which raises if it is closed; a subclass may have its own
        _require_made(self)
        return os.fstat(self._descriptor).st_size

    def resize(self, newsize: SupportsIndex, /) -> None:  # type: ignore[override]  # as there
        """Changes how many bytes are mapped, and the length of the file to where they end.

        Raises:
            BufferError: views are alive.
            OSError: the file cannot be made so long, or the mapping.
            TypeError: it is read-only or private.
            ValueError: its descriptor is not kept.
        """
        size = operator.index(newsize)
        super().tell()
        _require_made(self)
        if not _is_ssize(size):
            raise OverflowError(TOO_LARGE)
        if super().exports:
            raise BufferError("mmap can't resize with extant pointers exported.")
        if not self._tracks:
            raise ValueError("mmap can't resize with trackfd=False.")
        if self._access not in (ACCESS_WRITE, ACCESS_DEFAULT):
            raise TypeError("mmap can't resize a readonly or copy-on-write memory map.")
        if size < 0 or size > sys.maxsize - self._offset:
            raise ValueError("new size out of range")
        if size == 0:
            _refuse(errno.EINVAL, "a mapping has at least one byte: close it instead")

        def cut() -> None:
            if self._descriptor != -1:
                os.ftruncate(self._descriptor, self._offset + size)

        try:
            super().resize(size, with_file=cut)
        except quire.Error as refused:
            raise as_system(refused) from refused

    def set_name(self, name: str, /) -> None:
        """Names anonymous memory in /proc/self/maps (Linux 5.17).

        Raises:
            OSError: the kernel refuses.
            TypeError: the name is no text.
            ValueError: it is memory of a file, or the name is too long.
        """
        if not isinstance(name, str):
            raise TypeError(f"set_name() argument must be str, not {type(name).__name__}")
        super().tell()
        _require_made(self)
        mapping = cast("quire.KernelMapping", super().mapping)
        if self._descriptor != -1 or not mapping.map_flags & MAP_ANONYMOUS:
            raise ValueError("Cannot set annotation on non-anonymous mappings")
        shown = f"cpython:mmap:{name}"
        if len(shown.encode()) > 79:
            raise ValueError("name is too long")
        try:
            mapping.name(shown)
        except quire.Error as refused:
            raise as_system(refused) from refused

    def close(self) -> None:
        """Unmaps; every later call raises `ValueError`.

        Raises:
            BufferError: views are alive.
        """
        super().close()
        self._descriptor, self._aside = -1, None

    def __enter__(self) -> Self:
        super().tell()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        mmap.close(self)  # not that of a subclass: as the standard class

    def __repr__(self) -> str:
        name = "mmap.mmap" if type(self) is mmap else type(self).__name__
        if super().closed:
            return f"<{name} closed=True>"
        if not _is_made(self):
            return super().__repr__()
        return (
            f"<{name} closed=False, access={ACCESS_NAMES[self._access]}, "
            f"length={super().__len__()}, pos={super().tell()}, offset={self._offset}>"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "cannot pickle 'mmap.mmap' object: it is memory of this process; quire.map gives "
            "mappings that pickle as a reference"
        )


def _is_made(mapped: mmap) -> bool:
    """Whether its own class made it: `MappedFile.__new__` makes one that lacks what `mmap` adds."""
    return hasattr(mapped, "_access")


def _require_made(mapped: mmap) -> None:
    if not _is_made(mapped):
        raise ValueError("mmap closed or invalid: it was not made by mmap.mmap(...)")


def _is_ssize(number: int) -> bool:
    return -sys.maxsize - 1 <= number <= sys.maxsize


def _check_numbers(ints: tuple[int, ...], sizes: tuple[int, int]) -> None:
    if not all(-C_INT_MAX - 1 <= number <= C_INT_MAX for number in ints):
        raise OverflowError("Python int too large to convert to C int")
    if not all(_is_ssize(number) for number in sizes):
        raise OverflowError(TOO_LARGE)
    if sizes[0] < 0:
        raise OverflowError("memory mapped length must be positive")
    if sizes[1] < 0:
        raise OverflowError("memory mapped offset must be positive")


def _resolved(flags: int, prot: int, access: int) -> tuple[int, int, int]:
    """Flags and protection that an access stands for, and the access that a protection allows."""
    if access == ACCESS_DEFAULT:
        if not prot & PROT_WRITE:
            access = ACCESS_READ
        elif not prot & PROT_READ:
            access = ACCESS_WRITE
        return flags, prot, access
    if flags != MAP_SHARED or prot != PROT_READ | PROT_WRITE:
        raise ValueError("mmap can't specify both access and flags, prot.")
    if access not in OF_ACCESS:
        raise ValueError("mmap invalid access parameter.")
    return *OF_ACCESS[access], access


def _length(fileno: int, length: int, offset: int) -> int:
    """The bytes to map, checked against a file's length."""
    if fileno == -1:
        found = None
    else:
        try:
            found = os.fstat(fileno)
        except OSError as failed:
            _refuse(failed.errno or errno.EBADF, os.strerror(failed.errno or errno.EBADF))
    if found is None or not stat.S_ISREG(found.st_mode):
        if length == 0:
            _refuse(errno.EINVAL, "a mapping of anonymous memory or a device needs a length")
        return length
    if length == 0:
        if found.st_size == 0:
            raise ValueError("cannot mmap an empty file")
        if offset >= found.st_size:
            raise ValueError("mmap offset is greater than file size")
        return found.st_size - offset
    if offset > found.st_size or found.st_size - offset < length:
        raise ValueError("mmap length is greater than file size")
    return length


def _map(
    fileno: int | None, length: int, flags: int, prot: int, offset: int
) -> quire.KernelMapping:
    require_addresses(length)
    kind_known = flags >= 0 and flags & MAP_TYPE in (1, 2, 3)
    if not kind_known or prot not in range(len(LETTERS)) or flags & MAP_FIXED:
        _refuse(errno.EINVAL, f"there is no mapping of flags {flags:#x} and prot {prot:#x}")
    try:
        return quire.map(
            None if fileno is None else _Named(fileno),
            length,
            flags=flags & ~(NOTHING_DONE | MAP_ANONYMOUS),
            protection=LETTERS[prot],
            offset=0 if fileno is None else offset,
        )
    except quire.Error as refused:
        raise as_system(refused) from refused


class _Named:
    """A descriptor, with the path of its file for errors."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.name = os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115 (no path to make)

    def fileno(self) -> int:
        return self._descriptor


def _refuse(number: int, message: str) -> NoReturn:
    raise OSError(number, message)


class _Aside:
    """A duplicate of the descriptor given with MAP_ANON: `size` and `resize` are of its file."""

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = os.dup(descriptor)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.descriptor)
