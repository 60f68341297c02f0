"""A page fault, resolved: the one way by which a missing or protected page comes into being.

In Linux's order (`do_user_addr_fault`, `handle_mm_fault`):

1. Which VMA? None: may a stack grow here? Else SIGSEGV SEGV_MAPERR.
2. Is the access allowed? Else SIGSEGV SEGV_ACCERR.
3. A guard marker? SIGSEGV SEGV_MAPERR.
4. Does the object reach so far? Else SIGBUS BUS_ADRERR.
5. The page: from the overlay, from the object, of zeros; copied if it must not be shared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.model import flags as f
from quire.model.errors import CallError, DiskError, Signalled
from quire.model.geometry import GUARD_GAP_PAGES
from quire.model.huge_fault import huge_page
from quire.model.mmu import Access
from quire.model.page import Marker, Page
from quire.model.vma import Lineage

if TYPE_CHECKING:
    from quire.model.memory_object import MemoryObject
    from quire.model.space import Space
    from quire.model.vma import Vma

__all__ = ["collapse", "find_family", "resolve", "supply"]


def resolve(space: Space, address: int, access: Access) -> None:
    """Makes the access possible, or raises `Signalled`."""
    vma = _locate(space, address)
    if space.machine.trace.on:
        _note_vma(space, vma)
    if not _allowed(vma, access):
        raise Signalled("SIGSEGV", "SEGV_ACCERR", address)
    supply(space, vma, address, write=access is Access.WRITE)


def supply(space: Space, vma: Vma, address: int, *, write: bool) -> None:
    """Brings the page at `address` in and shows it, whatever the rights of the VMA."""
    if space.overlay.get(address >> space.page_bits) is Marker.GUARD:
        raise Signalled("SIGSEGV", "SEGV_MAPERR", address)
    machine = space.machine
    reads = machine.disk.reads + machine.swap.reads
    try:
        if vma.flags & f.HUGETLB:
            _huge(space, vma, address, write)
        elif vma.private:
            _private(space, vma, address, write)
        else:
            _shared(space, vma, address, write)
    except DiskError as error:
        machine.trace.add("disk error", errno=error.errno)
        raise Signalled("SIGBUS", "BUS_ADRERR", address) from None
    if machine.disk.reads + machine.swap.reads > reads:
        space.major_faults += 1
    else:
        space.minor_faults += 1


def find_family(space: Space, vma: Vma) -> None:
    """Gives a VMA its family of private pages, before it gets the first (`anon_vma_prepare`)."""
    if vma.lineage is None:
        vma.lineage = space.vmas.family_of_neighbours(vma) or Lineage()


def collapse(space: Space, vma: Vma, start: int) -> None:
    """Gathers an aligned block of anonymous pages into adjoining frames, shown by one entry.

    Of shared memory all pages come in, each in its own frame.
    """
    first = start >> space.page_bits
    count = space.geometry.block_size >> space.page_bits
    pageout = space.machine.pageout
    held = [space.overlay.get(first + step) for step in range(count)]
    if vma.object is not None:
        _fill_object(vma.object, vma.index(start, space.page_bits), held)
        return
    if Marker.GUARD in held or not any(isinstance(page, Page) for page in held):
        raise CallError("EINVAL", "a guard page lies in the block, or nothing at all")
    contents = [pageout.content(page) if isinstance(page, Page) else None for page in held]
    pages = [Page(dirty=True) for _ in range(count)]
    if not pageout.allocate_run(pages):
        if pageout.acts_ample:
            return
        raise CallError("ENOMEM", "no room for a huge page")
    find_family(space, vma)
    for step, (page, content) in enumerate(zip(pages, contents, strict=True)):
        space.hold(first + step, page)
        if content is not None:
            assert page.frame is not None
            space.machine.memory.frames[page.frame][:] = content
    if vma.flags & f.WRITE:
        space.install_block(first, pages, vma)


def _fill_object(target: MemoryObject, first: int, held: list[Page | Marker | None]) -> None:
    """Brings in a block of an object's pages, of which at least one must be there."""
    last = first + len(held)
    if any(held) or not any(first <= index < last for index in target.pages):
        raise CallError("EINVAL", "a guard or a private page lies in the block, or nothing at all")
    for index in range(first, min(last, target.page_count())):
        target.page(index)


def _locate(space: Space, address: int) -> Vma:
    vma = space.vmas.at_or_after(address)
    if vma is not None and address >= vma.start:
        return vma
    if vma is None or not vma.flags & f.GROWSDOWN:
        raise Signalled("SIGSEGV", "SEGV_MAPERR", address)
    return _grow_stack(space, vma, address)


def _grow_stack(space: Space, vma: Vma, address: int) -> Vma:
    """Moves the start of a stack down to the touched page (`expand_downwards`)."""
    page = space.geometry.page_size
    start = address & -page
    below = space.vmas.before(vma)
    refused = Signalled("SIGSEGV", "SEGV_MAPERR", address)
    if start < space.machine.lowest_address:
        raise refused
    keeps_gap = below is not None and not below.flags & f.GROWSDOWN and below.accessible
    if below is not None and keeps_gap and start - below.end < GUARD_GAP_PAGES * page:
        raise refused
    stack = space.limits["STACK"]
    pages = (vma.start - start) >> space.page_bits
    if stack is not None and vma.end - start > stack:
        raise refused
    if not space.machine.may_grow(space, vma.flags, pages, locks=True):
        raise refused
    find_family(space, vma)
    space.machine.trace.add("stack grows", start=start, pages=pages)
    return space.vmas.resize(vma, start, vma.end)


def _allowed(vma: Vma, access: Access) -> bool:
    """W implies R, and so does X, as on x86 without protection keys."""
    if access is Access.WRITE:
        return bool(vma.flags & f.WRITE)
    if access is Access.EXECUTE:
        return bool(vma.flags & f.EXEC)
    return vma.accessible


def _object_page(space: Space, vma: Vma, address: int) -> tuple[Page, str]:
    """The page that the VMA's object has for `address`, and where it came from."""
    assert vma.object is not None
    index = vma.index(address, space.page_bits)
    if index >= vma.object.page_count():
        raise Signalled("SIGBUS", "BUS_ADRERR", address)
    machine, cached = space.machine, vma.object.resident(index)
    reads = machine.disk.reads + machine.swap.reads
    page = vma.object.page(index)
    _refuse_poison(page, address)
    read = machine.disk.reads + machine.swap.reads > reads
    return page, "page cache" if cached else "page in" if read else "new page"


def _shared(space: Space, vma: Vma, address: int, write: bool) -> None:
    page, kind = _object_page(space, vma, address)
    if write:
        page.owner.before_store(page)  # type: ignore[union-attr]
    _note(space, kind, address, page)
    writable = write or (page.dirty and bool(vma.flags & f.WRITE))
    space.install(address >> space.page_bits, page, vma, writable=writable)


def _huge(space: Space, vma: Vma, address: int, write: bool) -> None:
    """A block of the pool of huge pages."""
    if vma.private:
        find_family(space, vma)
    kind, pages = huge_page(space, vma, address, write=write)
    block = space.geometry.block_size
    _refuse_poison(pages[(address & block - 1) >> space.page_bits], address)
    _note(space, kind, address, pages[0])
    alone = not vma.private or len(pages[0].holders) == 1
    writable = alone and bool(vma.flags & f.WRITE)
    space.install_block((address & -block) >> space.page_bits, pages, vma, writable=writable)


def _private(space: Space, vma: Vma, address: int, write: bool) -> None:
    number = address >> space.page_bits
    held = space.overlay.get(number)
    if isinstance(held, Page):
        _held_page(space, vma, address, held, write)
    elif write:
        _first_store(space, vma, address)
    elif not vma.anonymous:
        page, kind = _object_page(space, vma, address)
        _note(space, kind, address, page)
        space.install(number, page, vma, writable=False)
    elif not _block(space, vma, address):
        _note(space, "zero page", address, None)
        space.overlay[number] = Marker.ZERO
        space.install(number, None, vma, writable=False)


def _held_page(space: Space, vma: Vma, address: int, held: Page, write: bool) -> None:
    """A private page: shown; or, on a store while others hold it too, copied."""
    number = address >> space.page_bits
    pageout = space.machine.pageout
    _refuse_poison(held, address)
    if write and len(held.holders) > 1:
        content = pageout.content(held)
        space.machine.trace.add("copy", source=held.frame)
        _own(space, vma, address, content, "copy on write")
        return
    swapped = held.frame is None
    pageout.bring_in(held)
    if write:
        held.lazily_free = False
        held.dirty = True
    _note(space, "swap in" if swapped else "private page", address, held)
    alone = len(held.holders) == 1  # then the dirty bit tells of a store, and no fault is needed
    space.install(number, held, vma, writable=alone and bool(vma.flags & f.WRITE))


def _first_store(space: Space, vma: Vma, address: int) -> None:
    """A store where there is no private page yet."""
    if vma.anonymous:
        if not _block(space, vma, address):
            _own(space, vma, address, None, "zero fill")
        return
    source, kind = _object_page(space, vma, address)
    content = space.machine.pageout.content(source)
    space.machine.trace.add("copy", source=source.frame, of=kind)
    _own(space, vma, address, content, "copy on write")


def _own(space: Space, vma: Vma, address: int, content: bytes | None, kind: str) -> None:
    """Gives the space a private page of its own with `content` (None: zeros)."""
    page = Page(dirty=True, droppable=bool(vma.flags & f.DROPPABLE))
    frame = space.machine.pageout.allocate(page)
    if content is not None:
        space.machine.memory.frames[frame][:] = content
    find_family(space, vma)
    number = address >> space.page_bits
    space.hold(number, page)
    _note(space, kind, address, page)
    space.install(number, page, vma, writable=bool(vma.flags & f.WRITE))


def _block(space: Space, vma: Vma, address: int) -> bool:
    """Tries a huge page: an aligned, wholly untouched block of a VMA that asked for it."""
    block = space.geometry.block_size
    start = address & -block
    if not vma.flags & f.HUGEPAGE or start < vma.start or start + block > vma.end:
        return False
    first, count = start >> space.page_bits, block >> space.page_bits
    if space.held(first, first + count):
        return False
    pages = [Page(dirty=True) for _ in range(count)]
    if not space.machine.pageout.allocate_run(pages):
        return False
    find_family(space, vma)
    for step, page in enumerate(pages):
        space.hold(first + step, page)
    _note(space, "huge page", address, pages[0])
    space.install_block(first, pages, vma)
    return True


def _note_vma(space: Space, vma: Vma) -> None:
    letters = ((f.READ, "r"), (f.WRITE, "w"), (f.EXEC, "x"))
    rights = "".join(letter if vma.flags & bit else "-" for bit, letter in letters)
    space.machine.trace.add(
        "vma",
        start=vma.start,
        end=vma.end,
        rights=rights + ("p" if vma.private else "s"),
        object=vma.object.name if vma.object is not None else "-",
        offset=vma.offset,
    )


def _refuse_poison(page: Page, address: int) -> None:
    if page.poisoned:
        raise Signalled("SIGBUS", "BUS_MCEERR_AR", address)


def _note(space: Space, kind: str, address: int, page: Page | None) -> None:
    if space.machine.trace.on:
        frame = 0 if page is None else page.frame
        space.machine.trace.add("fault", by=kind, address=address, frame=frame)
