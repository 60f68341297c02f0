"""What open(2) gives: an open file description, of whatever kind of file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.model.errors import CallError, as_call_error
from quire.model.file_object import FileObject

if TYPE_CHECKING:
    from quire.model.memory_object import MemoryObject

__all__ = ["OpenFile"]


@dataclass(eq=False)
class OpenFile:
    """An open file description: what was opened and for what. Two opens make two of them.

    `kind` is "regular", "zero" (/dev/zero), "device" (of a driver), "hugetlb" (the pool of huge
    pages), "pipe", "directory" or "stream" (a character device without mmap, such as /dev/random).
    """

    name: str
    kind: str
    object: MemoryObject | None = None
    readable: bool = True
    writable: bool = True
    appends: bool = False
    only_path: bool = False
    fill: int = 0
    """Bytes in the last page of a pipe; 0 when it is empty."""

    @property
    def mappable(self) -> bool:
        """Whether the file has an mmap operation."""
        return self.kind in ("regular", "zero", "device", "hugetlb")

    @property
    def executable(self) -> bool:
        """Whether its file system lets programs be run from it: that of pipes does not."""
        return self.kind != "pipe"

    @property
    def on_disk(self) -> bool:
        """Whether it lies in a disk file system."""
        return self.object is not None and self.object.backing is not None

    def regular(self) -> FileObject:
        """The file itself.

        Raises:
            CallError: EINVAL, this is no regular file.
        """
        if not isinstance(self.object, FileObject):
            raise CallError("EINVAL", f"{self.name} is no file")
        return self.object

    @property
    def size(self) -> int:
        """Bytes in it (fstat); 0 of what is no regular file."""
        return self.object.size if isinstance(self.object, FileObject) else 0

    def pread(self, count: int, offset: int) -> bytes:
        """Reads at an offset."""
        self.check_access(offset, self.readable, "read")
        if self.kind == "directory":
            raise CallError("EISDIR", f"{self.name} is a directory")
        if self.kind == "zero":
            return bytes(count)
        return self.regular().read(offset, count)

    def pwrite(self, content: bytes, offset: int) -> int:
        """Writes at an offset; with O_APPEND at the end, as Linux does."""
        self.check_access(offset, self.writable, "write")
        if self.kind == "zero" or not content:
            return len(content)
        target = self.regular()
        return target.write(target.size if self.appends else offset, content)

    def check_access(self, offset: int, allowed: bool, what: str) -> None:
        """What pread and pwrite ask before they look at the bytes.

        Raises:
            CallError: EINVAL, EBADF, ESPIPE, in this order.
        """
        if offset < 0:
            raise CallError("EINVAL", "a negative offset")
        if self.only_path:
            raise CallError("EBADF", "an O_PATH descriptor")
        if self.kind == "pipe":
            raise CallError("ESPIPE", "a pipe has no offsets")
        if not allowed:
            raise CallError("EBADF", f"the descriptor cannot {what}")

    def ftruncate(self, size: int) -> None:
        """Sets the size."""
        if size < 0:
            raise CallError("EINVAL", "a negative size")
        if self.only_path:
            raise CallError("EBADF", "an O_PATH descriptor")
        if not self.writable:
            raise CallError("EINVAL", "the descriptor cannot write")
        self.regular().truncate(size)

    def punch(self, offset: int, count: int) -> None:
        """fallocate(2) with FALLOC_FL_PUNCH_HOLE|FALLOC_FL_KEEP_SIZE."""
        if self.only_path:
            raise CallError("EBADF", "an O_PATH descriptor")
        if offset < 0 or count <= 0:
            raise CallError("EINVAL", "a hole needs a place and a length")
        if not self.writable:
            raise CallError("EBADF", "the descriptor cannot write")
        if self.kind != "regular":
            raise CallError(
                "ESPIPE" if self.kind == "pipe" else "ENODEV", f"{self.name} has no holes"
            )
        if offset + count > self.regular().largest:
            raise CallError("EFBIG", "beyond what a file can be")
        self.regular().punch(offset, count)

    def add_seals(self, names: set[str]) -> None:
        """fcntl(F_ADD_SEALS)."""
        if self.only_path:
            raise CallError("EBADF", "an O_PATH descriptor")
        if not self.writable:
            raise CallError("EPERM", "the descriptor cannot write")
        self.regular().add_seals(names)

    @as_call_error()
    def fsync(self) -> None:
        """Writes all dirty pages to the disk.

        Raises:
            CallError: EIO, some of them could not be written.
        """
        target = self.regular()
        target.sync(0, target.page_count() + 1)
