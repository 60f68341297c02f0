"""`SharedMemory` and `ShareableList` with the interface of `multiprocessing.shared_memory`.

A block is a segment of `quire.shared`: sealed memory that the kernel frees with the last process
that holds it, killed or not. There is no resource tracker; who attaches never deletes.

```
who                          holds the block until
the process that made it     `unlink` by anyone, or its own end
a process that attached      `close`, or its own end
```

A block made without a name gets one that says where it is, ``psm_PROCESS_DESCRIPTOR_INODE`` in
hexadecimal: no file stands for it, and whoever attaches opens that descriptor through /proc. Such
a name ends with the process that made the block, and by `unlink`, which any process notes in the
mode of the memory itself (S_ISVTX). A name that was given is one of `quire.shared`, and leads to
the block as long as any process holds it. Segments of the standard library's class, files in
/dev/shm, are attached to as well.

Private names that programs are known to replace or read (`_make_filename`, `_SHM_NAME_PREFIX`,
`_USE_POSIX`, and of the class `_name`, `_flags`, `_mode`) mean what they mean there.
"""

from __future__ import annotations

import errno
import operator
import os
import secrets
import struct
import sys
from functools import partial
from types import GenericAlias
from typing import TYPE_CHECKING, Any

import quire
from quire.compat.shared_blocks import (
    BLOCKS,
    MEMORY_FLAGS,
    PLACE,
    Block,
    Place,
    PosixBlock,
    absent,
)
from quire.compat.system_errors import as_system, require_addresses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import ClassVar, TypeAlias

    Item: TypeAlias = "int | float | bool | str | bytes | None"

__all__ = ["ShareableList", "SharedMemory"]

_USE_POSIX = True
_O_CREX = os.O_CREAT | os.O_EXCL
_SHM_NAME_PREFIX = "/psm_"

POSIX_FOLDER = "/dev/shm"  # noqa: S108 (where shm_open(3) has its segments)
POSIX_FLAGS = MEMORY_FLAGS | os.O_NOFOLLOW
NAME_RANDOM_BYTES = 8
NAME_BYTES_REFUSED = 201


def _make_filename(segment: quire.SharedMapping | None = None) -> str:
    """A name that nobody else has: of the segment, where it is."""
    if segment is None:
        return _SHM_NAME_PREFIX + secrets.token_hex(NAME_RANDOM_BYTES)
    return f"/{Place.new(segment.fileno())}"


class SharedMemory:
    """A block of memory that processes share under a name.

    Args:
        name: what others attach by; None, with ``create``, for one that nobody has.
        create: makes a new block; else attaches to the one of that name.
        size: bytes of a new block; all processes see exactly that many.
        track: accepted for the sake of programs that pass it. Nothing is tracked.

    Raises:
        FileExistsError: ``create``, and the name is held.
        FileNotFoundError: nobody holds the name, and there is no POSIX segment of it.
        ValueError: no size or no name where one is needed; a name with a NUL character.
        OverflowError, TypeError: the size is no number of bytes.
        OSError: the name cannot be one, or the system refuses.

    >>> block = SharedMemory(create=True, size=5)
    >>> block.buf[:] = b"hello"
    >>> same = SharedMemory(block.name)
    >>> bytes(same.buf), same.size
    (b'hello', 5)
    >>> same.close()
    >>> block.close()
    >>> block.unlink()
    """

    _name: str | None = None
    _block: Block | None = None
    _buf: memoryview | None = None
    _flags = os.O_RDWR
    _mode = 0o600
    _track = True
    _prepend_leading_slash: ClassVar[bool] = True

    def __init__(
        self, name: str | None = None, create: bool = False, size: int = 0, *, track: bool = True
    ) -> None:
        if not size >= 0:
            raise ValueError("'size' must be a positive integer")
        if create:
            self._flags = _O_CREX | os.O_RDWR
            if size == 0:
                raise ValueError("'size' must be a positive number different from zero")
        if name is None and not self._flags & os.O_EXCL:
            raise ValueError("'name' can only be None if create=True")
        if name is not None and "\0" in name:
            raise ValueError("embedded null character")
        self._track = track
        try:
            block = self._made(size) if name is None else self._opened(name.lstrip("/"), size)
        except quire.Error as refused:
            raise as_system(refused, name) from refused
        self._block = block
        self._name = f"/{name or block.name}"
        self._size = block.mapping.size_bytes
        self._buf = memoryview(block.mapping)

    def _made(self, size: int) -> Block:
        segment = quire.shared(None, _checked_size(size), permissions=self._mode & 0o666)
        name = _make_filename(segment).lstrip("/")
        if PLACE.fullmatch(name):
            return BLOCKS.enter(Block(name, segment, made=True))
        while True:  # names of somebody else's `_make_filename`
            try:
                return self._created(name, size)
            except FileExistsError:
                name = _make_filename().lstrip("/")

    def _opened(self, key: str, size: int) -> Block:
        """As the flags say: of shm_open(3), of which a subclass may have its own."""
        if self._flags & os.O_EXCL:
            if key and (_is_posix(key) or PLACE.fullmatch(key)):
                raise FileExistsError(
                    errno.EEXIST,
                    "a POSIX segment has this name, or it is of a form that quire gives",
                    key,
                )
            return self._created(key, size)
        try:
            return BLOCKS.use(key) or _attached(key)
        except FileNotFoundError:
            if not self._flags & os.O_CREAT or not size:
                raise
        return self._created(key, size)

    def _created(self, key: str, size: int) -> Block:
        size = _checked_size(size)
        try:
            made = quire.shared(key, size, create=True, permissions=self._mode & 0o666)
        except (quire.SourceError, ValueError) as error:
            raise _system_error(error, key) from error
        return BLOCKS.enter(Block(key, made, made=True))

    @property
    def buf(self) -> memoryview | None:
        """The bytes; None once it is closed."""
        return self._buf

    @property
    def name(self) -> str:
        """By which others attach."""
        return (self._name or "").removeprefix("/")

    @property
    def size(self) -> int:
        """Bytes, the same in every process."""
        return self._size

    @property
    def _fd(self) -> int:
        """The descriptor of the memory; -1 once it is closed."""
        return -1 if self._block is None else self._block.mapping.descriptor

    @property
    def _mmap(self) -> quire.KernelMapping | None:
        """What is mapped; None once it is closed."""
        return None if self._block is None else self._block.mapping

    def close(self) -> None:
        """Gives up this view of the memory, and does nothing the second time.

        The process that made a block holds it until it is unlinked; any other gives it up, and the
        last ends it.

        Raises:
            BufferError: other views of the memory are alive, arrays for instance.
        """
        buffer = self._buf
        if buffer is not None:
            buffer.release()
            self._buf = None
        if self._block is not None:
            BLOCKS.leave(self._block)
            self._block = None

    def unlink(self) -> None:
        """Takes the name away; the memory ends with the last who has it mapped.

        Raises:
            FileNotFoundError: nobody holds the name, by now.
        """
        if not self._name:
            return
        key = self._name.lstrip("/")
        place = Place.of(key)
        if place is not None:
            place.unlink(key)
        else:
            _unlink_named(key)
        BLOCKS.unlinked(key)

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if is_finalizing():
            return  # the process gives up all it has
        try:
            self.close()
        except BufferError:  # arrays keep their memory
            if self._block is not None:
                BLOCKS.abandon(self._block)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles its name; the bytes stay where they are."""
        return self.__class__, (self.name, False, self.size)

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({self.name!r}, size={self.size})"


class ShareableList:
    """A list of fixed length, in shared memory, of int, float, bool, str, bytes and None.

    An item may be replaced by one of another type that needs no more room; str and bytes have room
    for what they had at first, rounded up to 8 bytes. As in the standard library, whose bytes these
    are as well, NUL bytes at the end of a str or bytes are not kept.

    ```
    offset 0            number of items N, as all numbers a signed integer of 8 bytes
           8            N + 1 offsets, in the data, of the items and of the end
           8 * (N + 2)  the data
           .            N formats of `struct`, of 8 bytes
           .            N bytes: 0 a number, 1 str, 2 bytes, 3 None
    ```

    Args:
        sequence: items of a new list; none with ``name``: attaches to a list that is there.
        name: of its `SharedMemory`, which is its ``shm``.

    >>> ours = ShareableList(["howdy", 42, None])
    >>> theirs = ShareableList(name=ours.shm.name)
    >>> theirs[1] = 43
    >>> list(ours)
    ['howdy', 43, None]
    >>> theirs.shm.close()
    >>> ours.shm.close()
    >>> ours.shm.unlink()
    """

    _alignment: ClassVar[int] = 8
    _formats: ClassVar[dict[type, str]] = {
        int: "q",
        float: "d",
        bool: "xxxxxxx?",
        type(None): "xxxxxx?x",
    }
    _back_transforms: ClassVar[tuple[Callable[[Any], Any], ...]] = (
        lambda value: value,
        lambda value: value.rstrip(b"\0").decode(),
        lambda value: value.rstrip(b"\0"),
        lambda _: None,
    )

    shm: SharedMemory
    _list_len: int
    _allocated_offsets: list[int]

    def __init__(self, sequence: Iterable[Item] | None = None, *, name: str | None = None) -> None:
        if name is None or sequence is not None:
            self._make(list(sequence or ()), name)
            return
        self.shm = SharedMemory(name)
        self._list_len = len(self)
        self._allocated_offsets = list(self._unpack("q" * (self._list_len + 1), 8))

    def _make(self, items: list[Item], name: str | None) -> None:
        formats = [self._format_of(item) for item in items]
        self._list_len = len(items)
        self._allocated_offsets = [0]
        for one in formats:
            room = int(one[:-1]) if one[-1] == "s" else self._alignment
            self._allocated_offsets.append(self._allocated_offsets[-1] + room)
        codes = [_code_of(item) for item in items]
        size = self._offset_back_transform_codes + len(items)
        self.shm = SharedMemory(name, create=True, size=size)
        self._pack("q" * (len(items) + 2), 0, len(items), *self._allocated_offsets)
        self._pack("".join(formats), self._offset_data_start, *map(_encoded, items))
        self._pack("8s" * len(items), self._offset_packing_formats, *map(_encoded, formats))
        self._pack("b" * len(items), self._offset_back_transform_codes, *codes)

    def _format_of(self, item: Item) -> str:
        if isinstance(item, (str, bytes)):
            # As much as in the standard library, which counts characters; and enough.
            units = max(
                len(item) // self._alignment + 1, -(-len(_encoded(item)) // self._alignment)
            )
            return f"{self._alignment * units}s"
        return self._formats[type(item)]

    def _pack(self, form: str, offset: int, *values: object) -> None:
        assert self.shm.buf is not None, "the list's shared memory is closed"
        struct.pack_into(form, self.shm.buf, offset, *values)

    def _unpack(self, form: str, offset: int) -> tuple[Any, ...]:
        assert self.shm.buf is not None, "the list's shared memory is closed"
        return struct.unpack_from(form, self.shm.buf, offset)

    def _place(self, position: int, what: str) -> int:
        """The position, counted from the first item."""
        found = position if position >= 0 else position + self._list_len
        if not 0 <= found < self._list_len:
            raise IndexError(what)
        return found

    def _get_packing_format(self, position: int) -> str:
        place = self._place(position, "Requested position out of range.")
        (form,) = self._unpack("8s", self._offset_packing_formats + 8 * place)
        text: str = form.rstrip(b"\0").decode()
        return text

    def __getitem__(self, position: int) -> Any:
        place = self._place(position, "index out of range")
        (code,) = self._unpack("b", self._offset_back_transform_codes + place)
        at = self._offset_data_start + self._allocated_offsets[place]
        (value,) = self._unpack(self._get_packing_format(place), at)
        return self._back_transforms[code](value)

    def __setitem__(self, position: int, value: Item) -> None:
        place = self._place(position, "assignment index out of range")
        start, end = self._allocated_offsets[place : place + 2]
        encoded = _encoded(value)
        if isinstance(encoded, bytes):
            if len(encoded) > end - start:
                raise ValueError("bytes/str item exceeds available storage")
            current = self._get_packing_format(place)
            form = current if current[-1] == "s" else f"{end - start}s"
        else:
            form = self._formats[type(value)]
        self._pack(form, self._offset_data_start + start, encoded)
        self._pack("8s", self._offset_packing_formats + 8 * place, form.encode())
        self._pack("b", self._offset_back_transform_codes + place, _code_of(value))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the name of its memory."""
        return partial(self.__class__, name=self.shm.name), ()

    def __len__(self) -> int:
        return int(self._unpack("q", 0)[0])

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(self._list_len))

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({list(self)}, name={self.shm.name!r})"

    @property
    def format(self) -> str:
        """The format of `struct` of all items."""
        return "".join(self._get_packing_format(place) for place in range(self._list_len))

    @property
    def _offset_data_start(self) -> int:
        return (self._list_len + 2) * 8

    @property
    def _offset_packing_formats(self) -> int:
        return self._offset_data_start + self._allocated_offsets[-1]

    @property
    def _offset_back_transform_codes(self) -> int:
        return self._offset_packing_formats + self._list_len * 8

    def count(self, value: object) -> int:
        """How many items equal ``value``."""
        return sum(value == one for one in self)

    def index(self, value: object) -> int:
        """The first position of an item that equals ``value``.

        Raises:
            ValueError: there is none.
        """
        for place, one in enumerate(self):
            if value == one:
                return place
        raise ValueError(f"{value!r} not in this container")

    __class_getitem__: ClassVar[Any] = classmethod(GenericAlias)


def _code_of(item: Item) -> int:
    """How an item is got back from what `struct` unpacks."""
    return (
        1
        if isinstance(item, str)
        else 2
        if isinstance(item, bytes)
        else 0
        if item is not None
        else 3
    )


def _encoded(item: Item) -> Any:
    return item.encode() if isinstance(item, str) else item


def _checked_size(size: int) -> int:
    number = int(operator.index(size))  # which True is one
    require_addresses(number)
    return number


def _is_posix(key: str) -> bool:
    """Whether anything has the name where POSIX segments are."""
    return os.access(f"{POSIX_FOLDER}/{key}", os.F_OK, follow_symlinks=False)


def _unlink_named(key: str) -> None:
    try:
        quire.unlink(key)
    except quire.SourceError as error:
        if error.errno != errno.ENOENT:
            raise _system_error(error, key) from error
        os.unlink(f"{POSIX_FOLDER}/{key}")  # noqa: PTH108 (its error is the answer)


def _attached(key: str) -> Block:
    """The block of quire's that has the name, or else the POSIX segment."""
    place = Place.of(key)
    if place is not None:
        return BLOCKS.enter(Block(key, place.attached(key), made=False))
    try:
        return BLOCKS.enter(Block(key, quire.shared(key, create=False), made=False))
    except (quire.SourceError, ValueError) as error:
        found = _system_error(error, key)
        if not isinstance(found, FileNotFoundError):
            raise found from error
    try:
        descriptor = os.open(f"{POSIX_FOLDER}/{key}", POSIX_FLAGS)
    except FileNotFoundError:
        raise absent(key) from None
    try:
        if os.fstat(descriptor).st_size == 0:
            raise ValueError(f"the POSIX segment {key!r} is empty: nothing can be mapped")
        mapping = quire.map(descriptor, sharing="shared", protection="rw")
    finally:
        os.close(descriptor)
    return PosixBlock(key, mapping, made=False)


def _system_error(error: quire.Error | ValueError, key: str) -> Exception:
    """What shm_open(3) fails with, where quire says the same by an error of its own."""
    if isinstance(error, quire.Error):
        return as_system(error, key)
    number = errno.EINVAL if len(os.fsencode(key)) < NAME_BYTES_REFUSED else errno.ENAMETOOLONG
    return OSError(number, str(error), key)
