"""An address space: a process, as far as memory goes. Each system call is a method.

Addresses and lengths are integers in bytes, flags the numbers of `quire.model.flags`. A call that
fails raises `CallError` with the errno that Linux 6.18 gives, and leaves behind what Linux leaves
behind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.model.calls.brk import brk
from quire.model.calls.fork import fork
from quire.model.calls.madvise import madvise
from quire.model.calls.mincore import mincore
from quire.model.calls.mlock import mlock, mlockall, munlock, munlockall
from quire.model.calls.mmap import mmap
from quire.model.calls.mprotect import mprotect
from quire.model.calls.mremap import mremap
from quire.model.calls.mseal import mseal
from quire.model.calls.msync import msync
from quire.model.calls.munmap import munmap
from quire.model.calls.remap_file_pages import remap_file_pages
from quire.model.errors import CallError, ModelError, Signalled
from quire.model.space import Space

if TYPE_CHECKING:
    from quire.model.files import OpenFile
    from quire.model.machine import Machine

__all__ = ["AddressSpace"]

_FORWARD_COPY_BYTES = 64


class AddressSpace(Space):
    """An empty address space on a machine.

    >>> from quire.model import AddressSpace, Machine
    >>> space = AddressSpace(Machine())
    >>> at = space.mmap(0, 8192, prot=3, flags=0x22)
    >>> space.store(at + 4090, b"across pages")
    >>> space.load(at + 4090, 12), len(space.overlay)
    (b'across pages', 2)
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine, machine.next_asid())
        machine.enlist(self)

    def mmap(
        self,
        address: int,
        length: int,
        prot: int,
        flags: int,
        file: OpenFile | None = None,
        offset: int = 0,
    ) -> int:
        """Maps `file`, or with MAP_ANONYMOUS memory; returns the address."""
        return mmap(self, address, length, prot, flags, file, offset)

    def munmap(self, address: int, length: int) -> None:
        """Ends all mappings in a range; holes are fine."""
        munmap(self, address, length)

    def mprotect(self, address: int, length: int, prot: int) -> None:
        """Changes the protection. What precedes a hole or a refusal has been changed."""
        mprotect(self, address, length, prot)

    def mremap(self, address: int, old: int, new: int, flags: int = 0, target: int = 0) -> int:
        """Shrinks, grows or moves a mapping; returns the address."""
        return mremap(self, address, old, new, flags, target)

    def msync(self, address: int, length: int, flags: int) -> None:
        """Writes what was stored through shared mappings to the disk."""
        msync(self, address, length, flags)

    def madvise(self, address: int, length: int, advice: int) -> None:
        """Gives advice, or one of the orders that are called advice."""
        madvise(self, address, length, advice)

    def mincore(self, address: int, length: int) -> list[bool]:
        """Whether each page of a range is in memory."""
        return mincore(self, address, length)

    def mlock(self, address: int, length: int) -> None:
        """Brings pages in and keeps them in memory."""
        mlock(self, address, length)

    def mlock2(self, address: int, length: int, flags: int) -> None:
        """Locks pages; with MLOCK_ONFAULT each when it is touched."""
        mlock(self, address, length, flags)

    def munlock(self, address: int, length: int) -> None:
        """Lets pages be evicted again."""
        munlock(self, address, length)

    def mlockall(self, flags: int) -> None:
        """Locks all mappings, those to come, or both."""
        mlockall(self, flags)

    def munlockall(self) -> None:
        """Unlocks everything, now and in future."""
        munlockall(self)

    def remap_file_pages(self, address: int, size: int, prot: int, page: int) -> None:
        """Shows other pages of the same object in part of a shared mapping."""
        remap_file_pages(self, address, size, prot, page)

    def mseal(self, address: int, length: int, flags: int = 0) -> None:
        """Forbids changes of mappings for ever."""
        mseal(self, address, length, flags)

    def brk(self, end: int) -> int:
        """Moves the end of the heap; returns it: the old one if it could not be moved."""
        return brk(self, end)

    def fork(self) -> AddressSpace:
        """The address space of a child."""
        child = AddressSpace(self.machine)
        try:
            fork(self, child)
        except ModelError:
            child.exit()
            raise
        return child

    def exit(self) -> None:
        """Everything ends, and all that nobody else holds is freed."""
        self.machine.end(self)

    # System calls whose buffer lies here: EFAULT instead of a signal.

    def read_into(self, file: OpenFile, address: int, count: int, offset: int) -> int:
        """pread(2) of `file` into memory, page by page: as many bytes as could be stored."""
        file.check_access(offset, file.readable, "read")
        if address + count > self.geometry.user_top:
            raise CallError("EFAULT", f"a bad buffer at {address:#x}")
        done = 0
        while True:
            part = file.pread(self._chunk(file, offset + done, count - done), offset + done)
            stored = self.copy_out(address + done, part)
            if not stored and part and not done:
                raise CallError("EFAULT", f"a bad buffer at {address:#x}")
            done += stored
            if not part or stored < len(part):
                return done

    def write_from(self, file: OpenFile, address: int, count: int, offset: int) -> int:
        """pwrite(2) to `file` out of memory, page by page: as many bytes as could be read.

        A bad buffer leaves a file that ended before `offset` longer, as Linux does: the size is set
        before the copy has failed.
        """
        file.check_access(offset, file.writable, "write")
        if address + count > self.geometry.user_top:
            raise CallError("EFAULT", f"a bad buffer at {address:#x}")
        if file.kind == "zero":
            return file.pwrite(bytes(count), offset)
        done = 0
        while done < count:
            step = self._chunk(file, offset + done, count - done)
            part = self.copy_in(address + done, step)
            if not part and not done:
                if not file.appends:
                    file.regular().write_failed(offset, step)
                part = self.copy_in(address, step)  # it may lie in the file, which is longer now
                if not part:
                    raise CallError("EFAULT", f"a bad buffer at {address:#x}")
            written = file.pwrite(part, offset + done)
            done += written
            if not part or written < len(part):
                break  # after a short copy it is tried once more: the file may have grown
        return done

    def pipe_write_from(self, pipe: OpenFile, address: int, count: int) -> int:
        """write(2) to a pipe that has room: each of its pages takes all of its part, or nothing.

        What is more than whole pages goes first, into the last page if it has room for it.
        """
        page, done = self.geometry.page_size, 0
        rest = count % page
        wanted = rest if rest and 0 < pipe.fill <= page - rest else min(page, count)
        before = pipe.fill if wanted == rest else 0
        while done < count:
            if len(self.copy_in(address + done, wanted)) < wanted:
                if not done:
                    raise CallError("EFAULT", f"a bad buffer at {address:#x}")
                break
            pipe.fill = before + wanted
            done, before = done + wanted, 0
            wanted = min(page, count - done)
        return done

    def copy_out(self, address: int, content: bytes) -> int:
        """Stores into memory for a system call, up to the first fault; says how many bytes."""
        try:
            self.store(address, content)
        except Signalled as signal:
            if not self.alive:
                raise
            return signal.done
        return len(content)

    def copy_in(self, address: int, count: int) -> bytes:
        """Reads memory for a system call, up to the first fault."""
        try:
            return self.load(address, count)
        except Signalled as signal:
            if not self.alive:
                raise
            return self.load(address, signal.done)

    def _chunk(self, file: OpenFile, offset: int, left: int) -> int:
        """Bytes to copy at once: system calls copy from page to page of a file.

        Where the file is mapped here, the copy may run into what it has just written; small steps
        then show what a forward copy shows.
        """
        step = self.geometry.page_size
        if file.object is not None and self in file.object.mappers:
            step = _FORWARD_COPY_BYTES
        return min(left, step - offset % step)
