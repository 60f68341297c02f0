"""The numbers of Linux's interface: PROT_, MAP_, MREMAP_, MS_, MADV_, MCL_ and the flags of a VMA.

Plain integers, not `enum.IntFlag`: they are tested on every fault. Values as on x86-64
(`include/uapi/asm-generic/mman-common.h`, `mman.h`); those of a VMA are our own.
"""

from __future__ import annotations

from typing import Final

__all__: list[str] = []

PROT_READ: Final = 1
PROT_WRITE: Final = 2
PROT_EXEC: Final = 4
PROT_SEM: Final = 8
PROT_GROWSDOWN: Final = 0x0100_0000
PROT_GROWSUP: Final = 0x0200_0000

MAP: Final = {
    "SHARED": 0x1,
    "PRIVATE": 0x2,
    "SHARED_VALIDATE": 0x3,
    "DROPPABLE": 0x8,
    "FIXED": 0x10,
    "ANON": 0x20,
    "F32BIT": 0x40,
    "ABOVE4G": 0x80,
    "GROWSDOWN": 0x100,
    "DENYWRITE": 0x800,
    "EXECUTABLE": 0x1000,
    "LOCKED": 0x2000,
    "NORESERVE": 0x4000,
    "POPULATE": 0x8000,
    "NONBLOCK": 0x1_0000,
    "STACK": 0x2_0000,
    "HUGETLB": 0x4_0000,
    "SYNC": 0x8_0000,
    "FIXED_NOREPLACE": 0x10_0000,
    "UNINITIALIZED": 0x400_0000,
    "HUGE_2MB": 21 << 26,
    "HUGE_1GB": 30 << 26,
}
MAP_TYPE: Final = 0xF
_NOT_LEGACY: Final = ("DROPPABLE", "SYNC", "FIXED_NOREPLACE", "SHARED_VALIDATE")
HUGE_SHIFT: Final = 26
"""From this bit on MAP_HUGETLB tells the size, as a power of two; 0 for the usual one."""
_HUGE_SIZE: Final = 0x3F << HUGE_SHIFT
MAP_LEGACY: Final = _HUGE_SIZE | sum(
    bit for name, bit in MAP.items() if name not in _NOT_LEGACY and not name.startswith("HUGE_")
)
"""Flags that old kernels ignored when they did not know them (LEGACY_MAP_MASK)."""

MREMAP: Final = {"MAYMOVE": 1, "FIXED": 2, "DONTUNMAP": 4}
MS: Final = {"ASYNC": 1, "INVALIDATE": 2, "SYNC": 4}
MCL: Final = {"CURRENT": 1, "FUTURE": 2, "ONFAULT": 4}
MLOCK_ONFAULT: Final = 1

MADV: Final = {
    "NORMAL": 0,
    "RANDOM": 1,
    "SEQUENTIAL": 2,
    "WILLNEED": 3,
    "DONTNEED": 4,
    "FREE": 8,
    "REMOVE": 9,
    "DONTFORK": 10,
    "DOFORK": 11,
    "MERGEABLE": 12,
    "UNMERGEABLE": 13,
    "HUGEPAGE": 14,
    "NOHUGEPAGE": 15,
    "DONTDUMP": 16,
    "DODUMP": 17,
    "WIPEONFORK": 18,
    "KEEPONFORK": 19,
    "COLD": 20,
    "PAGEOUT": 21,
    "POPULATE_READ": 22,
    "POPULATE_WRITE": 23,
    "DONTNEED_LOCKED": 24,
    "COLLAPSE": 25,
    "HWPOISON": 100,
    "SOFT_OFFLINE": 101,
    "GUARD_INSTALL": 102,
    "GUARD_REMOVE": 103,
}

# Flags of a VMA. The first three are the PROT_ bits; MAY_, four bits higher, is the maximum.
READ: Final = PROT_READ
WRITE: Final = PROT_WRITE
EXEC: Final = PROT_EXEC
ACCESS: Final = READ | WRITE | EXEC
MAY_SHIFT: Final = 4
MAY_READ: Final = READ << MAY_SHIFT
MAY_WRITE: Final = WRITE << MAY_SHIFT
MAY_EXEC: Final = EXEC << MAY_SHIFT
SHARED: Final = 1 << 8
"""MAP_SHARED, and stores may reach the object."""
MAY_SHARE: Final = 1 << 9
"""MAP_SHARED was asked for, even of a descriptor that cannot write."""
GROWSDOWN: Final = 1 << 10
LOCKED: Final = 1 << 11
LOCKONFAULT: Final = 1 << 12
RANDOM: Final = 1 << 13
SEQUENTIAL: Final = 1 << 14
DONTFORK: Final = 1 << 15
WIPEONFORK: Final = 1 << 16
DONTDUMP: Final = 1 << 17
NORESERVE: Final = 1 << 18
ACCOUNT: Final = 1 << 19
"""Its private pages are promised: they count against the commit limit."""
HUGEPAGE: Final = 1 << 20
NOHUGEPAGE: Final = 1 << 21
MERGEABLE: Final = 1 << 22
SEALED: Final = 1 << 23
DROPPABLE: Final = 1 << 24
DEVICE: Final = 1 << 25
"""Pages of a driver: never merged, grown or moved in part (VM_IO, VM_PFNMAP)."""
SYNC: Final = 1 << 26
HUGETLB: Final = 1 << 27
"""Of the pool of huge pages: cut only between them."""
LOCKED_MASK: Final = LOCKED | LOCKONFAULT
