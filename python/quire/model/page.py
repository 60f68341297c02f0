"""A page: content of a page's size, wherever it is now: in a frame or in a swap slot.

The second layer: *what the answer was*. A page belongs to a memory object (its `owner`), or it is
private: then its `holders` say which address spaces have it in their overlay, and at which page
number. `mappings` is the reverse map: every translation that shows the page, so that it can be
taken away.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from quire.model.huge_pool import HugePool
    from quire.model.memory_object import MemoryObject

__all__ = ["Mapper", "Marker", "Page", "Place"]


class Mapper(Protocol):
    """What pages and objects ask of the address spaces above them."""

    def invalidate(self, target: MemoryObject, first: int, last: int, even_private: bool) -> None:
        """Takes away translations of an object's pages `[first, last)`, and private copies."""

    def forget_translation(self, page_number: int) -> None:
        """Takes away one translation; the page stays."""

    def protect_translation(self, page_number: int) -> None:
        """Makes one translation read-only, so that the next store is noticed."""

    def take_reference(self, page_number: int) -> bool:
        """Whether the page was accessed since last asked (the accessed bit, which is cleared)."""

    def wires(self, page_number: int) -> bool:
        """Whether the page is locked in memory there."""

    def may_write(self, target: MemoryObject) -> bool:
        """Whether some mapping of the object here may ever store into it."""

    def drop_private(self, page_number: int) -> None:
        """Gives up a private page: zeros, or the object's page, show again."""

    def shows(self, target: MemoryObject, index: int) -> bool:
        """Whether a mapping of the object here has its page `index`."""


Place = tuple[Mapper, int]
"""An address space and a page number in it."""


class Marker(Enum):
    """What an overlay holds where there is no private page."""

    ZERO = "the zero page was read here"
    GUARD = "any access is SIGSEGV (MADV_GUARD_INSTALL)"


@dataclass(slots=True, eq=False)
class Page:
    """See the module. A page with neither frame nor slot is not there yet."""

    owner: MemoryObject | None = None
    index: int = 0
    frame: int | None = None
    slot: int | None = None
    dirty: bool = False
    lazily_free: bool = False
    """MADV_FREE: until it is written again, its content need not be kept."""
    droppable: bool = False
    """MAP_DROPPABLE: its content need never be kept."""
    poisoned: bool = False
    """Its memory has failed: every access is SIGBUS, and its content is lost."""
    pool: HugePool | None = None
    """The pool of huge pages that its frame is of, if it is: then it is never evicted."""
    holders: set[Place] = field(default_factory=set)
    mappings: set[Place] = field(default_factory=set)

    @property
    def wired(self) -> bool:
        """Whether some address space has locked it."""
        return any(space.wires(number) for space, number in self.holders | self.mappings)

    @property
    def forgettable(self) -> bool:
        """Whether its content need not be kept: eviction then costs no I/O."""
        return self.droppable or (self.lazily_free and not self.dirty)

    @property
    def swap_backed(self) -> bool:
        """Whether swap is where it goes: private, or of an object that has no other place."""
        return self.owner is None or self.owner.swap_backed
