"""A memory object: what can be mapped. It owns pages; several address spaces may show them.

`FileObject` (files, shared memory) and `DeviceObject` are its kinds. The seam is narrow: downwards
`page(index)` gives a page in memory; upwards `Mapper.invalidate` takes translations away when the
object changes under them (gVisor's `Mappable` and `MappingSpace`; Mach's memory objects).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.model.disk import DiskFile
    from quire.model.page import Mapper, Page
    from quire.model.pageout import Pageout

__all__ = ["MemoryObject"]


class MemoryObject:
    """Pages by index, and who maps them. Subclasses say where content comes from.

    `backing` is the file on disk that pages are read from and written to; without one they go to
    swap.
    """

    backing: DiskFile | None = None
    volatile = False
    """Whether a translation holds for one access only (devices)."""
    promised = 0
    """Pages promised to all who map it, until it ends."""

    def __init__(self, pageout: Pageout, name: str) -> None:
        self.pageout = pageout
        self.name = name
        self.pages: dict[int, Page] = {}
        self.mappers: dict[Mapper, int] = {}

    @property
    def swap_backed(self) -> bool:
        """Whether evicted pages go to swap."""
        return self.backing is None

    def finish(self, page: Page) -> None:
        """An access to a page of a volatile object is over."""

    def attach(self, space: Mapper) -> None:
        """A VMA of `space` shows the object."""
        self.mappers[space] = self.mappers.get(space, 0) + 1

    def detach(self, space: Mapper) -> None:
        """One VMA less."""
        self.mappers[space] -= 1
        if not self.mappers[space]:
            del self.mappers[space]

    def unmapped(self) -> None:
        """The last VMA that showed the object may be gone: an object without a name ends then."""

    def page_count(self) -> int:
        """Pages that may be touched now; beyond them is SIGBUS."""
        raise NotImplementedError

    def page(self, index: int) -> Page:
        """The page at `index`, in memory.

        Raises:
            DiskError: it cannot be read.
            OutOfMemory: there is no frame for it.
        """
        raise NotImplementedError

    def before_store(self, page: Page) -> None:
        """A translation is about to let stores pass (`page_mkwrite`).

        Raises:
            DiskError: ENOSPC, there is no block for the page.
        """
        page.dirty = True

    def page_out(self, page: Page) -> None:
        """Saves a page whose frame is about to be taken."""
        raise NotImplementedError

    def sync(self, first: int, last: int) -> None:
        """Writes pages `[first, last)` to the disk (msync, fsync)."""

    def resident(self, index: int) -> bool:
        """Whether a page is in memory, whoever brought it there (mincore)."""
        page = self.pages.get(index)
        return page is not None and page.frame is not None

    def drop(self, index: int) -> None:
        """Ends one page."""
        page = self.pages.pop(index, None)
        if page is not None:
            for space, number in list(page.mappings):
                space.forget_translation(number)
            self.pageout.free(page)
