"""The flusher: writes dirty pages of files to the disk by age and by number (mm/page-writeback.c).

Time passes when the caller says so (`advance`). Every `period_s` the flusher wakes. It writes files
that have been dirty for `expire_s`, each with all its dirty pages; and as long as more than
`background_percent` of memory is dirty, the file that has been dirty longest. A store that finds
more than `percent` dirty waits until it is no more than the background's share.

Simplified: the share is that of all memory (`memory_bytes` of the machine), not of what is free or
a cache; and a writer is not slowed down by degrees.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.model.errors import DiskError

if TYPE_CHECKING:
    from quire.model.file_object import FileObject
    from quire.model.physical_memory import PhysicalMemory
    from quire.model.trace import Trace

__all__ = ["Flusher"]

_FOREVER = 1 << 64


class Flusher:
    """See the module. The numbers are Linux's vm.dirty_* as they are by default."""

    def __init__(self, memory: PhysicalMemory, trace: Trace, pages: int) -> None:
        self.memory = memory
        self.trace = trace
        self.pages = pages
        """Pages of memory that the machine has."""
        self.period_s, self.expire_s = 5, 30
        self.background_percent, self.percent = 10, 20
        self.now_s = 0
        self.dirty_since: dict[FileObject, int] = {}
        """Files with dirty pages, and since when; the oldest first."""
        self._writes = False

    def advance(self, seconds: int) -> None:
        """Lets time pass."""
        end = self.now_s + seconds
        wake = self.now_s - self.now_s % self.period_s + self.period_s
        while self.dirty_since and wake <= end:
            self.now_s = wake
            self._wake()
            wake += self.period_s
        self.now_s = end

    def note(self, file: FileObject) -> None:
        """A page of the file is about to be dirty; before that, there must not be too many."""
        if not self._writes and self._exceeds(self.percent):
            self.trace.add("throttle", file=file.name)
            self._write_down()
        self.dirty_since.setdefault(file, self.now_s)

    def forget(self, file: FileObject) -> None:
        """The file has no dirty page any more."""
        self.dirty_since.pop(file, None)

    def _wake(self) -> None:
        for file, since in list(self.dirty_since.items()):
            if self.now_s - since >= self.expire_s:
                self._write(file, "age")
        if self._exceeds(self.background_percent):
            self._write_down()

    def _write_down(self) -> None:
        """Writes files until no more than the background's share is dirty, each at most once."""
        for file in list(self.dirty_since):
            if self._exceeds(self.background_percent):
                self._write(file, "share")

    def _write(self, file: FileObject, by: str) -> None:
        """Writes a file. What cannot be written stays dirty and is tried when it is old again."""
        if not any(page.dirty for page in file.pages.values()):
            self.forget(file)  # what was dirty has been evicted, or is gone
            return
        self.trace.add("flush", file=file.name, by=by)
        self._writes = True
        try:
            file.sync(0, _FOREVER)
        except DiskError as error:
            self.trace.add("disk error", errno=error.errno)
            self.forget(file)
            self.dirty_since[file] = self.now_s
        finally:
            self._writes = False

    def _exceeds(self, percent: int) -> bool:
        """Whether more than a share of memory, and more than one page, is dirty pages of files."""
        most = max(1, self.pages * percent // 100)
        if self.memory.used() <= most:
            return False  # so many there cannot be: nothing need be counted
        pages = (page for page in self.memory.pages if page is not None and page.dirty)
        owners = (page.owner for page in pages)
        return sum(owner is not None and owner.backing is not None for owner in owners) > most
