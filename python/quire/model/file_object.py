"""A file as a memory object: its page cache, shared by every mapping and by read() and write().

Kinds, by what lies behind:

- on a disk (like ext4): pages are read when needed; dirty ones are written by msync and fsync or
  before eviction;
- without a disk (like shmem: memfd, tmpfs, shared anonymous memory): the pages are the file.

The last page of a file is whole: bytes past the end may be stored there and are seen by other
mappings, but never by read(), and they must not appear when the file grows (POSIX mmap(): "effects
on the contents of bytes beyond the end are undefined"). A disk file system clears them when the
page is written and when the file grows. shmem does neither (`keeps_tail`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.model.errors import CallError, DiskError, ModelError, OutOfMemory, as_call_error
from quire.model.memory_object import MemoryObject
from quire.model.page import Page

if TYPE_CHECKING:
    from quire.model.disk import DiskFile
    from quire.model.pageout import Pageout

__all__ = ["SEALS", "FileObject"]

SEALS = {"SEAL": 1, "SHRINK": 2, "GROW": 4, "WRITE": 8, "FUTURE_WRITE": 16}
_FOREVER = 1 << 64


class FileObject(MemoryObject):
    """See the module. `size` is the size in bytes; seals are those of memfd_create(2)."""

    def __init__(
        self, pageout: Pageout, name: str, size: int = 0, backing: DiskFile | None = None
    ) -> None:
        super().__init__(pageout, name)
        self.size = size
        self.backing = backing
        self.seals: set[str] = set()
        self.linked = True
        self.page_size = pageout.memory.frame_size

    @property
    def keeps_tail(self) -> bool:
        """Whether bytes stored past the end survive growth."""
        return self.backing is None

    @property
    def largest(self) -> int:
        """The size that a file cannot exceed: on a disk, block numbers have 32 bits."""
        on_disk = (1 << 44) - self.page_size
        return (1 << 63) - 1 if self.backing is None else on_disk

    @property
    def sealable(self) -> bool:
        """Whether F_ADD_SEALS is known to its file system."""
        return self.backing is None

    @property
    def write_sealed(self) -> bool:
        """Whether no new shared mapping may write, nor write()."""
        return bool({"WRITE", "FUTURE_WRITE"} & self.seals)

    # What a memory object does.

    def page_count(self) -> int:
        """Pages up to the one that holds the last byte."""
        return -(-self.size // self.page_size)

    def page(self, index: int) -> Page:
        """The cached page at `index`; read from the disk or made of zeros if it is not there."""
        page = self.pages.get(index)
        if page is None:
            content = self.backing.read(index) if self.backing is not None else None
            page = Page(self, index)
            frame = self.pageout.allocate(page)
            self.pages[index] = page
            if content is not None:
                self.pageout.memory.frames[frame][:] = content
        self.pageout.bring_in(page)
        return page

    def before_store(self, page: Page) -> None:
        """Reserves the page's block, so that a full disk is found now and not after the store."""
        if self.backing is not None:
            self.pageout.flusher.note(self)
            self.backing.reserve(page.index)
        page.dirty = True

    def page_out(self, page: Page) -> None:
        """Writes a dirty page whole, stores past the end included: eviction must not be seen."""
        assert self.backing is not None
        assert page.frame is not None
        if page.dirty:
            self.backing.write(page.index, bytes(self.pageout.memory.frames[page.frame]))
        page.dirty = False
        del self.pages[page.index]

    def sync(self, first: int, last: int) -> None:
        """Writes dirty pages `[first, last)`; they are read-only again: the next store is seen.

        Raises:
            DiskError: a block cannot be written; its page stays dirty, and the others are written.
        """
        if self.backing is None:
            return
        end_page = self.size // self.page_size
        if first <= end_page < last:
            self._zero(self.size, (end_page + 1) * self.page_size)
        refused = None
        for index in sorted(i for i in self.pages if first <= i < last):
            try:
                self._clean(self.pages[index], self.backing)
            except DiskError as error:
                refused = refused or error
        if refused is not None:
            raise refused
        if not any(page.dirty for page in self.pages.values()):
            self.pageout.flusher.forget(self)

    def unmapped(self) -> None:
        """Memory that has lost its name and its last mapping ends."""
        if not self.mappers and not self.linked:
            self._drop_from(0)
            if self.backing is not None:
                self.backing.discard(0)

    # read(), write() and their kin.

    @as_call_error()
    def read(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes at `offset`; fewer at the end of the file, or before a bad block.

        Raises:
            CallError: EIO or ENOMEM, when not one byte could be read.
        """
        parts: list[bytes] = []
        end = min(offset + count, self.size)
        while offset < end:
            index, inside = divmod(offset, self.page_size)
            self._note_hit(index)
            try:
                page = self.page(index)
            except (DiskError, OutOfMemory):
                if parts:
                    break
                raise
            self.pageout.mark_accessed(page)
            content = self.pageout.content(page)
            parts.append(content[inside : inside + end - offset])
            offset += len(parts[-1])
        return b"".join(parts)

    @as_call_error()
    def write(self, offset: int, content: bytes) -> int:
        """Stores bytes through the page cache, growing the file; says how many.

        Raises:
            CallError: EPERM for a seal; ENOSPC, EIO or ENOMEM, when no byte could be written.
        """
        self._refuse_sealed(0)
        if offset >= self.largest:
            raise CallError("EFBIG", "beyond what a file can be")
        content = content[: self.largest - offset]
        if content and offset > self.size:
            self._expose(self.size, offset)  # what is written over needs no clearing
        done = 0
        while done < len(content):
            index, inside = divmod(offset + done, self.page_size)
            part = content[done : done + self.page_size - inside]
            try:
                self._write_part(index, inside, part)
            except ModelError:
                if done:
                    break
                raise
            done += len(part)
        return done

    @as_call_error()
    def write_failed(self, offset: int, count: int) -> None:
        """A write whose buffer could not be read: the size was set before the copy failed.

        Raises:
            CallError: EPERM for a seal.
        """
        self._refuse_sealed(offset + count)
        if offset > self.size:
            self._expose(self.size, offset)
            self.size = offset

    @as_call_error()
    def truncate(self, size: int) -> None:
        """Sets the size. What lies wholly past a new end is gone, private copies included.

        Raises:
            CallError: EPERM for a seal; EIO, the last page cannot be read (the size is set).
        """
        if size < self.size and "SHRINK" in self.seals:
            raise CallError("EPERM", "the file is sealed against shrinking")
        if size > self.size and "GROW" in self.seals:
            raise CallError("EPERM", "the file is sealed against growing")
        if size > self.largest:
            raise CallError("EFBIG", "longer than a file can be")
        old, self.size = self.size, size
        if size <= old:  # the same size clears what was stored past the end, too
            first = self.page_count()
            self._invalidate(first, _FOREVER, even_private=True)
            self._drop_from(first)
            if self.backing is not None:
                self.backing.discard(first)
            self._zero(size, first * self.page_size)
        else:
            self._expose(old, _page_end(old, self.page_size))

    @as_call_error()
    def punch(self, offset: int, count: int) -> None:
        """Makes a hole: zeros, and its blocks are free. Private copies are not touched.

        Raises:
            CallError: EPERM for a seal; EIO, a page at its edge cannot be read.
        """
        self._refuse_sealed(0)
        end = offset + count
        if self.backing is not None:
            if offset >= self.size:
                return
            if end >= self.size:
                end = _page_end(self.size, self.page_size)
        first, last = -(-offset // self.page_size), end // self.page_size
        if first > last:
            self._zero(offset, end)
            return
        self._zero(offset, first * self.page_size)
        self._zero(last * self.page_size, end)
        self._invalidate(first, last, even_private=False)
        for index in [i for i in self.pages if first <= i < last]:
            self.drop(index)
        if self.backing is not None:
            self.backing.discard(first, last)

    def add_seals(self, names: set[str]) -> None:
        """fcntl(F_ADD_SEALS).

        Raises:
            CallError: as fcntl(2) says.
        """
        if not self.sealable:
            raise CallError("EINVAL", "the file system knows no seals")
        if "SEAL" in self.seals:
            raise CallError("EPERM", "F_SEAL_SEAL forbids more seals")
        if "WRITE" in names - self.seals and self.mapped_for_writing():
            raise CallError("EBUSY", "a shared mapping may write it")
        self.seals |= names

    def mapped_for_writing(self) -> bool:
        """Whether a shared mapping may ever store into it."""
        return any(space.may_write(self) for space in self.mappers)

    def _write_part(self, index: int, inside: int, part: bytes) -> None:
        end = index * self.page_size + inside + len(part)
        self._refuse_sealed(end)
        self._note_hit(index)
        page = self.page(index)
        self.before_store(page)
        self.pageout.mark_accessed(page)
        assert page.frame is not None
        self.pageout.memory.frames[page.frame][inside : inside + len(part)] = part
        self.size = max(self.size, end)

    def _note_hit(self, index: int) -> None:
        """A call finds a page in the cache; otherwise a frame, or disk I/O, is seen."""
        if self.resident(index):
            self.pageout.trace.add("cache hit", file=self.name, page=index)

    def _refuse_sealed(self, end: int) -> None:
        """Refuses a store by a call, or one that ends beyond the size, if a seal forbids it."""
        if self.write_sealed:
            raise CallError("EPERM", "the file is sealed against writing")
        if end > self.size and "GROW" in self.seals:
            raise CallError("EPERM", "the file is sealed against growing")

    def _expose(self, old: int, new: int) -> None:
        """The file grows: what was stored past the old end must not appear."""
        if not self.keeps_tail:
            self._zero(old, min(new, _page_end(old, self.page_size)))

    def _zero(self, start: int, end: int) -> None:
        """Clears bytes `[start, end)` of one page; what is zeros already stays clean."""
        index, inside, count = start // self.page_size, start % self.page_size, end - start
        if count <= 0 or not any(self._peek(index)[inside : inside + count]):
            return
        page = self.page(index)
        self.before_store(page)
        assert page.frame is not None
        self.pageout.memory.frames[page.frame][inside : inside + count] = bytes(count)

    def _peek(self, index: int) -> bytes:
        """What a page holds. Simplified: a block on the disk is looked at without reading it."""
        if index in self.pages:
            return self.pageout.content(self.pages[index])
        return (self.backing is not None and self.backing.blocks.get(index)) or b""

    def _clean(self, page: Page, backing: DiskFile) -> None:
        """Writes a page if it is dirty."""
        if page.dirty:
            for space, number in list(page.mappings):
                space.protect_translation(number)
            backing.write(page.index, self.pageout.content(page))
            page.dirty = False

    def _drop_from(self, first: int) -> None:
        for index in [i for i in self.pages if i >= first]:
            self.drop(index)

    def _invalidate(self, first: int, last: int, *, even_private: bool) -> None:
        for space in list(self.mappers):
            space.invalidate(self, first, last, even_private)


def _page_end(offset: int, page_size: int) -> int:
    """The end of the page that holds the byte before `offset`."""
    return -(-offset // page_size) * page_size
