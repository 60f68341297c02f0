"""The blocks of shared memory that a process has mapped, and the names that say where one is."""

from __future__ import annotations

import errno
import itertools
import os
import re
import stat
from typing import TYPE_CHECKING, NamedTuple

from quire.kernel_mapping import BYTES
from quire.map_flags import protection_bits
from quire.shared_mapping import label_of, map_segment
from quire.shared_names import LOCK, is_segment

if TYPE_CHECKING:
    import quire

__all__ = ["BLOCKS", "MEMORY_FLAGS", "PLACE", "Block", "Place", "PosixBlock", "absent"]

MEMORY_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
PLACE = re.compile("psm_([0-9a-f]{6,8})_([0-9a-f]{5,8})_([0-9a-f]{10,16})")
LOOKED_AT = 2


class Place(NamedTuple):
    """Where a block is that was made without a name."""

    process: int
    descriptor: int
    inode: int

    @classmethod
    def of(cls, key: str) -> Place | None:
        """What the name says; None for any other name."""
        found = PLACE.fullmatch(key)
        return None if found is None else cls(*(int(part, 16) for part in found.groups()))

    @classmethod
    def new(cls, descriptor: int) -> str:
        """The name of a block of this process."""
        inode = os.fstat(descriptor).st_ino
        return f"psm_{BLOCKS.process:06x}_{descriptor:05x}_{inode:010x}"

    @property
    def path(self) -> str | int:
        """What to give to calls that take a path or a descriptor."""
        if self.process == BLOCKS.process:
            return self.descriptor
        return f"/proc/{self.process}/fd/{self.descriptor}"

    def require(self, key: str) -> os.stat_result:
        """What the memory is, looked at before it is opened.

        Raises:
            FileNotFoundError: it has ended, or its name was taken away.
            OSError: it is another user's.
        """
        try:
            found = os.stat(self.path)  # noqa: PTH116 (a Path would take longer than the call)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EBADF, errno.ESRCH):
                raise
            raise absent(key) from None
        if (found.st_ino, found.st_nlink) != (self.inode, 0) or is_unlinked(found):
            raise absent(key)  # whatever has this descriptor by now, it is not that memory
        return found

    def attached(self, key: str) -> quire.SharedMapping:
        """The memory, mapped.

        Raises:
            As `require`.
        """
        size = self.require(key).st_size
        path = self.path
        try:
            opened = os.dup(path) if isinstance(path, int) else os.open(path, MEMORY_FLAGS)
        except FileNotFoundError:
            raise absent(key) from None
        if os.fstat(opened).st_ino != self.inode or not is_segment(opened):
            os.close(opened)
            raise absent(key)
        return map_segment(opened, label_of(key), size, protection_bits("rw"), BYTES)

    def unlink(self, key: str) -> None:
        """Notes that the name leads there no more.

        Raises:
            As `require`.
        """
        mode = stat.S_IMODE(self.require(key).st_mode)
        os.chmod(self.path, mode | stat.S_ISVTX)  # noqa: PTH101 (or a descriptor)


def is_unlinked(found: os.stat_result) -> bool:
    """Whether the name of a block without a given one was taken away."""
    return bool(found.st_mode & stat.S_ISVTX)


def absent(key: str) -> FileNotFoundError:
    """The error of a name that leads nowhere."""
    return FileNotFoundError(
        errno.ENOENT,
        "nobody holds this shared memory: it was never made, was unlinked, or its maker has ended",
        key,
    )


class Block:
    """A block that this process has mapped: once, for all objects that show it.

    Attributes:
        name: by which it was made or attached to.
        says_place: it was made without a name.
        mapping: the memory.
        users: objects that show it; guarded by `LOCK`, as ``made`` is.
        made: this process made it, and holds it without users while its name leads to it.
    """

    __slots__ = ("made", "mapping", "name", "says_place", "users")

    def __init__(self, name: str, mapping: quire.KernelMapping, *, made: bool) -> None:
        self.name = name
        self.mapping = mapping
        self.users = 1
        self.made = made
        self.says_place = PLACE.fullmatch(name) is not None

    @property
    def named(self) -> bool:
        """Whether the name leads to it."""
        if self.says_place:
            return not is_unlinked(os.fstat(self.mapping.descriptor))
        name: str | None = self.mapping.shared_name  # type: ignore[attr-defined]
        return name is not None


class PosixBlock(Block):
    """A segment of the standard library's; mapped by each object anew, as its name may move on."""

    __slots__ = ()

    @property
    def named(self) -> bool:
        """Nothing is held for its name."""
        return False


class Blocks:
    """The blocks of this process whose names lead to them, in the order they were last looked at.

    One that this process made and another unlinked, and that nobody uses here, goes when this
    process makes or closes others, or ends.

    Guarded by the lock of the names, `shared_names.LOCK`: a finalizer may close a block while one
    is entered, or while a name is taken or given back, and blocks give names back. It is held while
    the process forks, so that a child finds the table whole.
    """

    def __init__(self) -> None:
        self._known: dict[str, Block] = {}
        self.process = os.getpid()

    def enter(self, block: Block) -> Block:
        """Adds one that was just mapped, and says which one its user has.

        That is another if a thread that mapped the same memory was quicker: the one that is here
        already; it counts as made here if either does.
        """
        with LOCK:
            known = self._known.get(block.name)
            if known is None or not known.named:
                if known is not None:
                    self._drop(known)
                self._known[block.name] = block  # `use` looks whether the name still leads to it
                return block
            if not block.named:
                return block  # unlinked by now: the name leads to the other one
            known.users += 1
            known.made |= block.made
        block.mapping.close()
        return known

    def use(self, name: str) -> Block | None:
        """The one of the name, for one more user; None where the process has none."""
        with LOCK:
            block = self._known.get(name)
            if block is None:
                return None
            if not block.named:
                self._drop(block)
                return None
            block.users += 1
            return block

    def leave(self, block: Block) -> None:
        """Ends the use of one by an object, whose own view of the memory is released.

        Raises:
            BufferError: views that were made of it are alive.
        """
        with LOCK:
            if block.mapping.exports >= block.users:
                raise BufferError("cannot close exported pointers exist")
            block.users -= 1
            if not block.users and not (block.made and self._known.get(block.name) is block):
                self._drop(block)
            for name in list(itertools.islice(self._known, LOOKED_AT)):
                other = self._known.pop(name, None)  # a finalizer may have run meanwhile
                if other is None:
                    continue
                self._known[name] = other
                if not other.users and other is not block and not other.named:
                    self._drop(other)

    def unlinked(self, name: str) -> None:
        """Lets go of the one that a name led to, unless the name leads to a new one by now."""
        with LOCK:
            block = self._known.get(name)
            if block is not None and not block.named:
                self._drop(block)

    def abandon(self, block: Block) -> None:
        """Ends the use by an object that is gone, and whose views end the memory's use."""
        with LOCK:
            block.users -= 1
            if not block.users and not block.made and self._known.get(block.name) is block:
                del self._known[block.name]

    def _drop(self, block: Block) -> None:
        """Takes it out, and closes it if no object shows it; arrays that are alive keep it."""
        if self._known.get(block.name) is block:
            del self._known[block.name]
        if not block.users and not block.mapping.exports:
            block.mapping.close()

    def inherited(self) -> None:
        """In a forked child, which made none of them."""
        self.process = os.getpid()
        for block in self._known.values():
            block.made = False
        self._known = {name: block for name, block in self._known.items() if block.users}


BLOCKS = Blocks()


os.register_at_fork(after_in_child=BLOCKS.inherited)
