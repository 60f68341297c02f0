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


@dataclass
class SmapsEntry:
    """What /proc/PID/smaps counts of one mapping, in bytes.

    `pss` and `swap_pss` are shared out among all who have a page; of swap, as in Linux, private
    pages alone. `swap` has the pages of shared memory that are there, too. `locked` is the `pss` of
    a locked mapping.
    """

    line: MapsLine
    rss: int = 0
    pss: float = 0.0
    shared_clean: int = 0
    shared_dirty: int = 0
    private_clean: int = 0
    private_dirty: int = 0
    anonymous: int = 0
    swap: int = 0
    swap_pss: float = 0.0
    locked: float = 0.0

    @property
    def size(self) -> int:
        """Bytes mapped."""
        return self.line.end - self.line.start

    @property
    def shared(self) -> int:
        """Bytes in memory that others show as well."""
        return self.shared_clean + self.shared_dirty

    @property
    def private(self) -> int:
        """Bytes in memory that are shown here alone."""
        return self.private_clean + self.private_dirty


def smaps(space: Space) -> list[SmapsEntry]:
    """Bytes in memory of each mapping: those it has a translation for."""
    return [_smaps_entry(space, vma) for vma in space.vmas]


def _smaps_entry(space: Space, vma: Vma) -> SmapsEntry:
    size, memory, form = space.geometry.page_size, space.machine.memory, space.table.format
    entry = SmapsEntry(_line(space, vma))
    for number in _shown(space, vma):
        leaf = space.table.leaf(number << space.page_bits)
        assert leaf is not None
        page = memory.pages[space.table.frame(leaf, number << space.page_bits)]
        if page is None:
            continue  # the zero page is nobody's
        entry.rss += size
        users = max(len(page.mappings), len(page.holders))
        entry.pss += size / users
        dirty = page.dirty or bool(leaf.entry & form.dirty)
        kind = ("shared_" if users > 1 else "private_") + ("dirty" if dirty else "clean")
        setattr(entry, kind, getattr(entry, kind) + size)
        entry.anonymous += size if page.owner is None else 0
    for page in _swapped(space, vma):
        entry.swap += size
        entry.swap_pss += size / len(page.holders) if page.holders else 0
    entry.locked = entry.pss if vma.flags & f.LOCKED else 0
    return entry


def _swapped(space: Space, vma: Vma) -> list[Page]:
    """The pages of a mapping that are in swap and not in memory."""
    first, last = vma.start >> space.page_bits, vma.end >> space.page_bits
    pages = [space.overlay[number] for number in space.held(first, last)]
    if vma.object is not None:
        pages += [
            page
            for index, page in vma.object.pages.items()
            if vma.offset <= index < vma.offset + last - first
            and first + index - vma.offset not in space.overlay
        ]
    return [p for p in pages if isinstance(p, Page) and p.slot is not None and p.frame is None]


def _shown(space: Space, vma: Vma) -> list[int]:
    numbers: list[int] = []
    for leaf in space.table.leaves(vma.start, vma.end):
        low, high = max(leaf.start, vma.start), min(leaf.start + leaf.size, vma.end)
        numbers += range(low >> space.page_bits, high >> space.page_bits)
    return numbers


def pagemap(space: Space, address: int) -> dict[str, int | bool | None]:
    """What is known of one page: its frame or swap slot, whether it is a file's, a guard, dirty."""
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
