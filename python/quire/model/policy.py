"""Replacement policies: which page gives way when a frame is needed.

All have one face, so that the page daemon and the textbook's reference strings use the same code:
`insert` a page that came in, `touch` one that was used, `remove` one that is gone, and `victim`,
which chooses, takes out and returns. `touch` is a use that the system sees: a hit of a reference
string, a read() or write() of a cached page. Loads and stores it does not see; when a victim is
needed, `referenced(page)` says whether there was one since it was last asked: it reads and clears
the accessed bit of the page's translations. A reference string has no such bit.

FIFO, LRU, OPT: Belady, "A study of replacement algorithms for a virtual-storage computer", 1966.
CLOCK: Corbato, "A paging experiment with the Multics system", 1968.
Two lists: Linux's active and inactive lists, mm/vmscan.c; Babaoglu and Joy, 1981.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

__all__ = ["POLICIES", "Clock", "Fifo", "Lru", "Opt", "Policy", "TwoLists", "count_faults"]

Key = TypeVar("Key")


class Policy(Protocol[Key]):
    """See the module."""

    def __len__(self) -> int: ...

    def insert(self, page: Key) -> None:
        """A page came in."""

    def touch(self, page: Key) -> None:
        """A page was used again."""

    def remove(self, page: Key) -> None:
        """A page is gone, and no victim."""

    def victim(self, referenced: Callable[[Key], bool]) -> Key | None:
        """The page that gives way; None when there is none."""


class Fifo(Generic[Key]):
    """First in, first out: the page that came in longest ago, however often it was used."""

    def __init__(self) -> None:
        self.queue: OrderedDict[Key, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self.queue)

    def insert(self, page: Key) -> None:
        """A page came in: it goes last."""
        self.queue[page] = None

    def touch(self, page: Key) -> None:
        """Of no matter here."""

    def remove(self, page: Key) -> None:
        """A page is gone."""
        self.queue.pop(page, None)

    def victim(self, referenced: Callable[[Key], bool]) -> Key | None:  # noqa: ARG002
        """The oldest."""
        return self.queue.popitem(last=False)[0] if self.queue else None


class Lru(Fifo[Key]):
    """Least recently used: each use sends a page to the end of the queue.

    Simplified: of loads and stores only the accessed bits are known, and those are sampled when a
    victim is needed. Pages used since then go to the end in the order that they had; of a page
    that has come in since then, the bit tells nothing but that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fresh: set[Key] = set()

    def insert(self, page: Key) -> None:
        """A page came in: it goes last."""
        super().insert(page)
        self.fresh.add(page)

    def touch(self, page: Key) -> None:
        """The page goes last."""
        self.queue.move_to_end(page)

    def victim(self, referenced: Callable[[Key], bool]) -> Key | None:
        """The page whose last use is the oldest, as far as can be known."""
        for page in [page for page in self.queue if referenced(page) and page not in self.fresh]:
            self.queue.move_to_end(page)
        self.fresh.clear()
        return super().victim(referenced)


class Clock(Fifo[Key]):
    """Second chance: the oldest page that was not used since the hand last passed it."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[Key] = set()

    def insert(self, page: Key) -> None:
        """A page came in, by a use: its reference bit is set."""
        super().insert(page)
        self.used.add(page)

    def touch(self, page: Key) -> None:
        """Sets the page's reference bit."""
        self.used.add(page)

    def remove(self, page: Key) -> None:
        """A page is gone."""
        super().remove(page)
        self.used.discard(page)

    def victim(self, referenced: Callable[[Key], bool]) -> Key | None:
        """Turns the hand; a page that was used is passed over once."""
        for _ in range(2 * len(self.queue)):
            page = next(iter(self.queue))
            hot = referenced(page)  # both bits are one: read, and cleared, together
            if page not in self.used and not hot:
                break
            self.used.discard(page)
            self.queue.move_to_end(page)
        return super().victim(referenced)


class TwoLists(Generic[Key]):
    """Active and inactive list: a page must be used twice to be kept from a long scan.

    New pages are inactive. The oldest inactive page is the victim, unless it was used: the first
    time it goes round once more, for the use that brought it in has set its accessed bit too; the
    second time it becomes active (`folio_check_references`). When the active list is the longer
    one, its oldest pages become inactive again. Simplified: Linux has these lists twice, for pages
    of files and for private ones, and keeps the shadows of evicted pages.
    """

    def __init__(self) -> None:
        self.inactive: OrderedDict[Key, None] = OrderedDict()
        self.active: OrderedDict[Key, None] = OrderedDict()
        self.used_once: set[Key] = set()

    def __len__(self) -> int:
        return len(self.inactive) + len(self.active)

    def __contains__(self, page: Key) -> bool:
        return page in self.inactive or page in self.active

    def insert(self, page: Key) -> None:
        """A page came in: inactive, until it proves itself."""
        self.inactive[page] = None

    def touch(self, page: Key) -> None:
        """A use that the system saw (`mark_page_accessed`): the second makes the page active."""
        if page in self.inactive and page in self.used_once:
            self._activate(page)
        else:
            self.used_once.add(page)

    def deactivate(self, page: Key) -> None:
        """MADV_COLD: the page is to be the next victim."""
        self.remove(page)
        self.inactive[page] = None
        self.inactive.move_to_end(page, last=False)

    def remove(self, page: Key) -> None:
        """A page is gone."""
        self.inactive.pop(page, None)
        self.active.pop(page, None)
        self.used_once.discard(page)

    def victim(self, referenced: Callable[[Key], bool]) -> Key | None:
        """The oldest inactive page that was not used."""
        for _ in range(2 * len(self)):
            while len(self.active) > len(self.inactive):
                page, _ = self.active.popitem(last=False)
                self.inactive[page] = None
            page = next(iter(self.inactive))
            if not referenced(page):
                self.remove(page)
                return page
            if page in self.used_once:
                self._activate(page)
            else:
                self.used_once.add(page)
                self.inactive.move_to_end(page)
        oldest = next(iter([*self.inactive, *self.active]), None)
        if oldest is not None:
            self.remove(oldest)
        return oldest

    def _activate(self, page: Key) -> None:
        self.remove(page)
        self.active[page] = None


class Opt(Fifo[Key]):
    """Belady's optimum: the page whose next use is farthest away. It must know the future."""

    def __init__(self, future: Sequence[Key]) -> None:
        super().__init__()
        self.future = list(future)
        self.now = 0

    def insert(self, page: Key) -> None:
        """A page came in."""
        super().insert(page)
        self.now += 1

    def touch(self, page: Key) -> None:  # noqa: ARG002
        """Time goes on."""
        self.now += 1

    def victim(self, referenced: Callable[[Key], bool]) -> Key | None:  # noqa: ARG002
        """The page needed last; of those never needed again, the oldest."""
        rest = self.future[self.now + 1 :]
        never = len(rest)
        page = max(self.queue, key=lambda p: rest.index(p) if p in rest else never, default=None)
        if page is not None:
            self.remove(page)
        return page


POLICIES: dict[str, Callable[[], Policy[Any]]] = {
    "two-lists": TwoLists,
    "fifo": Fifo,
    "lru": Lru,
    "clock": Clock,
}
"""Those that need not know the future, by name."""


def count_faults(
    string: Sequence[Hashable], frames: int, name: str
) -> tuple[int, list[tuple[Hashable, Hashable | None]]]:
    """How many faults a reference string gives, and each fault with its victim.

    >>> belady = [1, 2, 3, 4, 1, 2, 5, 1, 2, 3, 4, 5]
    >>> [count_faults(belady, frames, "fifo")[0] for frames in (3, 4)]
    [9, 10]
    >>> {name: count_faults(belady, 3, name)[0] for name in ("lru", "opt", "clock")}
    {'lru': 10, 'opt': 7, 'clock': 9}

    Raises:
        ValueError: there is no such policy, or no frame.
    """
    if name not in {*POLICIES, "opt"}:
        raise ValueError(f"no policy {name!r}: of {', '.join(POLICIES)}, opt")
    if frames < 1:
        raise ValueError(f"{frames} frames: at least 1")
    policy: Policy[Hashable] = Opt(string) if name == "opt" else POLICIES[name]()
    resident: set[Hashable] = set()
    faults: list[tuple[Hashable, Hashable | None]] = []
    for page in string:
        if page in resident:
            policy.touch(page)
            continue
        victim = None
        if len(resident) >= frames:
            victim = policy.victim(lambda _: False)
            resident.discard(victim)
        policy.insert(page)
        resident.add(page)
        faults.append((page, victim))
    return len(faults), faults
