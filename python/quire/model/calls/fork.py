"""fork(2): a second address space, which shares every page until one side stores."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from quire.model import flags as f
from quire.model.errors import CallError
from quire.model.page import Page
from quire.model.vma import Lineage

if TYPE_CHECKING:
    from quire.model.page_table import Leaf
    from quire.model.space import Space
    from quire.model.vma import Vma

__all__ = ["fork"]


def fork(parent: Space, child: Space) -> None:
    """Fills the new, empty `child` (`dup_mmap`). Locks are not inherited; limits are.

    Raises:
        CallError: ENOMEM, its private pages may not be promised.
    """
    child.limits = dict(parent.limits)
    child.may_lock_beyond_limit = parent.may_lock_beyond_limit
    child.may_map_low = parent.may_map_low
    child.brk_start, child.brk_end = parent.brk_start, parent.brk_end
    for vma in parent.vmas:
        if vma.flags & f.DONTFORK:
            continue
        if vma.flags & f.ACCOUNT and not parent.machine.may_promise(vma.size >> parent.page_bits):
            raise CallError("ENOMEM", "more memory than may be promised")
        _inherit(parent, child, vma)


def _inherit(parent: Space, child: Space, vma: Vma) -> None:
    wiped = bool(vma.flags & f.WIPEONFORK)
    family = None if wiped or vma.lineage is None else Lineage(inherited=True)
    copy = replace(vma, flags=vma.flags & ~f.LOCKED_MASK, lineage=family)
    child.vmas.insert(copy)
    if family is None:
        return  # no private page can be there: what the parent sees, a fault shows the child
    first, last = vma.start >> parent.page_bits, vma.end >> parent.page_bits
    for number in parent.held(first, last):
        held = parent.overlay[number]
        if isinstance(held, Page):
            child.hold(number, held)
        else:
            child.overlay[number] = held
    for leaf in parent.table.leaves(vma.start, vma.end):
        parent.protect_translation(max(leaf.start, vma.start) >> parent.page_bits)
        if vma.start <= leaf.start and leaf.start + leaf.size <= vma.end:
            _copy_translation(parent, child, copy, leaf)


def _copy_translation(parent: Space, child: Space, vma: Vma, leaf: Leaf) -> None:
    """Shows the child what the parent sees, read-only and not yet accessed (`copy_present_ptes`).

    Simplified: a huge page of which a part is not inherited comes page by page, by faults.
    """
    number, count = leaf.start >> parent.page_bits, leaf.size >> parent.page_bits
    frame = parent.table.frame(leaf, leaf.start)
    pages = parent.machine.memory.pages[frame : frame + count]
    if leaf.level:
        child.install_block(number, [page for page in pages if page], vma, writable=False)
    else:
        child.install(number, pages[0], vma, writable=False)
    new = child.table.leaf(leaf.start)
    assert new is not None
    child.table.update(new, new.entry & ~child.table.format.accessed)
