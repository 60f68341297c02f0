"""mmap(2): a new mapping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.model import flags as f
from quire.model.calls.munmap import check_removal
from quire.model.calls.placement import find_place
from quire.model.calls.populate import populate
from quire.model.checks import Check, refuse_first
from quire.model.errors import CallError
from quire.model.file_object import FileObject
from quire.model.files import OpenFile
from quire.model.geometry import WORD
from quire.model.huge_pool import HugeObject
from quire.model.vma import Vma

if TYPE_CHECKING:
    from quire.model.memory_object import MemoryObject
    from quire.model.space import Space

__all__ = ["CHECKS_BEFORE_PLACE", "CHECKS_OF_KIND", "MmapRequest", "mmap"]

_LARGEST_FILE = (1 << 63) - 1
_TWO_MIB_BITS = 21


@dataclass
class MmapRequest:
    """The arguments of mmap, and what follows from them. `address` is the hint, then the place."""

    space: Space
    address: int
    length: int
    prot: int
    flags: int
    file: OpenFile | None
    offset: int
    vma_flags: int = 0

    def has(self, *names: str) -> bool:
        """Whether all of these MAP_ flags are set."""
        wanted = sum(f.MAP[name] for name in names)
        return self.flags & wanted == wanted

    @property
    def kind(self) -> int:
        """MAP_SHARED, MAP_PRIVATE, ..."""
        return self.flags & f.MAP_TYPE

    @property
    def huge(self) -> bool:
        """Whether it is of the pool of huge pages: a file of the system's, for mmap."""
        return self.has("ANON", "HUGETLB")

    @property
    def huge_size_known(self) -> bool:
        """Whether there are huge pages of the size asked for: a block's, or 2 MiB.

        Arm's larger granules have those, too (entries with the contiguous bit).
        """
        asked = self.flags >> f.HUGE_SHIFT & 0x3F
        return asked in (0, _TWO_MIB_BITS) or 1 << asked == self.space.geometry.block_size

    @property
    def anonymous(self) -> bool:
        """Whether there is no file."""
        return self.has("ANON") and not self.huge

    @property
    def shared(self) -> bool:
        """MAP_SHARED or MAP_SHARED_VALIDATE."""
        return self.kind in (f.MAP["SHARED"], f.MAP["SHARED_VALIDATE"])

    @property
    def fixed(self) -> bool:
        """Whether the address is an order and not a hint."""
        return self.has("FIXED") or self.has("FIXED_NOREPLACE")

    @property
    def size(self) -> int:
        """Bytes in whole pages, or huge pages; 0 if that wraps."""
        if self.has("HUGETLB"):
            block = self.space.geometry.block_size
            return (self.length + block - 1 & -block) % WORD
        return self.space.geometry.page_up(self.length)

    @property
    def end(self) -> int:
        """The end of the place."""
        return self.address + self.size

    @property
    def opened(self) -> OpenFile:
        """The file, where there must be one."""
        assert self.file is not None
        return self.file

    @property
    def may_store(self) -> bool:
        """Shared, and by a descriptor that can write."""
        return self.shared and self.opened.writable


def _offset_too_far(r: MmapRequest) -> bool:
    limit = _LARGEST_FILE if r.opened.kind in ("regular", "hugetlb") else WORD - 1
    bits = r.space.page_bits
    return r.size > limit or r.offset >> bits > (limit - r.size) >> bits


def _unknown_flags(r: MmapRequest) -> bool:
    known = f.MAP_LEGACY | (f.MAP["SYNC"] if r.opened.on_disk else 0)
    return r.kind == f.MAP["SHARED_VALIDATE"] and bool(r.flags & ~known)


CHECKS_BEFORE_PLACE: tuple[Check[MmapRequest], ...] = (
    Check("EINVAL", "the offset is not a multiple of the page size",
          lambda r: r.offset % r.space.geometry.page_size != 0),
    Check("EBADF", "no file, or one opened with O_PATH, without MAP_ANONYMOUS",
          lambda r: not r.anonymous and (r.file is None or r.file.only_path)),
    Check("EINVAL", "MAP_HUGETLB of a file that is not in hugetlbfs",
          lambda r: r.has("HUGETLB") and not r.huge),
    Check("EINVAL", "no huge pages of that size",
          lambda r: r.huge and not r.huge_size_known),
    Check("EINVAL", "length 0, or one that wraps when rounded up to huge pages",
          lambda r: r.length == 0 or (r.has("HUGETLB") and r.size == 0)),
    Check("ENOMEM", "the length wraps", lambda r: r.size == 0),
    Check("ENOMEM", "more than vm.max_map_count mappings",
          lambda r: len(r.space.vmas) > r.space.vmas.limit),
    Check("ENOMEM", "longer than user space", lambda r: r.size > r.space.geometry.user_top),
    Check("ENOMEM", "MAP_FIXED outside user space",
          lambda r: r.fixed and r.address > r.space.geometry.user_top - r.size),
    Check("EINVAL", "MAP_FIXED at an address that is no multiple of the page size",
          lambda r: r.fixed and r.address % r.space.geometry.page_size != 0),
    Check("EPERM", "MAP_FIXED below vm.mmap_min_addr without CAP_SYS_RAWIO",
          lambda r: r.fixed and r.address < r.space.machine.lowest_address
          and not r.space.may_map_low),
    Check("EINVAL", "MAP_FIXED of huge pages at an address that is no multiple of theirs",
          lambda r: r.fixed and r.has("HUGETLB") and r.address % r.space.geometry.block_size != 0),
    Check("EEXIST", "MAP_FIXED_NOREPLACE over a mapping",
          lambda r: r.has("FIXED_NOREPLACE") and bool(r.space.vmas.overlapping(r.address, r.end))),
)  # fmt: skip
"""do_mmap up to and in __get_unmapped_area."""

_LOCK_CHECKS: tuple[Check[MmapRequest], ...] = (
    Check("EPERM", "MAP_LOCKED and RLIMIT_MEMLOCK is 0",
          lambda r: r.has("LOCKED") and not may_lock_at_all(r.space)),
    Check("EAGAIN", "more locked memory than RLIMIT_MEMLOCK",
          lambda r: not r.space.machine.may_lock(r.space, r.vma_flags, r.size)),
)  # fmt: skip

_FILE_CHECKS: tuple[Check[MmapRequest], ...] = (
    Check("EOVERFLOW", "the offset is beyond what a file can have", _offset_too_far),
    Check("EOPNOTSUPP", "MAP_SHARED_VALIDATE with a flag that the file does not know",
          _unknown_flags),
    Check("EACCES", "a shared writable mapping of a descriptor that cannot write",
          lambda r: r.shared and bool(r.prot & f.PROT_WRITE) and not r.opened.writable),
    Check("EINVAL", "neither MAP_SHARED nor MAP_PRIVATE",
          lambda r: not r.shared and r.kind != f.MAP["PRIVATE"]),
    Check("EACCES", "the descriptor cannot read", lambda r: not r.opened.readable),
    Check("EPERM", "code of a file system that runs no programs",
          lambda r: bool(r.prot & f.PROT_EXEC) and not r.opened.executable),
    Check("ENODEV", "the file has no mmap operation", lambda r: not r.opened.mappable),
    Check("EINVAL", "MAP_GROWSDOWN of a file", lambda r: r.has("GROWSDOWN")),
    Check("EPERM", "the file is sealed against writing",
          lambda r: bool(r.prot & f.PROT_WRITE) and _sealed(r)),
)  # fmt: skip

_ANONYMOUS_CHECKS: tuple[Check[MmapRequest], ...] = (
    Check("EINVAL", "neither MAP_SHARED, MAP_PRIVATE nor MAP_DROPPABLE",
          lambda r: r.kind not in (f.MAP["SHARED"], f.MAP["PRIVATE"], f.MAP["DROPPABLE"])),
    Check("EINVAL", "MAP_GROWSDOWN of shared or droppable memory",
          lambda r: r.has("GROWSDOWN") and r.kind != f.MAP["PRIVATE"]),
    Check("EINVAL", "MAP_LOCKED of droppable memory",
          lambda r: r.has("LOCKED") and r.kind == f.MAP["DROPPABLE"]),
)  # fmt: skip

CHECKS_OF_KIND = {"lock": _LOCK_CHECKS, "file": _FILE_CHECKS, "anonymous": _ANONYMOUS_CHECKS}
"""The rest of do_mmap: locks, then what depends on a file."""


def mmap(
    space: Space,
    address: int,
    length: int,
    prot: int,
    flags: int,
    file: OpenFile | None,
    offset: int,
) -> int:
    """See `AddressSpace.mmap`."""
    r = MmapRequest(space, address, length, prot & f.ACCESS, flags, file, offset)
    if r.has("ANON"):
        owner = None if r.shared or r.has("NORESERVE") else space
        r.file = _huge_file(space, r.size, owner) if r.huge else None
    if not r.fixed:
        r.address = max(address & -space.geometry.page_size, 0)
        if 0 < r.address < space.machine.lowest_address:
            r.address = space.machine.lowest_address
    refuse_first(CHECKS_BEFORE_PLACE, r)
    r.vma_flags = _vma_flags(r)
    if not r.fixed:
        r.address = _place(r)
    refuse_first(_LOCK_CHECKS, r)
    refuse_first(_ANONYMOUS_CHECKS if r.anonymous else _FILE_CHECKS, r)
    populates = r.vma_flags & f.LOCKED or (r.has("POPULATE") and not r.has("NONBLOCK"))
    _finish_flags(r)
    _map(r)
    space.machine.trace.add("mmap", start=r.address, end=r.end)
    if populates:
        populate(space, r.address, r.end, ignore_errors=True)
    return r.address


def may_lock_at_all(space: Space) -> bool:
    """`can_do_mlock`: a limit other than 0, or CAP_IPC_LOCK."""
    return space.may_lock_beyond_limit or space.limits["MEMLOCK"] != 0


def _vma_flags(r: MmapRequest) -> int:
    flags = r.prot | f.MAY_READ | f.MAY_WRITE | f.MAY_EXEC | r.space.future_flags
    for name, bit in (
        ("GROWSDOWN", f.GROWSDOWN),
        ("LOCKED", f.LOCKED),
        ("STACK", f.NOHUGEPAGE),
        ("SYNC", f.SYNC),
    ):
        flags |= bit if r.has(name) else 0
    return flags


def _place(r: MmapRequest) -> int:
    huge = r.space.geometry.block_size
    align = huge if r.huge else 0
    phase = 0
    if r.anonymous and r.kind == f.MAP["PRIVATE"] and not r.address and r.size % huge == 0:
        align = huge
    if r.file is not None and r.file.on_disk and r.size >= huge:
        align, phase = huge, r.offset % huge
        first_whole = -(-r.offset // huge) * huge
        if r.offset + r.size - first_whole < huge:
            align = 0
    low, high = r.has("F32BIT"), r.has("ABOVE4G")
    return find_place(r.space, r.size, r.address, align=align, phase=phase, low=low, high=high)


def _sealed(r: MmapRequest) -> bool:
    target = r.opened.object
    return r.may_store and isinstance(target, FileObject) and target.write_sealed


def _huge_file(space: Space, size: int, owner: Space | None) -> OpenFile:
    """What MAP_HUGETLB maps: a file made for it."""
    machine = space.machine
    made = HugeObject(machine.pageout, machine.huge_pool, size, owner)
    return OpenFile(made.name, "hugetlb", made)


def _finish_flags(r: MmapRequest) -> None:
    """What the kind of mapping and the descriptor add and take away."""
    if r.huge:
        r.vma_flags |= f.HUGETLB
    if r.kind == f.MAP["DROPPABLE"]:
        r.vma_flags |= f.DROPPABLE | f.NORESERVE | f.WIPEONFORK | f.DONTDUMP
    elif r.anonymous and r.shared:
        r.vma_flags |= f.SHARED | f.MAY_SHARE
    elif r.shared:
        r.vma_flags |= f.MAY_SHARE | f.SHARED
        if not r.opened.writable:
            r.vma_flags &= ~(f.MAY_WRITE | f.SHARED)
        if r.opened.kind == "device":
            r.vma_flags |= f.DEVICE
        target = r.opened.object
        if isinstance(target, FileObject) and target.write_sealed:
            r.vma_flags &= ~f.MAY_WRITE
    if r.vma_flags & (f.DROPPABLE | f.DEVICE | f.HUGETLB):
        r.vma_flags &= ~f.LOCKED_MASK  # of what cannot be locked, mlockall's promise is forgotten
    if r.has("NORESERVE") and r.space.machine.overcommit != 2:
        r.vma_flags |= f.NORESERVE


def _map(r: MmapRequest) -> None:
    """mmap_region: removes what is in the way, checks the limits, inserts."""
    space, machine = r.space, r.space.machine
    check_removal(space, r.address, r.end)
    old = space.vmas.overlapping(r.address, r.end)
    gone = sum(min(vma.end, r.end) - max(vma.start, r.address) for vma in old) >> space.page_bits
    pages = r.size >> space.page_bits
    if not machine.may_grow(space, r.vma_flags, pages - gone):
        raise CallError("ENOMEM", "RLIMIT_AS or RLIMIT_DATA")
    if r.vma_flags & (f.NORESERVE | f.SHARED | f.WRITE | f.HUGETLB) == f.WRITE:
        promised = sum(
            min(vma.end, r.end) - max(vma.start, r.address) for vma in old if vma.flags & f.ACCOUNT
        )
        if not machine.may_promise(pages - (promised >> space.page_bits)):
            raise CallError("ENOMEM", "more memory than may be promised")
        r.vma_flags |= f.ACCOUNT
    vma = _vma(r)
    files = [old.object for old in old if isinstance(old.object, HugeObject) and not old.private]
    for target in files:
        target.attach(space)  # what they hold of the pool is free only when this mapping is there
    space.unmap(r.address, r.end)
    try:
        _ask_file(r, vma.object)
        space.vmas.add(vma)
    finally:
        for target in files:
            target.detach(space)
            target.unmapped()


def _ask_file(r: MmapRequest, target: MemoryObject | None) -> None:
    """The file is asked last; when it refuses, what was mapped there is gone (since Linux 6.12).

    Memory shared without a file is of one made for it, and is promised as a whole.
    """
    nameless = target is not None and (r.anonymous or r.opened.kind == "zero")
    if target is not None and nameless and not r.vma_flags & f.NORESERVE:
        pages = r.size >> r.space.page_bits
        if not r.space.machine.may_promise(pages):
            raise CallError("ENOMEM", "more shared memory than may be promised")
        target.promised = pages
    if r.file is not None and isinstance(r.file.object, HugeObject):
        _promise_huge_pages(r, r.file.object)
    if r.vma_flags & f.SYNC and r.file is not None and r.file.on_disk:
        raise CallError("EOPNOTSUPP", "MAP_SYNC of a file that is not on persistent memory")


def _promise_huge_pages(r: MmapRequest, target: HugeObject) -> None:
    """The file grows to what a writable mapping shows; its pages are promised unless NORESERVE."""
    block = r.space.geometry.block_size
    if r.offset % block:
        raise CallError("EINVAL", "the offset is no multiple of the huge page")
    first = r.offset // block
    if not r.has("NORESERVE") and not target.promise(first, first + r.size // block):
        raise CallError("ENOMEM", "the pool of huge pages has not so many that are not promised")
    if r.prot & f.PROT_WRITE:
        target.size = max(target.size, r.offset + r.size)


def _vma(r: MmapRequest) -> Vma:
    bits = r.space.page_bits
    if r.anonymous and not r.shared:
        return Vma(r.address, r.end, r.vma_flags, r.address >> bits)
    target: MemoryObject | None
    if r.anonymous or (r.opened.kind == "zero" and r.vma_flags & f.SHARED):
        target = r.space.machine.shared_anonymous(r.size)
        offset = 0 if r.anonymous else r.offset >> bits  # of /dev/zero it counts, strangely
        return Vma(r.address, r.end, r.vma_flags, offset, target)
    target = None if r.opened.kind == "zero" else r.opened.object
    return Vma(r.address, r.end, r.vma_flags, r.offset >> bits, target, r.file)
