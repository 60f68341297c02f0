"""The translation look-aside buffer: the few translations that a CPU remembers.

Set-associative: a page may lie in `ways` places, and the least recently used of them gives way.
Entries carry the number of their address space (ASID; PCID on x86), so that a switch flushes
nothing. A translation that is changed in memory stays usable here until it is flushed: forgetting
that flush is the classic bug which a *shoot-down* prevents (Black et al., "Translation lookaside
buffer consistency", 1989).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Tlb", "TlbEntry", "usual_ways"]

Key = tuple[int, int]


class TlbEntry(NamedTuple):
    """What is remembered of a page: its frame, and what needs no look at the page table."""

    frame: int
    writable: bool
    """Writable, and already marked dirty in memory."""
    executable: bool
    user: bool = True
    """For programs, and not for the kernel alone."""


class Tlb:
    """`size` entries in sets of `ways`; size 0 is no TLB at all.

    `hits` and `misses` are counted by the MMU: an entry without the right that an access needs is
    of no use to it, and is no hit.

    >>> tlb = Tlb(size=2, ways=1)
    >>> tlb.insert(1, 4, TlbEntry(9, False, False))
    >>> tlb.lookup(1, 4), tlb.lookup(2, 4)
    (TlbEntry(frame=9, writable=False, executable=False, user=True), None)
    """

    def __init__(self, size: int = 64, ways: int = 4) -> None:
        self.size = size
        self.ways = min(ways, size)
        if size and size % self.ways:
            raise ValueError(f"{size} entries cannot be divided into sets of {self.ways}")
        self.sets: list[dict[Key, TlbEntry]] = [{} for _ in range(size // self.ways if size else 0)]
        self.hits = 0
        self.misses = 0

    def lookup(self, asid: int, page: int) -> TlbEntry | None:
        """The translation of a page number, if it is remembered."""
        if self.sets:
            ways = self.sets[page % len(self.sets)]
            entry = ways.pop((asid, page), None)
            if entry is not None:
                ways[asid, page] = entry  # now the most recently used
                return entry
        return None

    def insert(self, asid: int, page: int, entry: TlbEntry) -> Key | None:
        """Remembers a translation, in the place of the oldest of its set if need be: returns it."""
        if not self.sets:
            return None
        ways = self.sets[page % len(self.sets)]
        ways.pop((asid, page), None)
        oldest = next(iter(ways)) if len(ways) == self.ways else None
        if oldest is not None:
            del ways[oldest]
        ways[asid, page] = entry
        return oldest

    def flush(self, asid: int, first: int, count: int) -> bool:
        """Forgets `count` pages of one address space; says whether any was known."""
        if count <= self.size:
            pages = range(first, first + count)
            dropped = [self.sets[page % len(self.sets)].pop((asid, page), None) for page in pages]
            return any(dropped)
        keys = [key for ways in self.sets for key in ways]
        known = [key for key in keys if key[0] == asid and 0 <= key[1] - first < count]
        for key in known:
            del self.sets[key[1] % len(self.sets)][key]
        return bool(known)

    def entries(self) -> Iterator[tuple[int, int, TlbEntry]]:
        """Address space, page number and translation of all that is remembered."""
        for ways in self.sets:
            for (asid, page), entry in ways.items():
                yield asid, page, entry


def usual_ways(size: int) -> int:
    """The ways of a TLB of `size` entries when nothing else is asked: at most 4."""
    return next(ways for ways in (4, 3, 2, 1) if size % ways == 0)
