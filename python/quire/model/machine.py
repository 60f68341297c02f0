"""The machine: physical memory, CPUs, disk, swap, page daemon, and the system's limits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.model import flags as f
from quire.model.device import DeviceObject
from quire.model.disk import Disk, DiskFile
from quire.model.errors import DiskError
from quire.model.file_object import FileObject
from quire.model.geometry import X86_64
from quire.model.huge_pool import HugePool
from quire.model.mmu import Mmu
from quire.model.pageout import Pageout
from quire.model.physical_memory import PhysicalMemory
from quire.model.swap import Swap
from quire.model.tlb import Tlb, usual_ways
from quire.model.trace import Trace
from quire.model.vma import holds_data

if TYPE_CHECKING:
    from quire.model.device import Driver
    from quire.model.geometry import Geometry
    from quire.model.page import Page
    from quire.model.policy import Policy
    from quire.model.space import Space

__all__ = ["Machine"]


class Machine:
    """Everything that address spaces share.

    Parameters: geometry: how addresses are translated. frames: how many pages may be in memory
        beside wired ones; None for as many as are asked for. swap: slots of swap; 0 for none, None
        without end. tlb: entries of each CPU's TLB; 0 for none. tlb_ways: in how many of them a
        page may lie; None for up to 4, as many as divide the entries. cpus: how many; `cpu` says
        which one runs. huge_pages: how many the pool of MAP_HUGETLB has, beside `frames`.
        disk_blocks: size of the disk in pages; None without end. memory_bytes: what the machine
        says it has, for overcommit and for the share that may be dirty. overcommit:
        vm.overcommit_memory: 0 refuses a single request beyond memory and swap, 1 nothing, 2 what
        exceeds half of memory plus swap in sum.
    """

    def __init__(
        self,
        geometry: Geometry = X86_64,
        *,
        frames: int | None = None,
        swap: int | None = 0,
        policy: Policy[Page] | None = None,
        tlb: int = 64,
        tlb_ways: int | None = None,
        cpus: int = 1,
        huge_pages: int = 0,
        disk_blocks: int | None = None,
        memory_bytes: int = 4 << 30,
        overcommit: int = 0,
        max_map_count: int = 65530,
    ) -> None:
        for name, value, least in (
            ("frames", frames, 1),
            ("swap", swap, 0),
            ("tlb", tlb, 0),
            ("tlb_ways", tlb_ways, 1),
            ("cpus", cpus, 1),
            ("huge_pages", huge_pages, 0),
            ("disk_blocks", disk_blocks, 0),
            ("memory_bytes", memory_bytes, 0),
            ("max_map_count", max_map_count, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name}={value} is too small: at least {least}")
        if overcommit not in (0, 1, 2):
            raise ValueError(f"overcommit={overcommit}: 0, 1 or 2")
        self.geometry = geometry
        self.trace = Trace()
        self.memory = PhysicalMemory(geometry.page_size)
        self.swap = Swap(self.trace, swap)
        self.disk = Disk(self.trace, disk_blocks)
        block_pages = geometry.block_size >> geometry.page_bits
        self.huge_pool = HugePool(self.memory, block_pages, huge_pages)
        memory_pages = memory_bytes >> geometry.page_bits
        self.pageout = Pageout(self.memory, self.swap, self.trace, frames, policy, memory_pages)
        ways = usual_ways(tlb) if tlb_ways is None else tlb_ways
        self.cpus = [Mmu(Tlb(tlb, ways), self.trace) for _ in range(cpus)]
        self.cpu = 0
        self.memory_bytes = memory_bytes
        self.overcommit = overcommit
        self.max_map_count = max_map_count
        self.lowest_address = geometry.page_size
        """vm.mmap_min_addr."""
        self.mmap_base = geometry.window_top - (1 << 30)
        """Below it mappings without a wish for a place go, downwards; the stack lies above."""
        self.brk_start = min(0x5555_0000_0000, geometry.page_up(geometry.half * 2 // 3))
        self.spaces: list[Space] = []
        self._asids = 0

    @property
    def mmu(self) -> Mmu:
        """The unit of the CPU that runs."""
        return self.cpus[self.cpu]

    def enlist(self, space: Space) -> None:
        """An address space begins."""
        self.spaces.append(space)

    def next_asid(self) -> int:
        """A number for an address space that no TLB knows yet."""
        self._asids += 1
        return self._asids

    def file(self, name: str, content: bytes = b"", *, on_disk: bool = True) -> FileObject:
        """A new file, on the disk (like ext4) or in memory alone (like shmem, memfd)."""
        backing = DiskFile(self.disk, name) if on_disk else None
        made = FileObject(self.pageout, name, backing=backing)
        made.write(0, content)
        return made

    def shared_anonymous(self, size_bytes: int) -> FileObject:
        """The object behind MAP_SHARED|MAP_ANONYMOUS: memory of a fixed size, without a name."""
        made = FileObject(self.pageout, "shm", size_bytes)
        made.linked = False
        return made

    def device(self, name: str, driver: Driver) -> DeviceObject:
        """A device with its driver."""
        return DeviceObject(self.pageout, name, driver)

    def shootdown(self, asid: int, first: int, count: int) -> None:
        """Makes every CPU forget translations that have changed in memory."""
        for number, cpu in enumerate(self.cpus):
            known = cpu.tlb.flush(asid, first, count)
            if number != self.cpu:
                self.trace.add("shootdown", cpu=number, page=first, count=count)
            elif known:
                self.trace.add("tlb flush", page=first, count=count)

    def may_grow(self, space: Space, flags: int, pages: int, *, locks: bool = False) -> bool:
        """Whether more pages with `flags` fit RLIMIT_AS, RLIMIT_DATA (and RLIMIT_MEMLOCK)."""
        bits = self.geometry.page_bits
        whole, data = space.limits["AS"], space.limits["DATA"]
        if whole is not None and space.mapped_pages() + pages > whole >> bits:
            return False
        if data is not None and holds_data(flags) and space.data_pages() + pages > data >> bits:
            return False
        return not locks or self.may_lock(space, flags, pages << bits)

    def may_lock(self, space: Space, flags: int, size: int) -> bool:
        """Whether `size` more bytes may be locked, if `flags` lock them (`mlock_future_ok`)."""
        limit = space.limits["MEMLOCK"]
        if not flags & f.LOCKED or space.may_lock_beyond_limit or limit is None:
            return True
        page = self.geometry.page_size
        return space.locked_bytes() + size <= limit // page * page

    def may_promise(self, pages: int) -> bool:
        """Whether `pages` more pages may be promised (`__vm_enough_memory`)."""
        bits = self.geometry.page_bits
        swap = len(self.swap.slots) if self.swap.size is None else self.swap.size
        total = (self.memory_bytes >> bits) + swap
        if self.overcommit == 0:
            return pages <= total
        if self.overcommit == 1:
            return True
        return self.promised_pages() + pages <= (self.memory_bytes >> bits) // 2 + swap

    def promised_pages(self) -> int:
        """Pages promised to all address spaces: private ones, shared memory (Committed_AS)."""
        vmas = [vma for space in self.spaces for vma in space.vmas]
        private = sum(vma.size for vma in vmas if vma.flags & f.ACCOUNT)
        shared = {vma.object for vma in vmas if vma.object is not None}
        return (private >> self.geometry.page_bits) + sum(each.promised for each in shared)

    def write_back(self) -> None:
        """Every dirty page of a file goes to the disk (sync(2)).

        What cannot be written stays dirty; nobody is there to be told.
        """
        objects = {
            page.owner for page in self.memory.pages if page is not None and page.owner is not None
        }
        for owner in sorted(objects, key=lambda owner: owner.name):
            try:
                owner.sync(0, 1 << 64)
            except DiskError as error:
                self.trace.add("disk error", errno=error.errno)

    def advance(self, seconds: int) -> None:
        """Lets time pass, in which the flusher writes what has been dirty too long, or too much."""
        if seconds < 0:
            raise ValueError(f"seconds={seconds} is too small: at least 0")
        self.pageout.flusher.advance(seconds)

    def poison(self, frame: int) -> None:
        """A frame's memory fails (MADV_HWPOISON, a machine check): its page can be used no more."""
        page = self.memory.pages[frame]
        if page is None:
            raise ValueError(f"frame {frame} holds no page")
        for space, number in list(page.mappings):
            space.forget_translation(number)
        page.poisoned = True
        self.memory.failed.add(frame)
        self.pageout.withdraw(page)  # it is never evicted, nor written anywhere
        self.trace.add("poison", frame=frame)

    def kill_largest(self) -> None:
        """The out-of-memory killer: ends the address space that holds the most pages."""
        victim = max(self.spaces, key=lambda space: len(space.overlay) + _shown(space))
        self.trace.add("oom kill", asid=victim.asid)
        self.end(victim)

    def end(self, space: Space) -> None:
        """Ends an address space: mappings, pages, tables, translations."""
        space.unmap(0, self.geometry.user_top)
        space.table.destroy()
        self.shootdown(space.asid, 0, 1 << 64)
        self.spaces.remove(space)
        space.alive = False


def _shown(space: Space) -> int:
    return len(space.table.leaves(0, space.geometry.user_top))
