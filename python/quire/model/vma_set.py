"""The ordered set of an address space's VMAs, with its one merge and its one split.

Every call that changes part of a mapping comes down to `change`: the part takes new attributes,
grows into a neighbour that has the same, or is cut out. Linux keeps a maple tree; a sorted list is
the same thing to a reader.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import replace
from typing import TYPE_CHECKING

from quire.model.errors import CallError
from quire.model.flags import HUGETLB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quire.model.page import Mapper
    from quire.model.vma import Lineage, Vma

__all__ = ["VmaSet"]


class VmaSet:
    """VMAs by address. `limit` is vm.max_map_count: at that number no VMA may be cut in two."""

    def __init__(self, space: Mapper, page_bits: int, block_pages: int, limit: int) -> None:
        self.space = space
        self.block_pages = block_pages
        self.page_bits = page_bits
        self.limit = limit
        self._starts: list[int] = []
        self._vmas: list[Vma] = []

    def __len__(self) -> int:
        return len(self._vmas)

    def __iter__(self) -> Iterator[Vma]:
        return iter(list(self._vmas))

    def find(self, address: int) -> Vma | None:
        """The VMA that holds `address`."""
        place = bisect_right(self._starts, address) - 1
        if place >= 0 and address < self._vmas[place].end:
            return self._vmas[place]
        return None

    def at_or_after(self, address: int) -> Vma | None:
        """The VMA that holds `address`, or the next one above (Linux's `find_vma`)."""
        place = max(bisect_right(self._starts, address) - 1, 0)
        for vma in self._vmas[place : place + 2]:
            if address < vma.end:
                return vma
        return None

    def before(self, vma: Vma) -> Vma | None:
        """The next VMA below."""
        place = bisect_left(self._starts, vma.start)
        return self._vmas[place - 1] if place else None

    def after(self, vma: Vma) -> Vma | None:
        """The next VMA above."""
        place = bisect_left(self._starts, vma.start) + 1
        return self._vmas[place] if place < len(self._vmas) else None

    def overlapping(self, start: int, end: int) -> list[Vma]:
        """The VMAs that touch `[start, end)`, from the lowest up."""
        if start >= end:
            return []
        place = max(bisect_right(self._starts, start) - 1, 0)
        found = []
        for vma in self._vmas[place:]:
            if vma.start >= end:
                break
            if vma.end > start:
                found.append(vma)
        return found

    def add(self, vma: Vma) -> Vma:
        """Puts a VMA into free addresses and joins it with the neighbours it continues."""
        assert not self.overlapping(vma.start, vma.end), "the addresses are taken"
        self.insert(vma)
        return self._join(vma)

    def change(self, vma: Vma, start: int, end: int, flags: int) -> Vma:
        """Gives `[start, end)` of `vma` new flags; returns the VMA that holds it then.

        A cut that was already made when the next is refused stays, unseen: both sides are alike.

        Raises:
            CallError: ENOMEM, the part would have to be cut out and there are too many VMAs.
        """
        new = replace(vma.piece(start, end, self.page_bits), flags=flags)
        left, right = self.before(vma), self.after(vma)
        joins_left = (
            start == vma.start and left is not None and left.continued_by(new, self.page_bits)
        )
        joins_right = (
            end == vma.end and right is not None and new.continued_by(right, self.page_bits)
        )
        if not joins_left and not joins_right:
            if start > vma.start:
                vma = self.split(vma, start)[1]
            if end < vma.end:
                vma = self.split(vma, end)[0]
        self._replace([vma], [*self._around(vma, start, end), new])
        return self._join(new)

    def split(self, vma: Vma, address: int) -> tuple[Vma, Vma]:
        """Cuts a VMA in two at `address`.

        Raises:
            CallError: ENOMEM, at the limit of VMAs; EINVAL, within a huge page of the pool.
        """
        if len(self._vmas) >= self.limit:
            raise CallError("ENOMEM", "a mapping would be cut in two at vm.max_map_count")
        return self.divide(vma, address)

    def divide(self, vma: Vma, address: int) -> tuple[Vma, Vma]:
        """Cuts a VMA in two however many there are: part of it is about to go.

        Raises:
            CallError: EINVAL, within a huge page of the pool.
        """
        if vma.flags & HUGETLB and (address >> self.page_bits) % self.block_pages:
            raise CallError("EINVAL", "a huge page cannot be cut")
        low = vma.piece(vma.start, address, self.page_bits)
        high = vma.piece(address, vma.end, self.page_bits)
        self._replace([vma], [low, high])
        return low, high

    def cut(self, vma: Vma, start: int, end: int) -> None:
        """Takes `[start, end)` out of a VMA; what remains on either side stays."""
        self._replace([vma], self._around(vma, start, end))

    def resize(self, vma: Vma, start: int, end: int) -> Vma:
        """Moves the edges of a VMA into free addresses and joins it with what it reaches."""
        new = replace(vma, start=start, end=end)
        new.offset = vma.offset - ((vma.start - start) >> self.page_bits)
        self._replace([vma], [new])
        return self._join(new)

    def family_of_neighbours(self, vma: Vma) -> Lineage | None:
        """A family of private pages that `vma` may join (`find_mergeable_anon_vma`)."""
        right, left = self.after(vma), self.before(vma)
        if right is not None and vma.may_share_family(right, self.page_bits):
            family = right.lineage
            if family is not None and not family.inherited:
                return family
        if left is not None and left.may_share_family(vma, self.page_bits):
            family = left.lineage
            if family is not None and not family.inherited:
                return family
        return None

    def gaps(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        """Free runs of `[low, high)` from the highest down."""
        top = high
        for vma in reversed(self._vmas):
            if vma.start >= high:
                continue
            if vma.end <= low:
                break
            if vma.end < top:
                yield vma.end, top
            top = vma.start
        if low < top:
            yield low, top

    def remove(self, vma: Vma) -> None:
        """Takes a VMA out."""
        self._replace([vma], [])

    def insert(self, vma: Vma) -> None:
        """Puts a VMA in, joining nothing."""
        self._replace([], [vma])

    def _replace(self, old: list[Vma], new: list[Vma]) -> None:
        """Puts VMAs in the place of others. An object learns only by how many its VMAs change."""
        for vma in old:
            place = bisect_left(self._starts, vma.start)
            assert self._vmas[place] is vma, "not a VMA of this space"
            del self._starts[place], self._vmas[place]
        for vma in new:
            place = bisect_left(self._starts, vma.start)
            self._starts.insert(place, vma.start)
            self._vmas.insert(place, vma)
        left = [vma.object for vma in old if vma.object is not None]
        for vma in new:
            if vma.object in left:
                left.remove(vma.object)
            elif vma.object is not None:
                vma.object.attach(self.space)
        for target in left:
            target.detach(self.space)

    def _around(self, vma: Vma, start: int, end: int) -> list[Vma]:
        """What remains of a VMA on either side of `[start, end)`."""
        sides = ((vma.start, start), (end, vma.end))
        return [vma.piece(low, high, self.page_bits) for low, high in sides if low < high]

    def _join(self, vma: Vma) -> Vma:
        left = self.before(vma)
        if left is not None and left.continued_by(vma, self.page_bits):
            vma = self._united(left, vma)
        right = self.after(vma)
        if right is not None and vma.continued_by(right, self.page_bits):
            vma = self._united(vma, right)
        return vma

    def _united(self, left: Vma, right: Vma) -> Vma:
        whole = replace(left, end=right.end, lineage=left.lineage or right.lineage)
        self._replace([left, right], [whole])
        return whole
