"""Bringing pages in before they are touched: MAP_POPULATE, mlock, MADV_POPULATE_*.

Locked and populated pages are fetched as the program would: by a write where the mapping is private
and writable, so that no store will fault again; else by a read (`populate_vma_page_range`,
mm/gup.c).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.model import fault
from quire.model import flags as f
from quire.model.errors import CallError, OutOfMemory, Signalled
from quire.model.mmu import Access, NonCanonicalAddress, PageFault

if TYPE_CHECKING:
    from quire.model.space import Space
    from quire.model.vma import Vma

__all__ = ["populate", "touch"]


def populate(space: Space, start: int, end: int, *, ignore_errors: bool) -> None:
    """Brings in the pages of every mapping in the range, as mlock does; holes are passed over.

    With `ignore_errors` a page that cannot be had ends its VMA, and the next one goes on.

    Raises:
        CallError: EFAULT, a page that cannot be had.
    """
    for vma in space.vmas.overlapping(start, end):
        if vma.flags & (f.LOCKONFAULT | f.DEVICE):
            continue
        write = vma.flags & (f.WRITE | f.SHARED) == f.WRITE
        try:
            if not vma.accessible:
                raise CallError("EFAULT", "PROT_NONE cannot be populated")
            for address in range(
                max(vma.start, start), min(vma.end, end), space.geometry.page_size
            ):
                touch(space, vma, address, write=write)
        except CallError:
            if not ignore_errors:
                raise


def touch(space: Space, vma: Vma, address: int, *, write: bool) -> None:
    """Brings one page in as an access would.

    Raises:
        CallError: EFAULT where the access would raise a signal; ENOMEM without a frame.
    """
    access = Access.WRITE if write else Access.READ
    try:
        space.machine.mmu.translate(space.table, space.asid, address, access)
        return
    except (PageFault, NonCanonicalAddress):
        pass
    try:
        fault.supply(space, vma, address, write=write)
    except Signalled as signal:
        raise CallError("EFAULT", f"{signal.signal} at {address:#x}") from None
    except OutOfMemory as error:
        raise CallError("ENOMEM", str(error)) from None
