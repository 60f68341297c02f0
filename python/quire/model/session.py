"""A session with a machine: one line of words is one step, and every step shows its events.

::

    machine [geometry=NAME | page_bits=N index_bits=N,N..] [frames=N] [swap=N|endless] [tlb=N]
            [policy=two-lists|fifo|lru|clock] [cpus=N] [huge=N] [disk=N] [memory=SIZE]
            [overcommit=0|1|2] [maps=N]
    file NAME SIZE [memory]          a file on the disk, or in memory alone; page n holds letter n
    break FILE BLOCK                 its block can be read and written no more
    poison ADDRESS                   the memory of its frame fails
    device NAME                      the demo device: a counter and a register
    mmap LENGTH [PROT] [FLAG,FLAG..] [file=NAME] [off=N] [at=ADDRESS] [as=NAME]
    munmap ADDRESS LENGTH            mprotect ADDRESS LENGTH PROT
    mremap ADDRESS OLD NEW [FLAG,..] [to=ADDRESS] [as=NAME]
    msync ADDRESS LENGTH [FLAG,..]   madvise ADDRESS LENGTH ADVICE
    mlock ADDRESS LENGTH [ONFAULT]   munlock ADDRESS LENGTH
    mlockall [FLAG,FLAG..]           munlockall
    remap_file_pages ADDRESS LENGTH PAGE                           brk [ADDRESS]
    limit AS|DATA|MEMLOCK|STACK SIZE (with MEMLOCK goes the privilege to exceed it)
    mincore ADDRESS LENGTH           mseal ADDRESS LENGTH
    load ADDRESS [COUNT]             store ADDRESS TEXT            fetch ADDRESS
    fork NAME                        process NAME                  exit             cpu N
    read FILE OFFSET COUNT           write FILE OFFSET TEXT        truncate FILE SIZE
    punch FILE OFFSET COUNT          sync FILE
    writeback                        wait SECONDS: the flusher writes by age and share
    maps                             smaps                         pagemap ADDRESS
    tables                           tlb                           statistics
    entry ADDRESS FRAME [PROT] [level=N]   puts a translation (at level 1 or 2 a block's) into a
                                     page table of your own; `k` in PROT: for the kernel alone
    entry ADDRESS none [level=N]     takes it away
    entry ADDRESS table PROT level=N limits the rights of all below an entry of a table
    translate ADDRESS [ACCESS] [user|kernel]   walks it (or, without one, the process's) as the
                                     hardware does
    faults FRAMES POLICY,.. PAGE..   counts the faults of a reference string

Numbers may be hexadecimal (0x..) and end in K, M, G or p (pages); an address may be a name given
with `as=`, plus a number: `heap+2p`. `#` begins a comment.

>>> session = Session()
>>> print(session.do("faults 3 fifo,lru,opt 1 2 3 4 1 2 5 1 2 3 4 5").result)
fifo: 9 faults
lru: 10 faults
opt: 7 faults
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from quire.model import flags as f
from quire.model.address_space import AddressSpace
from quire.model.device import CounterDriver
from quire.model.errors import CallError, DiskError, OutOfMemory, Signalled
from quire.model.files import OpenFile
from quire.model.geometry import GEOMETRIES, X86_ENTRIES, Geometry
from quire.model.machine import Machine
from quire.model.mmu import Access, NonCanonicalAddress, PageFault
from quire.model.page_table import PageTable
from quire.model.policy import POLICIES, count_faults
from quire.model.step import SessionError, Step
from quire.model.views import maps, pagemap, smaps

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Session", "SessionError", "Step"]

_INDEX_BITS_MAX, _PAGE_BITS_MAX, _ADDRESS_BITS_MAX = 20, 20, 64
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Session:
    """A machine, its processes by name, and the names that addresses were given."""

    def __init__(self) -> None:
        self._start(Machine())

    def do(self, line: str) -> Step:
        """Does one line. A failed call or access is an answer; nonsense raises `SessionError`."""
        words = line.split("#")[0].split()
        if not words:
            return Step(line)
        if words[0] not in _VERBS:
            raise SessionError(f"no verb {words[0]!r}: one of {', '.join(_VERBS)}")
        verb = getattr(self, "_verb_" + words[0])
        try:
            result, error = self._call(verb, words), None
        except (CallError, Signalled, DiskError, OutOfMemory, PageFault) as refused:
            result, error = "", str(refused)
        except NonCanonicalAddress as refused:
            result, error = "", f"not a canonical address: {refused}"
        self._forget_the_dead()
        return Step(line.strip(), self.machine.trace.take(), result, error)

    def _start(self, machine: Machine) -> None:
        self.machine = machine
        machine.trace.on = True
        self.spaces = {"init": AddressSpace(machine)}
        self.space = self.spaces["init"]
        self.files: dict[str, OpenFile] = {}
        self.names: dict[str, int] = {}
        self.own_table: PageTable | None = None

    def _forget_the_dead(self) -> None:
        """Processes that left or were killed for want of memory; when none is left, init begins."""
        self.spaces = {name: space for name, space in self.spaces.items() if space.alive}
        if not self.spaces:
            self.spaces["init"] = AddressSpace(self.machine)
        if not self.space.alive:
            self.space = next(iter(self.spaces.values()))

    @staticmethod
    def _call(verb: Callable[..., str], words: list[str]) -> str:
        named = dict(word.split("=", 1) for word in words[1:] if "=" in word)
        plain = [word for word in words[1:] if "=" not in word]
        try:
            bound = inspect.signature(verb).bind(*plain, **named)
            if bound.arguments.get("names", {}).keys() - {"as"}:
                raise TypeError(f"there is no {' or '.join(bound.arguments['names'])}=")
        except TypeError as error:
            raise SessionError(f"{words[0]}: {error}; see `help`") from None
        return verb(*plain, **named)

    # Words.

    def _number(self, word: str) -> int:
        page, unit = self.machine.geometry.page_size, word[-1:]
        scale = {**_UNITS, "p": page}.get(unit, 1)
        try:
            return int(word[:-1] if scale != 1 else word, 0) * scale
        except ValueError:
            raise SessionError(f"{word!r} is no number, nor a name given with as=") from None

    def _count(self, word: str, least: int = 0) -> int:
        """A number that may not be less than `least`."""
        number = self._number(word)
        if number < least:
            raise SessionError(f"{word!r} is too small: at least {least}")
        return number

    def _address(self, word: str) -> int:
        name, _, more = word.partition("+")
        base = self.names[name] if name in self.names else self._count(name)
        address = base + (self._number(more) if more else 0)
        if not 0 <= address < 1 << 64:
            raise SessionError(f"{word!r} is no address of 64 bits")
        return address

    @staticmethod
    def _flags(words: str, known: dict[str, int]) -> int:
        total = 0
        for word in filter(None, words.upper().split(",")):
            if word not in known:
                raise SessionError(f"no flag {word!r}: of {', '.join(known)}")
            total |= known[word]
        return total

    @staticmethod
    def _prot(word: str) -> int:
        bits = {"r": f.PROT_READ, "w": f.PROT_WRITE, "x": f.PROT_EXEC, "-": 0}
        if not set(word) <= bits.keys():
            raise SessionError(f"{word!r} is no protection: letters of rwx, or -")
        return sum(bits[letter] for letter in set(word))

    def _named(self, names: dict[str, str], address: int) -> str:
        """Keeps an address under the name given with `as=`, which Python takes no argument for."""
        if names:
            self.names[names["as"]] = address
        return f"{address:#x}"

    def _file_of(self, name: str) -> OpenFile:
        if name not in self.files:
            raise SessionError(f"no file {name!r}: make it with `file {name} SIZE`")
        return self.files[name]

    # The machine.

    def _verb_machine(
        self,
        geometry: str = "x86-64",
        page_bits: str = "",
        index_bits: str = "",
        frames: str = "",
        swap: str = "0",
        tlb: str = "64",
        policy: str = "two-lists",
        cpus: str = "1",
        huge: str = "0",
        disk: str = "",
        memory: str = "4G",
        overcommit: str = "0",
        maps: str = "65530",
    ) -> str:
        if page_bits or index_bits:
            shape = self._own_geometry(page_bits, index_bits)
        elif geometry in GEOMETRIES:
            shape = GEOMETRIES[geometry]
        else:
            raise SessionError(f"no geometry {geometry!r}: of {', '.join(GEOMETRIES)}")
        if overcommit not in ("0", "1", "2"):
            raise SessionError(f"no overcommit {overcommit!r}: 0, 1 or 2")
        if policy not in POLICIES:
            raise SessionError(f"no policy {policy!r}: of {', '.join(POLICIES)}")
        machine = Machine(
            shape,
            frames=self._count(frames, 1) if frames else None,
            swap=None if swap == "endless" else self._count(swap),
            policy=POLICIES[policy](),
            tlb=self._count(tlb),
            cpus=self._count(cpus, 1),
            huge_pages=self._count(huge),
            disk_blocks=self._count(disk) if disk else None,
            memory_bytes=self._count(memory),
            overcommit=self._count(overcommit),
            max_map_count=self._count(maps),
        )
        self._start(machine)
        return f"{shape.name}: pages of {shape.page_size} bytes, {shape.address_bits} address bits"

    def _own_geometry(self, page_bits: str, index_bits: str) -> Geometry:
        """The shape of a textbook's machine."""
        if not page_bits or not index_bits:
            raise SessionError("a machine of your own needs page_bits= and index_bits=")
        widths = tuple(self._count(width, 1) for width in index_bits.split(","))
        shape = Geometry("own", self._count(page_bits, 1), widths, X86_ENTRIES, False)
        if max(widths) > _INDEX_BITS_MAX or shape.page_bits > _PAGE_BITS_MAX:
            raise SessionError(
                f"a table has at most {_INDEX_BITS_MAX} index bits, a page {_PAGE_BITS_MAX}"
            )
        if shape.address_bits > _ADDRESS_BITS_MAX:
            raise SessionError(
                f"{shape.address_bits} address bits: at most {_ADDRESS_BITS_MAX}, as a word has"
            )
        return shape

    def _verb_file(self, name: str, size: str, place: str = "disk") -> str:
        page = self.machine.geometry.page_size
        count = self._count(size)
        content = b"".join(
            bytes([ord("A") + number % 26]) * page for number in range(-(-count // page))
        )
        made = self.machine.file(name, content[:count], on_disk=place != "memory")
        self.files[name] = OpenFile(name, "regular", made)
        return f"{name}: {count} bytes"

    def _verb_device(self, name: str) -> str:
        made = self.machine.device(name, CounterDriver())
        self.files[name] = OpenFile(name, "device", made)
        return f"{name}: a counter (page 0) and a register (page 1)"

    # System calls.

    def _verb_mmap(
        self,
        length: str,
        prot: str = "rw",
        flags: str = "",
        file: str = "",
        off: str = "0",
        at: str = "0",
        **names: str,
    ) -> str:
        bits = self._flags(flags, f.MAP)
        if not bits & f.MAP_TYPE:
            bits |= f.MAP["PRIVATE"]
        opened = self._file_of(file) if file else None
        if opened is None:
            bits |= f.MAP["ANON"]
        place = self.space.mmap(
            self._address(at),
            self._number(length),
            self._prot(prot),
            bits,
            opened,
            self._number(off),
        )
        return self._named(names, place)

    def _verb_munmap(self, address: str, length: str) -> str:
        self.space.munmap(self._address(address), self._number(length))
        return "done"

    def _verb_mprotect(self, address: str, length: str, prot: str) -> str:
        self.space.mprotect(self._address(address), self._number(length), self._prot(prot))
        return "done"

    def _verb_mremap(
        self, address: str, old: str, new: str, flags: str = "", to: str = "0", **names: str
    ) -> str:
        place = self.space.mremap(
            self._address(address),
            self._number(old),
            self._number(new),
            self._flags(flags, f.MREMAP),
            self._address(to),
        )
        return self._named(names, place)

    def _verb_msync(self, address: str, length: str, flags: str = "SYNC") -> str:
        bits = self._flags(flags, f.MS)
        self.space.msync(self._address(address), self._number(length), bits)
        return "done"

    def _verb_madvise(self, address: str, length: str, advice: str) -> str:
        bits = self._flags(advice, f.MADV)
        self.space.madvise(self._address(address), self._number(length), bits)
        return "done"

    def _verb_mlock(self, address: str, length: str, flags: str = "") -> str:
        bits = self._flags(flags, {"ONFAULT": f.MLOCK_ONFAULT})
        self.space.mlock2(self._address(address), self._number(length), bits)
        return f"{self.space.locked_bytes()} bytes locked"

    def _verb_mlockall(self, flags: str = "CURRENT") -> str:
        self.space.mlockall(self._flags(flags, f.MCL))
        return f"{self.space.locked_bytes()} bytes locked"

    def _verb_munlockall(self) -> str:
        self.space.munlockall()
        return f"{self.space.locked_bytes()} bytes locked"

    def _verb_remap_file_pages(self, address: str, length: str, page: str) -> str:
        where, size = self._address(address), self._number(length)
        self.space.remap_file_pages(where, size, 0, self._number(page))
        return "done"

    def _verb_brk(self, end: str = "0") -> str:
        return f"the heap ends at {self.space.brk(self._address(end)):#x}"

    def _verb_limit(self, name: str, size: str) -> str:
        if name not in self.space.limits:
            raise SessionError(f"no limit {name!r}: of {', '.join(self.space.limits)}")
        self.space.limits[name] = self._count(size)
        if name == "MEMLOCK":
            self.space.may_lock_beyond_limit = False
        return f"RLIMIT_{name} is {self._count(size)} bytes"

    def _verb_munlock(self, address: str, length: str) -> str:
        self.space.munlock(self._address(address), self._number(length))
        return f"{self.space.locked_bytes()} bytes locked"

    def _verb_mincore(self, address: str, length: str) -> str:
        resident = self.space.mincore(self._address(address), self._number(length))
        return "".join("1" if here else "0" for here in resident)

    def _verb_mseal(self, address: str, length: str) -> str:
        self.space.mseal(self._address(address), self._number(length))
        return "done"

    # Accesses and processes.

    def _verb_load(self, address: str, count: str = "1") -> str:
        return repr(self.space.load(self._address(address), self._count(count)))[1:]

    def _verb_store(self, address: str, text: str, *more: str) -> str:
        content = " ".join((text, *more)).encode()
        self.space.store(self._address(address), content)
        return f"{len(content)} bytes stored"

    def _verb_fetch(self, address: str) -> str:
        return f"{self.space.fetch(self._address(address)):#04x}"

    def _verb_fork(self, name: str) -> str:
        if name in self.spaces:
            raise SessionError(f"there is a process {name!r}")
        self.spaces[name] = self.space.fork()
        return f"{name} is address space {self.spaces[name].asid}"

    def _verb_process(self, name: str) -> str:
        if name not in self.spaces:
            raise SessionError(f"no process {name!r}: of {', '.join(self.spaces)}")
        self.space = self.spaces[name]
        return f"{name} runs"

    def _verb_exit(self) -> str:
        name = next(name for name, space in self.spaces.items() if space is self.space)
        self.space.exit()
        return f"{name} has ended"

    def _verb_cpu(self, number: str) -> str:
        if self._count(number) >= len(self.machine.cpus):
            raise SessionError(f"no CPU {number}: there are {len(self.machine.cpus)}")
        self.machine.cpu = self._count(number)
        return f"CPU {number} runs"

    # Files.

    def _verb_read(self, file: str, offset: str, count: str) -> str:
        content = self._file_of(file).pread(self._count(count), self._number(offset))
        return repr(content)[1:]

    def _verb_write(self, file: str, offset: str, text: str, *more: str) -> str:
        content = " ".join((text, *more)).encode()
        done = self._file_of(file).pwrite(content, self._number(offset))
        return f"{done} bytes written"

    def _verb_truncate(self, file: str, size: str) -> str:
        self._file_of(file).ftruncate(self._number(size))
        return "done"

    def _verb_punch(self, file: str, offset: str, count: str) -> str:
        self._file_of(file).punch(self._number(offset), self._number(count))
        return "done"

    def _verb_sync(self, file: str) -> str:
        self._file_of(file).fsync()
        return "done"

    def _verb_writeback(self) -> str:
        self.machine.write_back()
        return "done"

    def _verb_wait(self, seconds: str) -> str:
        self.machine.advance(self._count(seconds))
        return f"it is {self.machine.pageout.flusher.now_s} s"

    def _verb_break(self, file: str, block: str) -> str:
        self.machine.disk.broken.add((self._file_of(file).name, self._count(block)))
        return f"block {self._count(block)} of {file} is broken"

    def _verb_poison(self, address: str) -> str:
        frame = pagemap(self.space, self._address(address))["frame"]
        if not frame:
            raise SessionError(f"{address} shows no frame of its own: touch it first")
        self.machine.poison(frame)
        return f"frame {frame} has failed"

    # Views.

    def _verb_maps(self) -> str:
        return "\n".join(str(line) for line in maps(self.space)) or "nothing is mapped"

    def _verb_smaps(self) -> str:
        return "\n".join(
            f"{entry.line}\n  rss {entry.rss} pss {entry.pss:.0f} shared {entry.shared}"
            f" private {entry.private} dirty {entry.shared_dirty + entry.private_dirty}"
            f" anonymous {entry.anonymous} swap {entry.swap} locked {entry.locked:.0f}"
            for entry in smaps(self.space)
        )

    def _verb_pagemap(self, address: str) -> str:
        facts = pagemap(self.space, self._address(address))
        return " ".join(f"{name}={value}" for name, value in facts.items())

    def _verb_tables(self) -> str:
        table, form = self.own_table or self.space.table, self.machine.geometry.entries
        lines = []
        for leaf in table.leaves(0, self.machine.geometry.half):
            rights = "w" if form.may_write(leaf.entry) else "-"
            rights += "x" if form.may_execute(leaf.entry) else "-"
            rights += "" if form.for_programs(leaf.entry) else "k"
            frame = table.frame(leaf, leaf.start)
            lines.append(f"{leaf.start:#x} -> frame {frame} r{rights} level {leaf.level}")
        return "\n".join([f"{len(table.table_frames())} tables", *lines])

    def _verb_tlb(self) -> str:
        lines = []
        for number, cpu in enumerate(self.machine.cpus):
            lines.append(f"cpu {number}: {cpu.tlb.hits} hits, {cpu.tlb.misses} misses")
            lines += [
                f"  space {asid} page {page:#x} -> frame {entry.frame}"
                for asid, page, entry in cpu.tlb.entries()
            ]
        return "\n".join(lines)

    def _verb_statistics(self) -> str:
        machine, pool = self.machine, self.machine.huge_pool
        huge = f"\nhuge pages: {pool.size}, of them {pool.used} in use, {pool.promised} promised"
        huge = huge if pool.size else ""
        return "\n".join(
            (
                f"frames in use: {machine.memory.used()}, of them tables: "
                f"{len(machine.memory.tables)}",
                f"evictions: {machine.pageout.evictions}",
                f"swap: {machine.swap.writes} out, {machine.swap.reads} in, "
                f"{len(machine.swap.slots)} slots in use",
                f"disk: {machine.disk.reads} reads, {machine.disk.writes} writes",
                f"faults: {self.space.minor_faults} minor, {self.space.major_faults} major" + huge,
            )
        )

    # Textbook questions.

    def _verb_entry(self, address: str, frame: str, prot: str = "rw", level: str = "0") -> str:
        geometry, here = self.machine.geometry, self._count(level)
        if self.own_table is None:
            self.own_table = PageTable(geometry, self.machine.memory)
        if frame == "table":
            return self._limit_table(self.own_table, self._address(address), prot, here)
        if here not in geometry.leaf_levels:
            raise SessionError(f"no leaf at level {here}: at {geometry.leaf_levels}")
        size = geometry.leaf_sizes[here]
        place, pages = self._address(address) & -size, size >> geometry.page_bits
        number = None if frame == "none" else self._count(frame)
        if number is not None and (number % pages or number >= self.own_table.frames_max):
            raise SessionError(
                f"no frame {number}: a multiple of {pages}, below {self.own_table.frames_max}"
            )
        old = self.own_table.leaves(place, place + size)
        if place >= geometry.half or any((leaf.start, leaf.size) != (place, size) for leaf in old):
            raise SessionError(f"{place:#x} has a translation of another size, or can have none")
        self._own_rights(prot, 0)  # refused before anything is changed
        for leaf in old:
            self.own_table.unmap(leaf)
            self.machine.shootdown(0, place >> geometry.page_bits, pages)
        if number is None:
            return f"page {place >> geometry.page_bits:#x} has no translation"
        self.own_table.map(place, number, writable=False, executable=False, level=here)
        made = self.own_table.leaf(place)
        assert made is not None
        self.own_table.update(made, self._own_rights(prot, made.entry))
        return f"page {place >> geometry.page_bits:#x} -> frame {number}"

    def _limit_table(self, table: PageTable, place: int, prot: str, level: int) -> str:
        form = self.machine.geometry.entries
        step = next((step for step in table.steps(place) if step.level == level), None)
        if step is None or not step.entry & form.valid or form.is_leaf(step.entry, level):
            raise SessionError(f"at level {level} of {place:#x} is no table: put an entry below it")
        if not form.all_levels:
            raise SessionError("tables limit rights on x86-64 alone")
        entry = self._own_rights(prot, step.entry)
        table.update(step, entry)
        self.machine.shootdown(0, 0, 1 << 64)
        return f"level {level}: entry {entry:#x}"

    def _own_rights(self, prot: str, entry: int) -> int:
        """An entry with the rights `prot`: letters of rwx, and k for the kernel alone."""
        form, bits = self.machine.geometry.entries, self._prot(prot.replace("k", ""))
        if not bits & f.PROT_READ:
            raise SessionError(f"{prot!r}: a valid entry can be read; `none` takes it away")
        entry = form.with_protection(entry, bool(bits & f.PROT_WRITE), bool(bits & f.PROT_EXEC))
        return entry & ~form.user if "k" in prot else entry | form.user

    def _verb_translate(self, address: str, access: str = "read", mode: str = "user") -> str:
        geometry, place = self.machine.geometry, self._address(address)
        names = {kind.value: kind for kind in Access}
        if access not in names:
            raise SessionError(f"no access {access!r}: of {', '.join(names)}")
        if mode not in ("user", "kernel"):
            raise SessionError(f"no mode {mode!r}: user or kernel")
        indices = ", ".join(str(index) for index in geometry.indices(place))
        offset = place & geometry.page_size - 1
        self.machine.trace.add("indices", address=place, indices=indices, offset=offset)
        table, asid = self.own_table or self.space.table, self.space.asid
        if self.own_table is not None:
            asid = 0
        user = mode == "user"
        physical = self.machine.mmu.translate(table, asid, place, names[access], user=user)
        return f"virtual {place:#x} is physical {physical:#x}"

    def _verb_faults(self, frames: str, policies: str, *pages: str) -> str:
        lines = []
        if not pages:
            raise SessionError("a reference string has at least one page")
        for name in policies.split(","):
            try:
                total, faults = count_faults(pages, self._count(frames, 1), name)
            except ValueError as error:
                raise SessionError(str(error)) from None
            for page, victim in faults:
                self.machine.trace.add("fault", policy=name, page=str(page), victim=_word(victim))
            lines.append(f"{name}: {total} faults")
        return "\n".join(lines)

    def _verb_help(self) -> str:
        return (__doc__ or "").split("::\n\n")[1].split("\n\n>>>")[0]


def _word(victim: object) -> str:
    return "-" if victim is None else str(victim)


_VERBS = sorted(name.removeprefix("_verb_") for name in vars(Session) if name.startswith("_verb_"))
