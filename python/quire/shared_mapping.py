"""`SharedMapping`: a segment of shared memory, made by `quire.shared`; how it goes to others."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import secrets
import socket
import struct
import sys
from typing import TYPE_CHECKING, Any

from quire import _core, shared_names
from quire.errors import ChangedError, Error, FormatError, SourceError
from quire.kernel_mapping import KernelMapping, RawArray
from quire.limits import Asked, explained
from quire.map_flags import MapFlag, protection_bits
from quire.npy import header_of, read_layout
from quire.shared_names import LOCK, Identity, Lease, is_segment

if TYPE_CHECKING:
    from types import TracebackType

    from quire.sizes import SizeLike

__all__ = ["SharedMapping", "attached", "make_segment", "map_segment", "received"]

SHARED = int(MapFlag.SHARED)

FRAME = struct.Struct("=8sQHH")  # magic, size, lengths of the name and of the array's header
FRAME_MAGIC = b"quireSEG"
FRAME_BYTES = 4096
DESCRIPTORS_MAX = 16


class SharedMapping(KernelMapping):
    r"""A segment of shared memory that is mapped; made by `quire.shared` and `quire.receive`.

    All that a `KernelMapping` is. The segment lives while any process has it mapped: when the last
    has closed it or ended, however that happened, the system frees it, and its name is free.

    It pickles as a reference, which attaches where it is unpickled: the segment must be held until
    then, by anyone. To a new process of `multiprocessing` it goes as a descriptor and needs no
    such care. A forked child holds what its parent has mapped in its own right. The mapping is what
    to pass: its array pickles as any of numpy's, by its bytes.

    Where a closing was left to the last view (leaving a ``with`` block while an array is alive),
    the name ends with this object.

    >>> import pickle, quire
    >>> with quire.shared(size=3) as segment:
    ...     segment.array[:] = 1, 2, 3
    ...     with pickle.loads(pickle.dumps(segment)) as same:
    ...         same.read()
    b'\x01\x02\x03'
    """

    _lease: Lease | None = None

    @property
    def shared_name(self) -> str | None:
        """The name by which others attach; None for a segment without, or whose name was taken."""
        lease = self._lease
        if lease is None or not lease.key.startswith("name.") or lease.unlinked:
            return None
        return lease.key[len("name.") :]

    @property
    def permissions(self) -> int:
        """Who may open the segment to read or write it, as the mode of a file."""
        return os.fstat(self.fileno()).st_mode & 0o777

    def fileno(self) -> int:
        """The memory file's descriptor, which ends with the mapping.

        Raises:
            quire.ClosedError: the mapping is closed.
        """
        descriptor = self.descriptor
        if descriptor < 0:
            raise self._closed_error()
        return descriptor

    def send(self, connection: socket.socket, protection: str | None = None) -> None:
        """Hands the segment to the process at the other end, which calls `quire.receive`.

        That may be any process of this machine: of another user, or in another container. The
        array's type and shape go along.

        Args:
            connection: a Unix socket that is connected.
            protection: "r" or "rw"; as that of the mapping when absent. With "r" the descriptor
                that is sent does not allow writing; ``permissions`` says whether the other may
                open it anew.

        Raises:
            quire.ClosedError: the mapping is closed.
            ValueError: the mapping may not be written and "rw" is asked for, or the description of
                the array's type is longer than a frame.
        """
        name = os.fsencode(self.shared_name or "")
        header = b"" if self._raw.dtype is None else header_of(self.dtype, self.shape, self.order)
        frame = FRAME.pack(FRAME_MAGIC, self.size_bytes, len(name), len(header)) + name + header
        if len(frame) > FRAME_BYTES:
            raise ValueError(f"the array's dtype takes more than {FRAME_BYTES} bytes: send bytes")
        writes = "w" in self.protection if protection is None else "w" in _checked(protection)
        if writes and not _is_writable(self.fileno()):
            raise ValueError("the mapping may only be read: it cannot be sent for writing")
        sent = _reopened(self.fileno(), writes)
        try:
            frame = frame.ljust(FRAME_BYTES, b"\0")
            count = socket.send_fds(connection, [frame], [sent])
            if count < len(frame):
                connection.sendall(frame[count:])
        finally:
            os.close(sent)

    def resize(self, size: SizeLike) -> None:  # noqa: ARG002 (no size can be had)
        """Refused: the size of a segment is sealed, so that nobody loses pages that he has mapped.

        Raises:
            quire.Error: always; make another segment.
        """
        raise Error(
            f"a segment keeps its size, {self.size_bytes} bytes: make another, and copy",
            source=self.source,
        )

    def drop_descriptor(self) -> None:
        """Refused: the descriptor is what others attach by, and a segment has no path.

        Raises:
            quire.Error: always.
        """
        raise Error(
            "a segment keeps its descriptor, which others attach by and which `fileno` and `send` "
            "give: close the mapping instead",
            source=self.source,
        )

    def split(self, at: int) -> KernelMapping:
        """As `KernelMapping.split`; both parts hold the segment."""
        rest = super().split(at)
        if self._lease is not None and not self._lease.unlinked and isinstance(rest, SharedMapping):
            with LOCK:
                rest._lease = shared_names.adopt(self._lease.key, rest.fileno())
        return rest

    def unmap(self, offset: int | None = None, length: int | None = None) -> None:
        """As `KernelMapping.unmap`; when all is unmapped the segment is given up."""
        super().unmap(offset, length)
        if self.closed:
            self._leave()

    def close(self, *, discard: bool = False) -> None:
        """As `KernelMapping.close`; the segment is given up."""
        super().close(discard=discard)
        self._leave()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes; while views are alive it leaves that to the last of them."""
        super().__exit__(kind, error, traceback)
        if self.closed:
            self._leave()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles a reference, never the bytes."""
        descriptor = self.fileno()
        with LOCK:
            if self._lease is None or self._lease.unlinked:
                self._leave()
                key = f"anonymous.{secrets.token_hex(16)}"
                self._lease = shared_names.adopt(key, descriptor)
        key = "" if self._lease is None else self._lease.key
        raw = self._raw
        recipe = (raw.dtype, raw.shape, raw.order)
        protection, identity = self.protection, tuple(Identity.of(descriptor))
        return unpickled, (key, identity, protection, recipe, _carried(descriptor))

    def _leave(self) -> None:
        if self._lease is not None:
            self._lease.leave()


def map_segment(memory: int, label: str, size: int, prot: int, raw: RawArray) -> SharedMapping:
    """Maps a memory file, whose descriptor it takes.

    Raises:
        quire.Error: the kernel refuses; the message says why.
        quire.FormatError: the bytes hold no such array.
    """
    try:
        kernel_range = _core.map_segment(memory, label, size, prot)
    except Error as error:
        raise explained(error, Asked(size, SHARED, prot, label)) from None
    return _faced(kernel_range, raw)


def make_segment(
    shown: bytes, label: str, size: int, permissions: int, prot: int, raw: RawArray
) -> SharedMapping:
    """A new memory file, sealed and mapped; /proc shows it by that name.

    Raises:
        As `map_segment`; and OSError: there can be no such file.
    """
    try:
        kernel_range = _core.make_segment(shown, label, size, permissions, prot)
    except Error as error:
        raise explained(error, Asked(size, SHARED, prot, label)) from None
    return _faced(kernel_range, raw)


def _faced(kernel_range: _core.KernelRange, raw: RawArray) -> SharedMapping:
    mapping: SharedMapping = SharedMapping(kernel_range)
    mapping._raw = raw
    if raw.dtype is not None or raw.shape is not None:
        try:
            _ = mapping.shape
        except BaseException:
            mapping.close()
            raise
    return mapping


def attached(
    key: str, label: str, protection: str, raw: RawArray, want: Identity | int | None
) -> SharedMapping:
    """The segment of a name, which somebody holds.

    ``want`` is the size that it must have, or what tells that it is the very one.

    Raises:
        FileNotFoundError: nobody holds it.
        quire.SourceError: it may not be had, or has another size.
        quire.ChangedError: the name is another segment's.
    """
    prot = protection_bits(protection)
    why: list[str] = []
    with LOCK:
        mapped = shared_names.attach_mapped(key, label, prot)
        if mapped is not None:
            return _leased(*mapped, label, raw, want)
    for _ in shared_names.tries():
        with LOCK:
            found = shared_names.attach(key, "w" in protection, why)
            if found is None:
                continue
            lease, memory = found
            try:
                _check_identity(lease.identity, want, label)
            except Error:
                os.close(memory)
                lease.leave()
                raise
            try:
                mapping = map_segment(memory, label, lease.identity.size, prot, raw)
            except BaseException:
                lease.leave()
                raise
            mapping._lease = lease
            try:
                lease.show(mapping.fileno())
            except BaseException:
                mapping.close()
                raise
            return mapping
    reason = why[0] if why else "another process is making or removing it, and does not go on"
    raise SourceError(
        f"{label} is held, and cannot be reached: {reason}. Have a holder hand it over with send()",
        source=label,
    )


def _leased(
    lease: Lease,
    kernel_range: _core.KernelRange,
    label: str,
    raw: RawArray,
    want: Identity | int | None,
) -> SharedMapping:
    """What was attached to, if it is what was asked for."""
    try:
        _check_identity(lease.identity, want, label)
        mapping = _faced(kernel_range, raw)
    except BaseException:
        lease.leave()
        raise
    mapping._lease = lease
    lease.descriptor = mapping.descriptor
    return mapping


def received(connection: socket.socket, protection: str | None, raw: RawArray) -> SharedMapping:
    """The segment that another process sends; see `quire.receive`."""
    memory, frame = _receive_frame(connection)
    try:
        size, name, header = _parse_frame(frame)
        identity = Identity.of(memory)
        if not is_segment(memory) or identity.size != size:
            raise FormatError(
                "what was received is no memory file with its size sealed: send it with "
                "SharedMapping.send"
            )
        writable = _is_writable(memory)
        if protection is None:
            protection = "rw" if writable else "r"
        prot = protection_bits(protection)
        if "w" in protection and not writable:
            raise SourceError("the segment was sent for reading only: receive it with 'r'")
        if raw.dtype is None and raw.shape is None and header:
            layout = read_layout(
                lambda offset, length: header[offset : offset + length],
                len(header) + size,
                "the received segment",
            )
            raw = RawArray(layout.dtype, layout.shape, layout.order)
    except BaseException:
        os.close(memory)
        raise
    label = label_of(name or None)
    return _held(memory, shared_names.key_of(name) if name else "", label, size, prot, raw)


def unpickled(
    key: str,
    identity: tuple[int, int, int],
    protection: str,
    recipe: tuple[Any, Any, Any],
    carried: Any,
) -> SharedMapping:
    """Attaches to the segment of a pickled reference."""
    raw = RawArray(*recipe)
    name = key.removeprefix("name.") if key.startswith("name.") else None
    label, wanted = label_of(name), Identity(*identity)
    if carried is not None:
        prot = protection_bits(protection)
        return _held(carried.detach(), key, label, wanted.size, prot, raw)
    try:
        return attached(key, label, protection, raw, wanted)
    except FileNotFoundError as error:
        raise SourceError(
            f"{label} has ended: all processes that held it have closed it. Keep it open where it "
            "was pickled until it is open here",
            source=label,
            errno=error.errno,
        ) from None


def _held(memory: int, key: str, label: str, size: int, prot: int, raw: RawArray) -> SharedMapping:
    """Maps what came as a descriptor, and becomes a holder by the name it came with.

    Names are this user's: another user's segment has none here, nor has one whose name is
    another's by now, or that came to where names cannot be had.
    """
    with LOCK:
        mapping = map_segment(memory, label, size, prot, raw)
        if key and os.fstat(mapping.fileno()).st_uid == os.geteuid():
            with contextlib.suppress(SourceError, BlockingIOError):
                mapping._lease = shared_names.adopt(key, mapping.fileno())
    return mapping


def label_of(name: str | None) -> str:
    """What errors call a segment."""
    return "shared memory" if name is None else f"shared memory {name!r}"


def _check_identity(found: Identity, want: Identity | int | None, label: str) -> None:
    if isinstance(want, Identity):
        if found != want:
            raise ChangedError(
                "the name is another segment's by now: the one that was pickled has ended",
                source=label,
            )
    elif want is not None and want != found.size:
        raise SourceError(
            f"{label} has {found.size} bytes, and {want} were asked for: leave the size out to "
            "attach to all of it, or take another name",
            source=label,
        )


def _checked(protection: str) -> str:
    protection_bits(protection)
    return protection


def _is_writable(descriptor: int) -> bool:
    return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR


def _reopened(descriptor: int, writable: bool) -> int:
    """Another descriptor of a memory file; for reading only, if it is not to be written."""
    if writable or not _is_writable(descriptor):
        return os.dup(descriptor)
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)


def _carried(descriptor: int) -> Any:
    """What takes a descriptor to the process that `multiprocessing` starts; None elsewhere."""
    context = sys.modules.get("multiprocessing.context")
    if context is None or context.get_spawning_popen() is None:
        return None
    from multiprocessing.reduction import DupFd

    return DupFd(descriptor)


def _receive_frame(connection: socket.socket) -> tuple[int, bytes]:
    """The descriptor and the frame of one message; a stream gives it in pieces."""
    room = socket.CMSG_SPACE(DESCRIPTORS_MAX * array.array("i").itemsize)
    descriptors = array.array("i")
    frame = b""
    try:
        while len(frame) < FRAME_BYTES:
            data, ancillary, _, _ = connection.recvmsg(
                FRAME_BYTES - len(frame), room, socket.MSG_CMSG_CLOEXEC
            )
            for level, kind, payload in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    whole = len(payload) - len(payload) % descriptors.itemsize
                    descriptors.frombytes(payload[:whole])
            if not data:
                raise EOFError("the other end closed the connection before it sent a segment")
            frame += data
            if connection.type != socket.SOCK_STREAM:
                break
        if len(descriptors) != 1:
            raise FormatError(
                f"a segment comes with one descriptor, not {len(descriptors)}: send it with "
                "SharedMapping.send over a Unix socket"
            )
        return descriptors.pop(), frame
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _parse_frame(frame: bytes) -> tuple[int, str, bytes]:
    """Size, name and header of the array of what a frame describes; it may come from anyone."""
    magic, size, name_bytes, header_bytes = b"", 0, 0, 0
    if len(frame) == FRAME_BYTES:
        magic, size, name_bytes, header_bytes = FRAME.unpack_from(frame)
    end = FRAME.size + name_bytes
    if magic != FRAME_MAGIC or end + header_bytes > FRAME_BYTES:
        raise FormatError("what was received describes no segment: send it with SharedMapping.send")
    name = os.fsdecode(frame[FRAME.size : end])
    if name:
        try:
            shared_names.key_of(name)
        except ValueError as error:
            raise FormatError(f"what was received has no good name: {error}") from None
    return size, name, frame[end : end + header_bytes]
