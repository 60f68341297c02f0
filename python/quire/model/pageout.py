"""The page daemon: gives out frames, and when they are short, chooses pages that give theirs up.

`limit` bounds the pages that may be evicted. Wired memory (page tables, locked pages, the zero
page) lies beside it, so that no program can lock the machine to death, and so that the bound never
changes what a program reads: it only makes it wait.

The way of an eviction: take the translations away (by the reverse map), save the content (to its
disk or to a swap slot), free the frame. A page found locked goes to the unevictable list until it
is unlocked, as in Linux (Documentation/mm/unevictable-lru.rst).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.model.errors import DiskError, OutOfMemory
from quire.model.flusher import Flusher
from quire.model.policy import TwoLists

if TYPE_CHECKING:
    from quire.model.page import Page
    from quire.model.physical_memory import PhysicalMemory
    from quire.model.policy import Policy
    from quire.model.swap import Swap
    from quire.model.trace import Trace

__all__ = ["Pageout"]


class Pageout:
    """Frames for pages, within `limit` (None: as many as are asked for).

    `memory_pages` is what the machine says it has: of that the flusher allows a share to be dirty.
    """

    def __init__(
        self,
        memory: PhysicalMemory,
        swap: Swap,
        trace: Trace,
        limit: int | None = None,
        policy: Policy[Page] | None = None,
        memory_pages: int = 1 << 20,
    ) -> None:
        assert limit is None or limit > 0, "at least one frame for pages"
        self.memory = memory
        self.swap = swap
        self.trace = trace
        self.limit = limit
        self.policy: Policy[Page] = policy if policy is not None else TwoLists()
        self.acts_ample = False
        """Whether a shortage of frames is hidden where a program may see it: what it declared
        forgettable (MADV_FREE, MAP_DROPPABLE) is saved all the same while swap has room, and
        MADV_COLLAPSE without room for a huge page succeeds and changes nothing."""
        self.flusher = Flusher(memory, trace, memory_pages)
        self.unevictable: set[Page] = set()
        self.evictions = 0

    @property
    def has_room(self) -> bool:
        """Whether a frame can be had without an eviction."""
        return self.limit is None or len(self.policy) < self.limit

    def withdraw(self, page: Page) -> None:
        """Takes a page out of the hands that choose victims."""
        self.policy.remove(page)
        self.unevictable.discard(page)

    def allocate(self, page: Page) -> int:
        """Gives `page` a zeroed frame.

        Raises:
            OutOfMemory: no page can be evicted.
        """
        assert page.frame is None, "the page has a frame"
        self._make_room()
        page.frame = self.memory.allocate(page)
        self.policy.insert(page)
        self.trace.add("frame", frame=page.frame)
        return page.frame

    def allocate_run(self, pages: list[Page]) -> bool:
        """Gives pages adjoining frames, if there is room without eviction."""
        if self.limit is not None and len(self.policy) + len(pages) > self.limit:
            return False
        first = self.memory.allocate_run(pages)
        for number, page in enumerate(pages):
            page.frame = first + number
            self.policy.insert(page)
        self.trace.add("frames", frame=first, count=len(pages))
        return True

    def bring_in(self, page: Page) -> int:
        """The frame of a page, which is read back from swap if it is there."""
        if page.frame is not None:
            return page.frame
        frame = self.allocate(page)
        if page.slot is not None:
            self.memory.frames[frame][:] = self.swap.load(page.slot)
            page.dirty = False
        return frame

    def mark_accessed(self, page: Page) -> None:
        """A use by read() or write(), which sets no accessed bit."""
        if page not in self.unevictable and not page.poisoned:
            self.policy.touch(page)

    def content(self, page: Page) -> bytes:
        """The bytes of a page, which comes in for it."""
        return bytes(self.memory.frames[self.bring_in(page)])

    def free(self, page: Page) -> None:
        """Ends a page: its frame and slot are free. Nothing may show it."""
        if page.pool is not None:
            page.pool.give_back(page)
        elif page.frame is not None:
            self.withdraw(page)
            self.memory.free(page.frame)
            page.frame = None
        self.swap.discard(page)

    def rescue(self, page: Page) -> None:
        """Puts a page that is no longer locked back among those that may be evicted."""
        if page in self.unevictable and not page.wired:
            self.unevictable.remove(page)
            self.policy.insert(page)

    def evict(self, page: Page) -> bool:
        """Takes a page's frame, and says whether that could be done.

        The page must be out of the policy's hands.
        """
        assert page.frame is not None
        for space, number in list(page.mappings):
            space.forget_translation(number)  # only now `dirty` is known
        if page.forgettable and (self.swap.full or not self.acts_ample):
            self.forget(page)
            return True
        if page.swap_backed and page.slot is None and self.swap.full:
            return False
        self._note_eviction(page)
        try:
            self._save(page)
        except DiskError:
            return False
        self.evictions += 1
        if page.frame is not None:
            self.memory.free(page.frame)
            page.frame = None
        return True

    def forget(self, page: Page) -> None:
        """Drops a forgettable page: those who held it will read zeros."""
        self.trace.add("forget", frame=page.frame)
        for space, number in list(page.holders):
            space.drop_private(number)

    def _note_eviction(self, page: Page) -> None:
        of, number = "a process", min((number for _, number in page.holders), default=page.index)
        if page.owner is not None:
            of = page.owner.name
        self.trace.add("evict", frame=page.frame, dirty=page.dirty, of=of, page=number)

    def _save(self, page: Page) -> None:
        assert page.frame is not None
        if page.swap_backed:
            if page.slot is None or page.dirty:
                self.swap.store(page, bytes(self.memory.frames[page.frame]))
            page.dirty = page.lazily_free = False
            return
        assert page.owner is not None
        page.owner.page_out(page)

    def _make_room(self) -> None:
        stuck: list[Page] = []
        while self.limit is not None and len(self.policy) + len(stuck) >= self.limit:
            page = self.policy.victim(_referenced)
            if page is None:
                break
            if page.wired:
                self.unevictable.add(page)
            elif not self.evict(page):
                stuck.append(page)
        for page in stuck:
            self.policy.insert(page)
        if self.limit is not None and len(self.policy) >= self.limit:
            raise OutOfMemory(
                f"all {self.limit} frames hold pages that cannot be evicted (swap is full)"
            )


def _referenced(page: Page) -> bool:
    # Every bit is read and cleared, not only those up to the first that is set.
    return sum(space.take_reference(number) for space, number in page.mappings) > 0
