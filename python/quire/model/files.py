"""What open(2) gives:

an open file description, and the kinds of file that are not memory objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.model.errors import CallError
from quire.model.file_object import FileObject

if TYPE_CHECKING:
    from quire.model.memory_object import MemoryObject

__all__ = ["OpenFile"]


@dataclass(eq=False)
class OpenFile:
    """An open file description: what was opened and for what. Two opens make two of them.

    `kind` is "regular", "zero" (/dev/zero), "device" (of a driver), "pipe", "directory" or "stream"
    (a character device without mmap, such as /dev/random).
    """

    name: str
    kind: str
    object: MemoryObject | None = None
    readable: bool = True
    writable: bool = True
    appends: bool = False
    only_path: bool = False

    @property
    def mappable(self) -> bool:
        """Whether the file has an mmap operation."""
        return self.kind in ("regular", "zero", "device")

    @property
    def on_disk(self) -> bool:
        """Whether it lies in a disk file system."""
        return self.object is not None and self.object.backing is not None

    def regular(self) -> FileObject:
        """The file itself.

        Raises:
            CallError: EINVAL, this is no regular file.
        """
        if not isinstance(self.object, FileObject) or self.only_path:
            errno = "EISDIR" if self.kind == "directory" else "EINVAL"
            raise CallError("EBADF" if self.only_path else errno, f"{self.name} is no file")
        return self.object

    @property
    def size(self) -> int:
        """Bytes in it (fstat); 0 of what is no regular file."""
        return self.object.size if isinstance(self.object, FileObject) else 0

    def pread(self, count: int, offset: int) -> bytes:
        """Reads at an offset."""
        if not self.readable or self.only_path:
            raise CallError("EBADF", "the descriptor cannot read")
        if self.kind == "zero":
            return bytes(count)
        return self.regular().read(offset, count)

    def pwrite(self, content: bytes, offset: int) -> int:
        """Writes at an offset; with O_APPEND at the end, as Linux does."""
        if not self.writable or self.only_path:
            raise CallError("EBADF", "the descriptor cannot write")
        if self.kind == "zero":
            return len(content)
        target = self.regular()
        return target.write(target.size if self.appends else offset, content)

    def ftruncate(self, size: int) -> None:
        """Sets the size."""
        if self.only_path:
            raise CallError("EBADF", "an O_PATH descriptor")
        if size < 0:
            raise CallError("EINVAL", "a negative size")
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
            raise CallError("ENODEV", f"{self.name} has no holes")
        self.regular().punch(offset, count)

    def fsync(self) -> None:
        """Writes all dirty pages to the disk."""
        target = self.regular()
        target.sync(0, target.page_count() + 1)
