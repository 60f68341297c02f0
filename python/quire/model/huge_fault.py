"""A fault in memory of the pool of huge pages (`hugetlb_fault`): a whole block comes, or SIGBUS."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.model.errors import Signalled
from quire.model.huge_pool import HugeObject
from quire.model.page import Page

if TYPE_CHECKING:
    from quire.model.space import Space
    from quire.model.vma import Vma

__all__ = ["free_private", "huge_page"]


def huge_page(space: Space, vma: Vma, address: int, *, write: bool) -> tuple[str, list[Page]]:
    """The pages of the block at `address`, and where they came from.

    Raises:
        Signalled: SIGBUS, past the end of the object, or nothing is left in the pool.
    """
    target = vma.object
    assert isinstance(target, HugeObject)
    index = vma.index(address, space.page_bits)
    number = index // target.pool.block_pages
    refused = Signalled("SIGBUS", "BUS_ADRERR", address)
    if vma.private:
        first = (address & -space.geometry.block_size) >> space.page_bits
        held = _held(space, first, target.pool.block_pages)
        if held and write and len(held[0].holders) > 1:
            return _copy(space, target, first, held, refused)
        if held:
            return "private page", held
    if index >= target.page_count() or space in target.bereft:
        raise refused
    if not vma.private:
        cached = target.resident(index)
        pages = target.block(number)
    else:
        cached, mine = False, target.owner is space
        pages = target.take(number, shared=False, promised=mine)
        for step, page in enumerate(pages or ()):
            space.hold(first + step, page)
    if pages is None:
        raise refused
    return "page cache" if cached else "huge page", pages


def free_private(space: Space, vma: Vma, start: int, end: int) -> None:
    """Drops private huge pages; those of the owner are promised to it again."""
    target = vma.object
    assert isinstance(target, HugeObject)
    count = target.pool.block_pages
    for first in range(start >> space.page_bits, end >> space.page_bits, count):
        held = _held(space, first, count)
        if held and target.owner is space:
            number = vma.index(first << space.page_bits, space.page_bits) // count
            target.restore(number, held[0])
        space.drop_range(first, first + count)


def _held(space: Space, first: int, count: int) -> list[Page]:
    """The private pages of a block: all or none are there."""
    held = (space.overlay.get(first + step) for step in range(count))
    return [page for page in held if isinstance(page, Page)]


def _copy(
    space: Space, target: HugeObject, first: int, held: list[Page], refused: Signalled
) -> tuple[str, list[Page]]:
    """A store to what others hold too: copied, or taken from the children of the owner."""
    pages = target.take(0, shared=False, promised=False)
    if pages is None and target.owner is not space:
        raise refused
    space.machine.trace.add("copy" if pages else "take", source=held[0].frame)
    if pages is None:
        for page in held:
            for other, number in list(page.holders):
                if other is not space:
                    other.drop_private(number)
                    target.bereft.add(other)
        return "private page", held
    frames = space.machine.memory.frames
    for step, (old, new) in enumerate(zip(held, pages, strict=True)):
        assert old.frame is not None
        assert new.frame is not None
        frames[new.frame][:] = frames[old.frame]
        space.hold(first + step, new)
    return "copy on write", pages
