"""The names of mmap(2) and madvise(2): flags, protections, advice; and what cannot be asked for."""

from __future__ import annotations

import enum
import functools
import platform

__all__ = [
    "ADVICE",
    "INWARD",
    "MAP_TYPE",
    "PROTECTIONS",
    "MapFlag",
    "check_flags",
    "protection_bits",
]

MAP_TYPE = 0x0F
MAP_ANONYMOUS = 0x20
HUGE_MASK = 0x3F << 26


class MapFlag(enum.IntFlag):
    """The flags of mmap(2).

    Attributes:
        SHARED, PRIVATE, SHARED_VALIDATE: what `quire.map` calls ``sharing``. The last is the first,
            with unknown flags refused by the kernel.
        ANONYMOUS: memory of no file; implied where there is no source.
        FIXED: exactly at ``address``; what the process has mapped there is lost.
        FIXED_NOREPLACE: exactly at ``address``, or EEXIST where anything is mapped.
        POPULATE: all pages come before the call returns.
        LOCKED: as by `KernelMapping.lock`, but what cannot be locked is no error.
        HUGETLB: huge pages of the pool, `HUGE_2MB` or `HUGE_1GB`, or the default size.
        NORESERVE: no swap is set aside; touching more than there is ends the process.
        GROWSDOWN: it grows to lower addresses when touched below; private anonymous memory only.
        STACK: memory for the stack of a thread: small pages only (Linux 6.7).
        SYNC: stores are durable without a system call; DAX, and ``sharing="shared-validate"``.
        BIT32: MAP_32BIT: among the lowest 2 GiB of addresses; x86-64 only.
        NONBLOCK, UNINITIALIZED, DENYWRITE, EXECUTABLE: refused by quire, as the kernel does
            nothing with them.

    >>> MapFlag.POPULATE | MapFlag.NORESERVE
    <MapFlag.NORESERVE|POPULATE: 49152>
    """

    SHARED = 0x01
    PRIVATE = 0x02
    SHARED_VALIDATE = 0x03
    FIXED = 0x10
    ANONYMOUS = 0x20
    BIT32 = 0x40
    GROWSDOWN = 0x100
    DENYWRITE = 0x800
    EXECUTABLE = 0x1000
    LOCKED = 0x2000
    NORESERVE = 0x4000
    POPULATE = 0x8000
    NONBLOCK = 0x10000
    STACK = 0x20000
    HUGETLB = 0x40000
    SYNC = 0x80000
    FIXED_NOREPLACE = 0x100000
    UNINITIALIZED = 0x4000000
    HUGE_2MB = 21 << 26
    HUGE_1GB = 30 << 26


SHARINGS = {"shared": 1, "private": 2, "shared-validate": 3}

IGNORED = {
    MapFlag.NONBLOCK: "Linux ignores NONBLOCK, and with it POPULATE does nothing: leave it out",
    MapFlag.DENYWRITE: "Linux ignores DENYWRITE: leave it out",
    MapFlag.EXECUTABLE: "Linux ignores EXECUTABLE: leave it out, or ask for protection 'rx'",
}
UNINITIALIZED = "Linux with an MMU ignores UNINITIALIZED: memory comes zeroed; leave it out"

PROTECTIONS = {"none": 0, "r": 1, "w": 2, "rw": 3, "x": 4, "rx": 5, "wx": 6, "rwx": 7}

ADVICE = {
    "normal": 0,
    "random": 1,
    "sequential": 2,
    "willneed": 3,
    "dontneed": 4,
    "free": 8,
    "remove": 9,
    "dontfork": 10,
    "dofork": 11,
    "mergeable": 12,
    "unmergeable": 13,
    "hugepage": 14,
    "nohugepage": 15,
    "dontdump": 16,
    "dodump": 17,
    "wipeonfork": 18,
    "keeponfork": 19,
    "cold": 20,
    "pageout": 21,
    "populate_read": 22,
    "populate_write": 23,
    "dontneed_locked": 24,
    "collapse": 25,
    "hwpoison": 100,
    "soft_offline": 101,
    "guard_install": 102,
    "guard_remove": 103,
}
"""All of madvise(2) by name."""

INWARD = frozenset(
    {"dontneed", "free", "remove", "dontneed_locked", "pageout", "cold", "wipeonfork"}
    | {"guard_install", "hwpoison", "soft_offline", "collapse"}
)
"""Advice that takes something away: given to the pages wholly inside of a part."""


def protection_bits(protection: str) -> int:
    """The PROT_ bits of letters.

    >>> protection_bits("rw"), protection_bits("none")
    (3, 0)
    """
    bits = PROTECTIONS.get(protection)
    if bits is None:
        raise ValueError(
            f"there is no protection {protection!r}; there are: {', '.join(PROTECTIONS)}"
        )
    return bits


@functools.cache
def check_flags(sharing: str | None, flags: int, anonymous: bool, address: int | None) -> int:
    """The flags for mmap(2), with the one type of sharing.

    Raises:
        ValueError: not exactly one type is asked for, or a flag that would do nothing.
    """
    kind = flags & MAP_TYPE
    if sharing is not None:
        named = SHARINGS.get(sharing)
        if named is None:
            raise ValueError(f"there is no sharing {sharing!r}; there are: {', '.join(SHARINGS)}")
        if kind and kind != named:
            raise ValueError(f"sharing={sharing!r} and {MapFlag(kind)!r} are not the same")
        kind = named
    if not 1 <= kind <= 3:
        raise ValueError(
            'say whether stores are to be seen by others: sharing="shared" or sharing="private"'
        )
    if flags & ~MAP_TYPE:
        _check_others(kind, flags, anonymous, address)
    return (flags & ~MAP_TYPE) | kind | (MAP_ANONYMOUS if anonymous else 0)


def _check_others(kind: int, flags: int, anonymous: bool, address: int | None) -> None:
    for flag, reason in IGNORED.items():
        if flags & flag:
            raise ValueError(reason)
    huge = flags & MapFlag.HUGETLB
    if not huge and flags & HUGE_MASK == MapFlag.UNINITIALIZED:
        raise ValueError(UNINITIALIZED)
    if not huge and flags & HUGE_MASK:
        raise ValueError("without HUGETLB Linux ignores HUGE_2MB and HUGE_1GB: ask for both")
    if flags & MapFlag.ANONYMOUS and not anonymous:
        raise ValueError("ANONYMOUS memory is of no file, and Linux ignores one: leave out source")
    fixed = flags & (MapFlag.FIXED | MapFlag.FIXED_NOREPLACE)
    if fixed and address is None:
        raise ValueError("FIXED and FIXED_NOREPLACE need an address=")
    if flags & MapFlag.BIT32 and fixed:
        raise ValueError("with a fixed address Linux ignores BIT32: ask for one of the two")
    if flags & MapFlag.BIT32 and platform.machine() != "x86_64":
        raise ValueError(f"BIT32 is a flag of x86-64; this is {platform.machine()}")
    if flags & MapFlag.SYNC and kind != MapFlag.SHARED_VALIDATE:
        raise ValueError(
            'unless sharing="shared-validate" SYNC is ignored by some file systems and refused by '
            "others: ask for both"
        )
    if flags & MapFlag.GROWSDOWN and not (anonymous and kind == MapFlag.PRIVATE):
        raise ValueError("GROWSDOWN is for private anonymous memory only")
