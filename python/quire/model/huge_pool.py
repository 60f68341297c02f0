"""The pool of huge pages (hugetlb): frames set aside in whole blocks, and promised to mappings.

mmap promises a mapping its huge pages (a *reservation*): the faults that take them cannot fail, and
others get only what nobody was promised. Without a promise are MAP_NORESERVE, a child and what a
store copies after a fork, and a page whose content MADV_REMOVE has freed. When the pool has nothing
for them, the access is SIGBUS; but the process that mapped private memory takes the page from its
children instead, and they are SIGBUS from then on where they have no page
(Documentation/mm/hugetlbfs_reserv.rst).

Huge pages lie beside the frames that the page daemon gives out: they are never evicted.

Simpler than Linux: the pages of shared memory that a mapping replaces are back for that very
mapping; Linux lets its file go when the call returns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.model.file_object import FileObject
from quire.model.page import Page

if TYPE_CHECKING:
    from quire.model.page import Mapper
    from quire.model.pageout import Pageout
    from quire.model.physical_memory import PhysicalMemory

__all__ = ["HugeObject", "HugePool"]


class HugePool:
    """`size` huge pages of `block_pages` frames each (vm.nr_hugepages)."""

    def __init__(self, memory: PhysicalMemory, block_pages: int, size: int) -> None:
        self.memory = memory
        self.block_pages = block_pages
        self.size = size
        self.promised = 0
        self.used = 0
        self._held: dict[int, int] = {}
        self._returning: set[int] = set()
        self._runs: list[int] = []

    @property
    def available(self) -> int:
        """Huge pages that are free and that nobody was promised."""
        return self.size - self.used - self.promised

    def take(self, pages: list[Page], *, promised: bool) -> bool:
        """Gives the pages of a block zeroed frames, if it was promised or can be spared."""
        if self.used == self.size or (not promised and self.available <= 0):
            return False
        self.promised -= promised
        self.used += 1
        first = self.memory.allocate_run(pages, self._runs.pop() if self._runs else None)
        for number, page in enumerate(pages, first):
            page.frame = number
        self._held[first] = len(pages)
        return True

    def give_back(self, page: Page) -> None:
        """Takes the frame of a page; with the last of its block the huge page is free.

        One of which a frame has failed is dissolved: the pool is smaller then.
        """
        assert page.frame is not None
        frame, page.frame = page.frame, None
        self.memory.free(frame, kept=True)
        first = frame - frame % self.block_pages
        self._held[first] -= 1
        if self._held[first]:
            return
        del self._held[first]
        self.used -= 1
        self.promised += first in self._returning
        self._returning.discard(first)
        run = range(first, first + self.block_pages)
        if self.memory.failed.isdisjoint(run):
            self._runs.append(first)
            return
        self.size -= 1
        for number in run:
            self.memory.free(number)

    def expect(self, page: Page) -> None:
        """The owner of a page gives it up: when its block is free, it is promised again."""
        assert page.frame is not None
        self._returning.add(page.frame - page.frame % self.block_pages)

    @property
    def outstanding(self) -> int:
        """Huge pages that are promised again as soon as nobody holds them."""
        return len(self._returning)

    def free_frames(self) -> set[int]:
        """Frames of the pool that hold no page."""
        taken = {n for first in self._held for n in self._run(first) if not self.memory.pages[n]}
        return taken.union(*(self._run(first) for first in self._runs))

    def _run(self, first: int) -> range:
        return range(first, first + self.block_pages)


class HugeObject(FileObject):
    """What MAP_HUGETLB maps: a file made for that one mapping.

    Shared, its pages are everybody's. Private, it has none: it only keeps the promises made to
    `owner`, the address space that mapped it.
    """

    def __init__(self, pageout: Pageout, pool: HugePool, size: int, owner: Mapper | None) -> None:
        super().__init__(pageout, "/anon_hugepage", size)
        self.linked = False
        self.pool = pool
        self.owner = owner
        self.promises: set[int] = set()
        """Huge pages by number that are promised and not yet taken."""
        self.bereft: set[Mapper] = set()
        """Children from whom the owner took a page: where they have none, they get none."""

    def promise(self, first: int, last: int) -> bool:
        """Promises huge pages `[first, last)`, all or none."""
        if last - first > self.pool.available:
            return False
        self.pool.promised += last - first
        self.promises.update(range(first, last))
        return True

    def take(self, number: int, *, shared: bool, promised: bool) -> list[Page] | None:
        """The pages of a new huge page, the one promised for `number` or one that can be spared."""
        count = self.pool.block_pages
        owner = self if shared else None
        indices = range(number * count, number * count + count)
        pages = [Page(owner, index, dirty=True, pool=self.pool) for index in indices]
        if not self.pool.take(pages, promised=promised and number in self.promises):
            return None
        if promised:
            self.promises.discard(number)
        if shared:
            self.pages.update(zip(indices, pages, strict=True))
        return pages

    def block(self, number: int) -> list[Page] | None:
        """The pages of a shared huge page; None when the pool has none for it."""
        count = self.pool.block_pages
        if number * count not in self.pages:
            return self.take(number, shared=True, promised=True)
        return [self.pages[number * count + step] for step in range(count)]

    def restore(self, number: int, page: Page) -> None:
        """The owner gives up a private huge page: it is promised again, once nobody holds it.

        Until then the count of what is promised is too low by one, as it is in Linux.
        """
        self.pool.expect(page)
        self.promises.add(number)

    def unmapped(self) -> None:
        """What is mapped no more is promised no more."""
        super().unmapped()
        owner, count = self.owner, self.pool.block_pages
        if owner is not None:
            kept = {number for number in self.promises if owner.shows(self, number * count)}
        else:
            kept = self.promises if self.mappers else set()
        self.pool.promised -= len(self.promises) - len(kept)
        self.promises = kept

    def punch(self, offset: int, count: int) -> None:
        """Frees the huge pages that lie wholly in the hole; of others it clears the part."""
        size, end = self.pool.block_pages * self.page_size, offset + count
        first, last = -(-offset // size), end // size
        for low, high in ((offset, min(first * size, end)), (max(last * size, first * size), end)):
            for start in range(low, high, self.page_size):
                self._zero(start, min(start + self.page_size, high))
        if first < last:
            super().punch(first * size, (last - first) * size)
