"""How an address is cut up: page size, levels of the page table, and where user space ends.

A virtual address is a row of indices, one for each level, and an offset in the page::

    x86-64, 4 levels, 4 KiB pages:      aarch64, 64 KiB granule, 48 bits:
    47    39 38    30 29    21 20  12 11   0      47  42 41    29 28    16 15     0
    | PGD  |  PUD   |  PMD   | PTE  | byte |      | L1  |   L2   |   L3   |  byte  |

A leaf above the last level maps a *block*: 2 MiB or 1 GiB with 4 KiB pages.

Sources: Intel SDM volume 3A, 4.5 (4-level and 5-level paging, table 4-15 for the bits of an entry);
Arm ARM (DDI 0487), D8.2 (translation granules) and D8.3 (descriptors).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["AARCH64_4K", "GEOMETRIES", "X86_64", "EntryFormat", "Geometry"]

WORD = 1 << 64
"""One more than an argument of a system call can be: addresses and lengths wrap there."""
GUARD_GAP_PAGES = 256
"""Pages kept free below a mapping that grows downwards (kernel parameter `stack_guard_gap`)."""


_LARGEST_BLOCK = 1 << 30


@dataclass(frozen=True)
class EntryFormat:
    """Where an architecture keeps the bits of a page-table entry.

    `block` and `page` mark a leaf above and at the last level, `table` an entry that points to a
    table. Writing is allowed by the presence of `writable` (x86) or by the absence of `read_only`
    (Arm); programs need `user`. `all_levels` are rights that every entry of a walk must give, and
    `any_level` prohibitions that each of them can make. (On Arm, too, tables could limit rights, by
    APTable and UXNTable; Linux does not use that, and it is left out here.)
    """

    name: str
    valid: int
    table: int
    block: int
    page: int
    leaf_mask: int
    writable: int
    read_only: int
    user: int
    all_levels: int
    any_level: int
    accessed: int
    dirty: int
    no_execute: int
    address: int

    def leaf(self, physical: int, level: int, writable: bool, executable: bool) -> int:
        """The entry that maps a page (level 0) or a block to `physical` for programs."""
        entry = (
            self.user | physical | self.valid | self.accessed | (self.block if level else self.page)
        )
        entry |= self.writable if writable else self.read_only
        return entry if executable else entry | self.no_execute

    def is_leaf(self, entry: int, level: int) -> bool:
        """Whether a valid entry ends the walk."""
        return level == 0 or entry & self.leaf_mask == self.block

    def may_write(self, entry: int) -> bool:
        """Whether the entry lets stores pass."""
        return bool(entry & self.writable) if self.writable else not entry & self.read_only

    def may_execute(self, entry: int) -> bool:
        """Whether instructions may be fetched."""
        return not entry & self.no_execute

    def for_programs(self, entry: int) -> bool:
        """Whether programs may use it, and not the kernel alone."""
        return bool(entry & self.user)

    def granted(self, entries: Sequence[int]) -> int:
        """The last of the entries that a walk read, with the rights that all of them leave."""
        *tables, granted = entries
        for table in tables:
            granted &= table | ~self.all_levels
            granted |= table & self.any_level
        return granted

    def with_protection(self, entry: int, writable: bool, executable: bool) -> int:
        """The same entry with other rights."""
        entry &= ~(self.writable | self.read_only | self.no_execute)
        entry |= self.writable if writable else self.read_only
        return entry if executable else entry | self.no_execute


_ADDRESS = (1 << 52) - (1 << 12)

X86_ENTRIES = EntryFormat(
    name="x86-64",
    valid=1 << 0,
    table=1 << 1 | 1 << 2,  # the system's tables allow all, so that the leaf decides
    block=1 << 7,  # PS, page size
    page=0,
    leaf_mask=1 << 7,
    writable=1 << 1,
    read_only=0,
    user=1 << 2,  # U/S
    all_levels=1 << 1 | 1 << 2,
    any_level=1 << 63,
    accessed=1 << 5,
    dirty=1 << 6,
    no_execute=1 << 63,
    address=_ADDRESS,
)

ARM_ENTRIES = EntryFormat(
    name="aarch64",
    valid=1 << 0,
    table=1 << 1,  # descriptor type bits 0b11 above the last level
    block=0,  # 0b01 above the last level
    page=1 << 1,  # 0b11 at the last level
    leaf_mask=1 << 1,
    writable=0,
    read_only=1 << 7,  # AP[2]
    user=1 << 6,  # AP[1]
    all_levels=0,
    any_level=0,
    accessed=1 << 10,  # AF
    dirty=1 << 55,  # kept by software, as Linux does without FEAT_HAFDBS
    no_execute=1 << 54,  # UXN
    address=(1 << 48) - (1 << 12),
)


@dataclass(frozen=True)
class Geometry:
    """One way to translate: page size, index widths from the root down, entry format."""

    name: str
    page_bits: int
    index_bits: tuple[int, ...]
    entries: EntryFormat
    signed: bool
    """Whether the upper half of addresses belongs to the kernel (x86: the top bit is extended)."""

    @cached_property
    def page_size(self) -> int:
        """Bytes of a page and of a frame."""
        return 1 << self.page_bits

    @cached_property
    def levels(self) -> int:
        """Tables that a walk reads."""
        return len(self.index_bits)

    @cached_property
    def address_bits(self) -> int:
        """Bits of a virtual address that translation looks at."""
        return self.page_bits + sum(self.index_bits)

    @cached_property
    def half(self) -> int:
        """First address that no user program may hold."""
        return 1 << (self.address_bits - self.signed)

    @cached_property
    def user_top(self) -> int:
        """End of user space. The last page stays free, so that no access runs over the edge."""
        return self.half - self.page_size

    @cached_property
    def window_top(self) -> int:
        """Above it nothing is mapped unless a wish lies there (DEFAULT_MAP_WINDOW of x86-64).

        Programs that use the upper bits of a pointer would break with 5 levels.
        """
        return min(self.user_top, (1 << 47) - self.page_size) if self.signed else self.user_top

    @cached_property
    def shifts(self) -> tuple[int, ...]:
        """Lowest address bit of each index, from the root down."""
        shifts, shift = [], self.address_bits
        for bits in self.index_bits:
            shift -= bits
            shifts.append(shift)
        return tuple(shifts)

    @cached_property
    def block_size(self) -> int:
        """Bytes mapped by a leaf one level above the last: the size of a huge page."""
        return self.leaf_sizes[1]

    @cached_property
    def leaf_levels(self) -> tuple[int, ...]:
        """Levels at which a walk may end: those of pages (0), and of blocks up to 1 GiB.

        With the larger granules of Arm a block is 32 or 512 MiB; the next level is too large.
        """
        return tuple(
            level
            for level in range(self.levels)
            if level == 0 or self.leaf_sizes[level] <= _LARGEST_BLOCK
        )

    @cached_property
    def leaf_sizes(self) -> tuple[int, ...]:
        """Bytes that a leaf maps, by level from the pages up (above the root: all there is)."""
        return tuple(1 << bits for bits in (*reversed(self.shifts), self.address_bits))

    def indices(self, address: int) -> tuple[int, ...]:
        """Index into the table of each level, from the root down.

        >>> X86_64.indices(0x7f12_3456_7890)
        (254, 72, 418, 359)
        """
        pairs = zip(self.shifts, self.index_bits, strict=True)
        return tuple(address >> shift & (1 << bits) - 1 for shift, bits in pairs)

    def canonical(self, address: int) -> bool:
        """Whether the bits above the translated ones are the copies that hardware asks for."""
        top = address >> (self.address_bits - self.signed)
        return top == 0 or top == (1 << (64 - self.address_bits + self.signed)) - 1

    def page_up(self, length: int) -> int:
        """Rounded up to whole pages, in 64 bits as the kernel's PAGE_ALIGN: may wrap to 0."""
        return (length + self.page_size - 1 & ~(self.page_size - 1)) & (1 << 64) - 1


X86_64 = Geometry("x86-64", 12, (9, 9, 9, 9), X86_ENTRIES, True)
AARCH64_4K = Geometry("aarch64-4k", 12, (9, 9, 9, 9), ARM_ENTRIES, False)

GEOMETRIES = {
    geometry.name: geometry
    for geometry in (
        X86_64,
        Geometry("x86-64-5level", 12, (9, 9, 9, 9, 9), X86_ENTRIES, True),
        AARCH64_4K,
        Geometry("aarch64-16k", 14, (1, 11, 11, 11), ARM_ENTRIES, False),
        Geometry("aarch64-64k", 16, (6, 13, 13), ARM_ENTRIES, False),
    )
}
