"""Which limit of the system a mapping has hit: its name, its value now, and how to raise it."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

from quire.errors import Error, SourceError
from quire.map_flags import HUGE_MASK, MapFlag
from quire.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Asked", "explained"]

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
V2 = ("memory.max", "memory.current")
NO_LIMIT = 1 << 60
KIB = 1024
UIDS = (1 << 32) - 1
CAP_IPC_LOCK = 14
PROT_WRITE = 2
PROT_EXEC = 4


class Asked:
    """What was asked of the system when it refused."""

    def __init__(
        self,
        size: int = 0,
        flags: int = 0,
        prot: int = 0,
        source: str | None = None,
        reserve: int = 0,
    ) -> None:
        """``size`` in bytes; MAP_ and PROT_ bits; the path, if any; bytes of addresses to hold."""
        self.size = size
        self.addresses = max(size, reserve)
        self.flags = flags
        self.prot = prot
        self.source = source

    @property
    def private_writable(self) -> bool:
        """Whether the memory may have to be the process's own."""
        return bool(self.prot & PROT_WRITE) and self.flags & 0x0F == MapFlag.PRIVATE

    @property
    def commits(self) -> bool:
        """Whether overcommit accounting counts it."""
        anonymous = bool(self.flags & MapFlag.ANONYMOUS)
        free = self.flags & (MapFlag.NORESERVE | MapFlag.HUGETLB)
        return not free and (self.private_writable or (anonymous and self.flags & 0x0F != 2))


def explained(error: Error, asked: Asked) -> Error:
    """The error with what is behind its errno, as far as the system lets one see."""
    call = error.message.partition(":")[0]
    kind: type[Error] = SourceError if call == "open" else Error
    reasons = _seen(_reasons(call, error.errno or 0, asked))
    message = ". ".join([error.message, *reasons])
    made = kind(message, source=error.source, offset=error.offset, errno=error.errno)
    return made.with_traceback(error.__traceback__)


def _seen(*looks: Iterator[str]) -> list[str]:
    """What the looks find. Of one that the system refuses, as no descriptor is left, just that."""
    found: list[str] = []
    refused = None
    for look in looks:
        try:
            found += look
        except OSError as error:
            refused = error.strerror
    return [*found, f"Some limits cannot be looked at ({refused})"] if refused else found


def _reasons(call: str, number: int, asked: Asked) -> Iterator[str]:
    if number == errno.ENOMEM and call == "mlock":
        limits = _seen(_locked_memory(asked), _map_count())
        yield from limits
        yield (
            f"{'Or a' if limits else 'A'} page of it cannot be had: it is beyond the end of its "
            "file, protected, unmapped, or nothing is placed there"
        )
    elif number == errno.ENOMEM:
        yield from _no_memory(asked)
    elif number == errno.EAGAIN:
        yield from _locked_memory(asked) if call != "madvise" else _map_count()
    elif number == errno.EPERM:
        yield from _not_permitted(call, asked)
    elif number == errno.EFBIG:
        yield from _file_size(asked)
    elif (call, number) == ("mprotect", errno.EACCES):
        yield from _not_protected(asked)
    elif (call, number) in WORDS:
        yield WORDS[call, number]


NO_DESCRIPTOR = "RLIMIT_NOFILE is used up: raise it with `ulimit -n`"
WORDS = {
    ("mmap", errno.EACCES): "The file is not open for what the protection asks: a shared mapping "
    "that may be written needs a file open for reading and writing, any other one for reading",
    ("mmap", errno.ENODEV): "This is no file or device that can be mapped (a folder, a pipe, a "
    "socket, or a device without mmap): read it",
    ("mmap", errno.EOVERFLOW): "The offset is beyond what the file system can hold",
    ("mmap", errno.EEXIST): "Something is mapped there: choose another address",
    (
        "mmap",
        errno.EOPNOTSUPP,
    ): "With shared-validate the kernel refuses flags that the file "
    "system does not know: SYNC needs DAX, and FIXED_NOREPLACE goes with shared and private only",
    ("mmap", errno.EINVAL): "The kernel does not take this combination: an address that is no "
    "multiple of the page, HUGETLB for a file that is not of hugetlbfs, or a size of huge page "
    "that this machine does not have",
    ("mremap", errno.EINVAL): "Huge pages cannot be resized: map with reserve= to grow in place",
    ("mremap", errno.EFAULT): "Parts of the mapping have protections, advice, locks or pins of "
    "their own, or were unmapped, and such cannot be resized as one: make them equal first "
    "(protect, unlock, release), or map with reserve=",
    ("madvise", errno.EINVAL): "This advice is not for this mapping: free and wipeonfork need "
    "private anonymous memory, remove a shared file, dontneed and guard_install memory that is "
    "not locked; or this kernel does not know it",
    ("madvise", errno.EFAULT): "A page cannot be had: the mapping goes beyond the end of its file, "
    "or there is a guard page",
    ("madvise", errno.EACCES): "remove needs a shared mapping that could be made writable",
    ("prctl", errno.EINVAL): "A name has at most 79 printable characters and none of []\\$`; or "
    "this kernel has no names of anonymous memory (CONFIG_ANON_VMA_NAME)",
    ("prctl", errno.EBADF): "Only anonymous memory has a name: that of a file is its path",
    ("mbind", errno.EINVAL): "No such node here, or no such policy; see /sys/devices/system/node",
    ("mseal", errno.ENOSYS): "mseal needs Linux 6.10",
    ("open", errno.ENOENT): "Look at the path",
    ("open", errno.EMFILE): NO_DESCRIPTOR,
    ("memfd_create", errno.EMFILE): NO_DESCRIPTOR,
}


def _limit(which: int) -> int | None:
    soft = resource.getrlimit(which)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _status(name: str) -> int:
    for line in (PROC / "self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * KIB
    return 0


def _has_capability(number: int) -> bool:
    """Whether this process has a capability on the machine, not just in a user namespace."""
    rows = (line.split() for line in (PROC / "self/status").read_text().splitlines())
    effective = next((int(row[1], 16) for row in rows if row and row[0] == "CapEff:"), 0)
    users = PROC / "self/uid_map"  # absent in a kernel without user namespaces
    whole = not users.exists() or users.read_text().split() == ["0", "0", str(UIDS)]
    return whole and bool(effective >> number & 1)


def _meminfo() -> dict[str, int]:
    rows = (line.split() for line in (PROC / "meminfo").read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) * KIB for row in rows if len(row) > 2}


def _number(path: str) -> int:
    return int((PROC / "sys/vm" / path).read_text())


def _no_memory(asked: Asked) -> Iterator[str]:
    process = _addresses(asked), _private_memory(asked), _map_count()
    machine = _huge_pool(asked), _overcommit(asked), _all_addresses(asked)
    yield from _seen(*process, *machine) or [
        *_control_group(),
        "No limit that quire can see was hit: there is no hole of this size between the mappings, "
        "or the kernel has no memory for its tables",
    ]


def _addresses(asked: Asked) -> Iterator[str]:
    space, (used, known) = _limit(resource.RLIMIT_AS), _used("VmSize")
    if space is not None and used + asked.addresses > space:
        yield (
            f"RLIMIT_AS is {format_size(space)}, and {known} of addresses "
            "are mapped: raise it with `ulimit -v`, or resource.setrlimit"
        )


def _private_memory(asked: Asked) -> Iterator[str]:
    data, (used, known) = _limit(resource.RLIMIT_DATA), _used("VmData")
    if data is not None and asked.private_writable and used + asked.size > data:
        yield (
            f"RLIMIT_DATA is {format_size(data)}, and {known} are private "
            "and writable: raise it with `ulimit -d`, or resource.setrlimit"
        )


def _used(name: str) -> tuple[int, str]:
    """What the process has of something, and in words; where it cannot be read, it may be none."""
    try:
        used = _status(name)
    except OSError:
        return 0, "an unknown number"
    return used, format_size(used)


def _all_addresses(asked: Asked) -> Iterator[str]:
    """The end of a program's addresses: right below it its first stack begins (proc(5), stat)."""
    fields = (PROC / "self/stat").read_text().rpartition(")")[2].split()
    bits = int(fields[25]).bit_length()
    if asked.addresses >= 1 << bits:
        yield f"An address space has 2**{bits} bytes: map or reserve less"


def _map_count() -> Iterator[str]:
    most = _number("max_map_count")
    entries = _map_entries()
    if entries >= most - 1:
        yield (
            f"vm.max_map_count is {most}, and the process has {entries} map entries: close "
            "mappings, or raise it with `sysctl -w vm.max_map_count=N`"
        )


def _map_entries() -> int:
    """Lines of /proc/self/maps, in pieces: where no map entry is left, there is no large memory."""
    entries = 0
    descriptor = os.open(PROC / "self/maps", os.O_RDONLY)
    try:
        while piece := os.read(descriptor, 1 << 14):
            entries += piece.count(b"\n")
    finally:
        os.close(descriptor)
    return entries


def _overcommit(asked: Asked) -> Iterator[str]:
    mode, have = _number("overcommit_memory"), _meminfo()
    raise_it = "map with MapFlag.NORESERVE or less, add swap, or see vm.overcommit_memory"
    if mode == 2 and have["Committed_AS"] + asked.size > have["CommitLimit"]:
        yield (
            f"vm.overcommit_memory is 2 (never), and of {format_size(have['CommitLimit'])} "
            f"(CommitLimit) {format_size(have['Committed_AS'])} are promised: raise "
            "vm.overcommit_ratio, or add swap"
        )
    whole = have["MemTotal"] + have["SwapTotal"]
    if mode == 0 and asked.commits and asked.size > whole:
        yield (
            f"vm.overcommit_memory is 0, which refuses more at once than the {format_size(whole)} "
            f"of memory and swap: {raise_it}"
        )


def _huge_pool(asked: Asked) -> Iterator[str]:
    if not asked.flags & MapFlag.HUGETLB:
        return
    power = (asked.flags & HUGE_MASK) >> 26
    page = 1 << power if power else _meminfo().get("Hugepagesize", 2 << 20)
    pool = Path(f"/sys/kernel/mm/hugepages/hugepages-{page // KIB}kB")
    if not pool.is_dir():
        yield f"This machine has no huge pages of {format_size(page)}; see /sys/kernel/mm/hugepages"
        return
    have = {name: int((pool / name).read_text()) for name in ("nr_hugepages", "free_hugepages")}
    reserved = int((pool / "resv_hugepages").read_text())
    yield (
        f"The pool of huge pages of {format_size(page)} has {have['nr_hugepages']}, of them "
        f"{have['free_hugepages'] - reserved} free, and {-(-asked.size // page)} are needed: as "
        f"root write a larger number to {pool}/nr_hugepages"
    )


def _locked_memory(asked: Asked) -> Iterator[str]:
    """The limit of locked memory, if it binds this process and what is asked for exceeds it."""
    limit, locked = _limit(resource.RLIMIT_MEMLOCK), _status("VmLck")
    pages = -(-asked.size // resource.getpagesize()) + 1  # those around bytes at any offset
    asks_for = locked + pages * resource.getpagesize()
    if limit is not None and asks_for > limit and not _has_capability(CAP_IPC_LOCK):
        yield (
            f"RLIMIT_MEMLOCK is {format_size(limit)}, and {format_size(locked)} are "
            f"locked: {format_size(asked.size)} more need a higher one (`ulimit -l`, "
            "resource.setrlimit) or CAP_IPC_LOCK"
        )


def _not_permitted(call: str, asked: Asked) -> Iterator[str]:
    limit = _limit(resource.RLIMIT_MEMLOCK)
    if limit == 0 and (call == "mlock" or asked.flags & MapFlag.LOCKED):
        yield from _locked_memory(asked)
    elif call == "madvise":
        yield "hwpoison and soft_offline need CAP_SYS_ADMIN; a sealed mapping keeps its content"
    elif asked.prot & PROT_EXEC and asked.source and _is_noexec(asked.source):
        yield f"The file system of {asked.source} is mounted noexec: map a copy elsewhere"
    else:
        yield "The mapping is sealed (mseal), or the file is sealed against writes (F_SEAL_WRITE)"


def _not_protected(asked: Asked) -> Iterator[str]:
    if asked.prot & PROT_EXEC and asked.source and _is_noexec(asked.source):
        yield from _not_permitted("mprotect", asked)
    else:
        yield (
            "The file is open for reading only, and a shared mapping cannot have stores go to it: "
            'map it with protection="rw", and protect("r") what is not to be written'
        )


def _file_size(asked: Asked) -> Iterator[str]:
    limit = _limit(resource.RLIMIT_FSIZE)
    if limit is not None:
        yield (
            f"RLIMIT_FSIZE, the longest that this process may make a file, is {format_size(limit)}:"
            " raise it with `ulimit -f`, or resource.setrlimit"
        )
    elif asked.flags & MapFlag.ANONYMOUS:
        yield "No memory file is that long: ask for less"
    else:
        yield f"The file system of {asked.source} holds no file that long: use another one"


def _is_noexec(path: str) -> bool:
    try:
        return bool(os.statvfs(path).f_flag & os.ST_NOEXEC)
    except OSError:
        return False


def _control_group() -> Iterator[str]:
    for group, limit, usage in _memory_groups():
        try:
            most = int((group / limit).read_text())
            used = int((group / usage).read_text())
        except (OSError, ValueError):  # no such file where there is no limit, or "max"
            continue
        if most < NO_LIMIT:
            yield (
                f"The control group {group} has a {limit} of {format_size(most)}, and "
                f"{format_size(used)} are used: raise it"
            )


def _memory_groups() -> Iterator[tuple[Path, str, str]]:
    """The control groups of this process and those above: folder, files of limit and usage."""
    try:
        rows = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for row in rows:
        _, controllers, path = row.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        names = V1 if controllers else V2
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            yield folder, *names
            if folder == root:
                break
