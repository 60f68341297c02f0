"""What /proc shows of an address space: maps, smaps, pagemap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.model import flags as f
from quire.model.page import Marker, Page

if TYPE_CHECKING:
    from quire.model.space import Space
    from quire.model.vma import Vma

__all__ = ["MapsLine", "maps", "pagemap", "smaps"]


@dataclass(frozen=True)
class MapsLine:
    """A line of /proc/PID/maps."""

    start: int
    end: int
    permissions: str
    offset: int
    name: str | None

    def __str__(self) -> str:
        line = f"{self.start:x}-{self.end:x} {self.permissions} {self.offset:08x} {self.name or ''}"
        return line.rstrip()


def maps(space: Space) -> list[MapsLine]:
    """The mappings from the lowest up. The offset is 0 where there is no name."""
    return [_line(space, vma) for vma in space.vmas]


def _line(space: Space, vma: Vma) -> MapsLine:
    letters = ((f.READ, "r"), (f.WRITE, "w"), (f.EXEC, "x"))
    permissions = "".join(letter if vma.flags & bit else "-" for bit, letter in letters)
    name = vma.file.name if vma.file is not None else None
    if vma.object is not None:
        name = vma.object.name
    offset = vma.offset << space.page_bits if name is not None else 0
    return MapsLine(
        vma.start, vma.end, permissions + ("s" if vma.flags & f.MAY_SHARE else "p"), offset, name
    )


@dataclass(frozen=True)
class SmapsEntry:
    """What /proc/PID/smaps counts of one mapping, in bytes. Pss is shared out among all who map."""

    line: MapsLine
    rss: int
    pss: float
    shared: int
    private: int
    anonymous: int
    swap: int
    locked: int


def smaps(space: Space) -> list[SmapsEntry]:
    """Bytes in memory of each mapping: those it has a translation for."""
    return [_smaps_entry(space, vma) for vma in space.vmas]


def _smaps_entry(space: Space, vma: Vma) -> SmapsEntry:
    page_size = space.geometry.page_size
    memory = space.machine.memory
    rss = shared = anonymous = 0
    pss = 0.0
    for number in _shown(space, vma):
        leaf = space.table.leaf(number << space.page_bits)
        assert leaf is not None
        page = memory.pages[space.table.frame(leaf, number << space.page_bits)]
        if page is None:
            continue  # the zero page is nobody's
        rss += page_size
        users = max(len(page.mappings), len(page.holders))
        pss += page_size / users
        shared += page_size if users > 1 else 0
        anonymous += page_size if page.owner is None else 0
    held = space.held(vma.start >> space.page_bits, vma.end >> space.page_bits)
    pages = [space.overlay[number] for number in held]
    swap = sum(page_size for page in pages if isinstance(page, Page) and page.frame is None)
    locked = rss if vma.flags & f.LOCKED else 0
    return SmapsEntry(_line(space, vma), rss, pss, shared, rss - shared, anonymous, swap, locked)


def _shown(space: Space, vma: Vma) -> list[int]:
    numbers: list[int] = []
    for leaf in space.table.leaves(vma.start, vma.end):
        low, high = max(leaf.start, vma.start), min(leaf.start + leaf.size, vma.end)
        numbers += range(low >> space.page_bits, high >> space.page_bits)
    return numbers


def pagemap(space: Space, address: int) -> dict[str, int | bool | None]:
    """What is known of one page:

    its frame, its swap slot, whether it is a file's, a guard, dirty.
    """
    number = address >> space.page_bits
    held = space.overlay.get(number)
    leaf = space.table.leaf(address)
    frame = None if leaf is None else space.table.frame(leaf, number << space.page_bits)
    page = None if frame is None else space.machine.memory.pages[frame]
    return {
        "present": leaf is not None,
        "frame": frame,
        "swap_slot": held.slot if isinstance(held, Page) and held.frame is None else None,
        "file": page is not None and page.owner is not None,
        "guard": held is Marker.GUARD,
        "dirty": page is not None and page.dirty,
        "map_count": 0 if frame is None else space.machine.memory.map_counts[frame],
    }
