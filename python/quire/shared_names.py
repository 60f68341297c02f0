"""Names of shared memory: who holds which segment, by records with locks.

The bytes of a segment are a memory file (memfd_create(2)), which the kernel frees with its last
holder, however that ends. A name only leads to a holder: it is a record in a folder of the user's
on a tmpfs, and whoever wants the segment opens the holder's descriptor through /proc.

A slot is leased by a lock on its bytes that the kernel drops when its process ends; without the
lock what a slot says means nothing. A lock on the whole file is had only where nobody has a slot:
by who makes the segment, and by who takes the record away, which is the last to leave. It is
written once: a record that outlived its holders is taken away, never mended. It is removed only
under a lock of its header, which that of the whole has in it: who finds then that it has its name
removes it, and not another that came in its place.

So nothing is left of a killed process but a record of some hundred bytes; the next to use the name,
or the next process to make any, takes it away. Whoever adds a slot looks afterwards whether the
record still has its name, and begins again where it has not.

Threads: `LOCK` is held from the opening of a record to the end of what is done with it, and while
the process forks: a child that shared an open record would keep it locked. Finalizers take it in
whatever thread they run: what they may meet there is to have no second lock of its own
(`quire.compat.shared_blocks`).

Forks: a child shares its parent's openings, and so its locks. Who leaves after a fork therefore
drops no lock: it closes the record, and takes it away if nobody has it then. So the name is the
child's at every moment; it takes slots of its own, by which others can come in, before anything
else runs in it (`_after_fork_in_child`). This hook is Python's: it runs in the children of
`os.fork` and of all that is built on it, as multiprocessing. The child of a fork in C keeps the
lock of its parent's slot until it ends or runs another program: nobody has the name meanwhile.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import functools
import os
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from quire import _core
from quire import shared_records as records
from quire.errors import FormatError, SourceError
from quire.shared_records import Identity

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "LOCK",
    "Identity",
    "Lease",
    "Reserved",
    "adopt",
    "attach",
    "attach_mapped",
    "is_segment",
    "key_of",
    "publish_new",
    "reserve",
    "sweep",
    "tries",
    "unlink",
]

LOCK = threading.RLock()

SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
NAME_BYTES_MAX = 200
MEMORY_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
NEW_SLOTS_MAX = 64  # as many may attach at the same moment; more of them try again
TRY_S = 2.0
PAUSE_S = 0.001


class Lease:
    """A locked slot of a record: while it is held, the name leads to the segment."""

    __slots__ = (
        "__weakref__",
        "_forks",
        "_process",
        "_record",
        "_slot",
        "_unlinked",
        "descriptor",
        "identity",
        "key",
    )

    def __init__(self, key: str, record: int, slot: int, identity: Identity) -> None:
        """Owns ``record``, the descriptor that has the lock on the slot."""
        self.key = key
        self.identity = identity
        self.descriptor = -1
        self._record = record
        self._slot = slot
        self._process = _process()
        self._forks = _core.forks()
        self._unlinked = False
        HELD.add(self)

    def show(self, descriptor: int) -> None:
        """Lets others open the memory file by this descriptor of the process.

        Raises:
            quire.SourceError: the record cannot be written; the slot is given back.
        """
        self.descriptor = descriptor
        said = records.SLOT.pack(_namespace(), self._process, descriptor)
        try:
            records.write_record(self._record, said, records.offset_of(self._slot))
        except BaseException:
            self.leave()
            raise

    @property
    def unlinked(self) -> bool:
        """Whether somebody took the name away by `unlink`."""
        if self._record >= 0:
            self._unlinked = _core.is_unlinked(self._record)
        return self._unlinked

    def leave(self) -> None:
        """Gives the slot back; the last takes the name away. Does nothing the second time."""
        with LOCK:
            record, self._record = self._record, -1
            if record < 0:
                return
            # Not as the process was known: a child may be asking early. The slot is its parent's.
            slot = self._slot if self._process == os.getpid() else None
            path = f"{records.folder_path()}/{self.key}"
            _core.leave_segment(record, slot, path, self._forks)

    def inherited(self) -> None:
        """In a forked child: takes a slot of the child's own, and lets go of the parent's.

        Where none can be had (no descriptor is left, or no memory) the child keeps its part of the
        parent's: nobody else gets the name, and others come in by it while the parent lives.
        """
        if self._record < 0:
            return
        mine = None
        if not self.unlinked and self._has_memory():
            with contextlib.suppress(OSError, SourceError):
                mine = self._anew()
            if mine is None and not self.unlinked:
                return
        if mine is None:
            self.leave()
            return
        os.close(self._record)
        HELD.discard(mine)
        self._record, mine._record = mine._record, -1
        self._slot, self._process, self._forks = mine._slot, mine._process, mine._forks

    def _has_memory(self) -> bool:
        """Whether the memory file is open: another thread of the parent may have closed it."""
        try:
            return Identity.of(self.descriptor) == self.identity
        except OSError:
            return False

    def _anew(self) -> Lease | None:
        """Another lease of the same segment, by an opening of its own; None if the name is lost."""
        record = records.open_record(self.key)
        lease = None
        try:
            if os.path.sameopenfile(record, self._record):
                data = records.read_record(record)
                lease = _join(self.key, record, data, -1, self.identity)
        finally:
            if lease is None:
                os.close(record)
        if lease is not None:
            lease.show(self.descriptor)
        return lease

    def __del__(self) -> None:
        if self._record >= 0:
            self.leave()


HELD: weakref.WeakSet[Lease] = weakref.WeakSet()


def key_of(name: str) -> str:
    """The name of the record of a segment.

    >>> key_of("frames")
    'name.frames'

    Raises:
        ValueError: no name can be so.
        TypeError: it is no text.
    """
    if not isinstance(name, str):
        raise TypeError(f"a name is text, not {type(name).__name__}")
    length = len(os.fsencode(name))
    if not name or "/" in name or "\0" in name or length > NAME_BYTES_MAX:
        raise ValueError(
            f"name {name!r}: a name has 1 to {NAME_BYTES_MAX} bytes, without '/' and NUL"
        )
    return f"name.{name}"


def tries() -> Iterator[None]:
    """Goes on until the time is over in which others must have finished what they do to a name."""
    deadline = time.monotonic() + TRY_S
    while True:
        yield
        if time.monotonic() > deadline:
            return
        time.sleep(PAUSE_S)


def attach_mapped(key: str, label: str, prot: int) -> tuple[Lease, _core.KernelRange] | None:
    """A lease on a segment that is held, and its memory, mapped: where nothing is in the way.

    None where anything is, for `attach` to find out what. The caller holds `LOCK`.

    Raises:
        quire.SourceError: the folder is not safe to use.
    """
    user = os.geteuid()
    path = f"{records.checked_folder(records.folder_path(), user)}/{key}"
    found = _core.attach_segment(path, label, user, _process(), prot)
    if found is None:
        return None
    kernel_range, record, slot, identity = found
    return Lease(key, record, slot, Identity(*identity)), kernel_range


def publish_new(key: str, memory: int) -> Lease | None:
    """The lease of a name that nobody has, for a memory file: where nothing is in the way.

    None where anything is, for `reserve` to find out what. The caller holds `LOCK`.

    Raises:
        quire.SourceError: the folder is not safe to use.
    """
    _sweep_once()
    user = os.geteuid()
    path = f"{records.checked_folder(records.folder_path(), user)}/{key}"
    made = _core.make_record(path, user, _namespace(), _process(), memory)
    if made is None:
        return None
    record, identity = made
    lease = Lease(key, record, 0, Identity(*identity))
    lease.descriptor = memory
    return lease


def attach(key: str, writable: bool, why: list[str]) -> tuple[Lease, int] | None:
    """A lease on a segment that somebody holds, and its memory file, opened anew.

    None where it cannot be had at this moment, with the reason in ``why``: call it again within
    `tries`. The caller holds `LOCK`, owns the descriptor, and calls `Lease.show`.

    Raises:
        FileNotFoundError: nobody holds it.
        quire.SourceError: the record or the memory file may not be opened.
        quire.FormatError: it is no record.
    """
    record = records.open_record(key)
    kept = False
    try:
        data = records.read_record(record)
        identity = records.identity_in(key, data)
        memory, number = -1, 0
        if identity is not None:
            for number, slot in records.slots_in(data):  # noqa: B007 (used below)
                memory = _open_memory(slot, identity, writable, why)
                if memory >= 0:
                    break
        if memory < 0 or identity is None:
            if records.first_lock(record) is None:
                records.take_away(key, record)
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            return None
        lease = _join(key, record, data, number, identity)
        if lease is None:
            os.close(memory)
            return None
        kept = True
        return lease, memory
    finally:
        if not kept:
            os.close(record)


def reserve(key: str) -> Reserved | None:
    """A new record, locked as a whole, for a segment that is to be made; None where it is held.

    The caller holds `LOCK`, and uses it as a context manager.

    Raises:
        quire.SourceError: the folder or the record may not be used.
        quire.FormatError: something else has its name.
        BlockingIOError: it is being made, or was just taken away: call it again within `tries`.
    """
    _sweep_once()
    record = records.open_record(key, os.O_CREAT)
    kept = False
    try:
        if not records.set_lock(record, fcntl.F_WRLCK, 0, 0):
            if records.first_lock(record) == 0:
                raise BlockingIOError
            return None
        data = records.read_record(record)
        if data or not os.fstat(record).st_nlink:
            records.identity_in(key, data)
            records.take_away(key, record)
            raise BlockingIOError
        kept = True
        return Reserved(key, record)
    finally:
        if not kept:
            os.close(record)


class Reserved:
    """A record that is locked as a whole; a context manager that takes it away if unused."""

    def __init__(self, key: str, record: int) -> None:
        self._key = key
        self._record = record

    def publish(self, memory: int) -> Lease:
        """Says what the segment is, and leaves of the lock that of the first slot.

        Raises:
            quire.SourceError: the record cannot be written.
        """
        identity = Identity.of(memory)
        records.write_record(self._record, records.HEADER.pack(records.MAGIC, *identity), 0)
        lease = Lease(self._key, self._record, 0, identity)
        record, self._record = self._record, -1
        records.set_lock(record, fcntl.F_UNLCK, 0, records.HEADER.size)
        records.set_lock(record, fcntl.F_UNLCK, records.offset_of(1), 0)
        return lease

    def __enter__(self) -> Reserved:
        return self

    def __exit__(self, *_: object) -> None:
        if self._record >= 0:
            records.take_away(self._key, self._record)
            os.close(self._record)


def adopt(key: str, memory: int) -> Lease | None:
    """A lease for a memory file that the process has: joins its holders, or is the first again.

    None where the name is another segment's by now. The caller holds `LOCK`.

    Raises:
        As `reserve`.
    """
    identity = Identity.of(memory)
    for _ in tries():
        try:
            reserved = reserve(key)
            if reserved is not None:
                with reserved:
                    lease = reserved.publish(memory)
                    lease.show(memory)
                    return lease
            record = records.open_record(key)
        except (BlockingIOError, FileNotFoundError):
            continue
        found = None
        try:
            data = records.read_record(record)
            if (named := records.identity_in(key, data)) not in (None, identity):
                return None
            found = _join(key, record, data, -1, identity) if named else None
            if found is not None:
                found.show(memory)
                return found
        finally:
            if found is None:
                os.close(record)
    raise BlockingIOError


def unlink(key: str) -> None:
    """Takes a name away from those who hold it, and leaves them the memory.

    Raises:
        FileNotFoundError: nobody holds it.
        BlockingIOError: it is being made, or taken away: call it again within `tries`.
        quire.SourceError: the record may not be opened.
        quire.FormatError: it is no record.
    """
    user = os.geteuid()
    with LOCK:
        if _core.unlink_record(
            f"{records.checked_folder(records.folder_path(), user)}/{key}", user
        ):
            return
        record = records.open_record(key)  # which says what stands in the way
        try:
            records.identity_in(key, os.pread(record, records.HEADER.size, 0))
            if not records.set_lock(record, fcntl.F_WRLCK, 0, records.HEADER.size):
                raise BlockingIOError
            if records.first_lock(record) is None and records.take_away(key, record):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            if not os.fstat(record).st_nlink:
                raise BlockingIOError
            os.unlink(f"{records.folder_path()}/{key}")  # noqa: PTH108 (a Path takes longer)
        finally:
            os.close(record)


def sweep() -> tuple[int, int]:
    """Takes away the records that outlived their holders; how many are held, and how many went.

    Raises:
        quire.SourceError: the folder is not safe to use.
    """
    held = gone = 0
    folder = records.folder_path()
    if not os.path.lexists(folder):
        return 0, 0
    with LOCK:
        for path in Path(records.checked_folder(folder, os.geteuid())).iterdir():
            key = path.name
            try:
                record = records.open_record(key)
            except (FileNotFoundError, SourceError):
                continue
            try:
                records.identity_in(key, os.pread(record, records.HEADER.size, 0))
                took = records.first_lock(record) is None and records.take_away(key, record)
            except FormatError:
                continue  # not ours to remove
            finally:
                os.close(record)
            held, gone = held + (not took), gone + took
    return held, gone


def is_segment(descriptor: int) -> bool:
    """Whether it is a memory file whose size is sealed, as that of every segment."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return seals & SIZE_SEALS == SIZE_SEALS


def _open_memory(slot: records.Held, identity: Identity, writable: bool, why: list[str]) -> int:
    """Opens the memory file through one of its holders; -1 where it is not there, see ``why``."""
    holder = "self" if slot.process == _process() else slot.process
    path = f"/proc/{holder}/fd/{slot.descriptor}"
    try:
        # Looked at before it is opened: to open a device in its place may do something.
        found = os.stat(path)  # noqa: PTH116 (a Path would take longer than the call)
        if (found.st_size, found.st_dev, found.st_ino) == identity:
            memory = os.open(path, MEMORY_FLAGS | (os.O_RDWR if writable else os.O_RDONLY))
            if Identity.of(memory) == identity and is_segment(memory):
                return memory
            os.close(memory)
        reason = "it has closed the segment"
    except OSError as error:
        reason = _unreachable(path, error)
    if slot.namespace != _namespace():
        reason = "it is in another PID namespace (a container)"
    why[:] = [f"process {slot.process} holds it: {reason}"]
    return -1


def _unreachable(path: str, error: OSError) -> str:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        raise SourceError(records.remedy(error), errno=error.errno)
    if error.errno != errno.EACCES:
        if not Path("/proc/self/fd").exists():
            return "/proc is not mounted here"
        return "it ends at this moment, or a process forked from it holds it"
    if os.access(path, os.F_OK):
        raise SourceError(
            "the permissions of the segment do not allow this: attach with protection='r', or "
            "have it made with others",
            errno=error.errno,
        )
    return (
        "it does not let others open its descriptors (it changed its user, has more capabilities, "
        "or called prctl(PR_SET_DUMPABLE, 0))"
    )


def _join(key: str, record: int, data: bytes, skip: int, identity: Identity) -> Lease | None:
    """Locks a slot that nobody has, and looks whether the record still has its name."""
    end = (len(data) - records.HEADER.size) // records.SLOT.size
    free: list[int] = []
    used: list[int] = []
    for number in range(end):
        (free if data.startswith(records.FREE, records.offset_of(number)) else used).append(number)
    for number in (*free, *used, *range(end, end + NEW_SLOTS_MAX)):
        if number == skip:
            continue
        if records.set_lock(record, fcntl.F_WRLCK, records.offset_of(number), records.SLOT.size):
            if os.fstat(record).st_nlink == 0:
                return None
            return Lease(key, record, number, identity)
    return None


@functools.cache
def _process() -> int:
    """The process; asked for once, as the system call is a good part of the time to attach."""
    return os.getpid()


@functools.cache
def _namespace() -> int:
    """The PID namespace of the process; 0 where /proc does not say."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116 (a Path takes longer)
    except OSError:
        return 0


@functools.cache
def _sweep_once() -> None:
    sweep()


def _after_fork_in_child() -> None:
    try:
        _process.cache_clear()
        _namespace.cache_clear()
        for lease in list(HELD):
            lease.inherited()
    finally:
        LOCK.release()


def _leave_all() -> None:
    with LOCK:
        for lease in list(HELD):
            lease.leave()


os.register_at_fork(
    before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=_after_fork_in_child
)
atexit.register(_leave_all)
