"""Segments that go to other processes by descriptor: `SharedMapping.send` and `quire.receive`."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys

import numpy as np
import pytest

import quire
from quire.testing import children
from quire.testing.census import take_census

SIZE = 10_000
NOBODY = 65534
FRAME_BYTES = 4096
KINDS = [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM]


@pytest.mark.parametrize("kind", KINDS, ids=["stream", "seqpacket", "datagram"])
def test_every_kind_of_socket(kind: socket.SocketKind) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, kind)
    with here, there, quire.shared(size=SIZE) as ours:
        ours.array[7] = 7
        for _ in range(3):
            ours.send(here)
        for _ in range(3):
            with quire.receive(there) as theirs:
                assert len(theirs) == SIZE
                assert theirs.shared_name is None
                theirs.array[8] = 8
                assert theirs.array[7] == 7
        assert ours.array[8] == 8


def test_the_array_goes_along() -> None:
    here, there = socket.socketpair()
    fields = np.dtype([("x", "<f4"), ("name", "S7"), ("at", "<u2", (3,))])
    with here, there:
        for dtype, shape, order in ((fields, (5, 4), "F"), ("c16", 3, "C"), (">i2", (), "C")):
            with quire.shared(dtype=dtype, shape=shape, order=order) as ours:
                ours.send(here)
                with quire.receive(there) as theirs:
                    assert theirs.dtype == ours.dtype
                    assert theirs.shape == ours.shape
                    assert theirs.array.strides == ours.array.strides
                ours.send(here)
                with quire.receive(there, dtype="u1") as theirs:
                    assert theirs.shape == (len(ours),)
        many = np.dtype([(f"field-{number}", "f8") for number in range(500)])
        with (
            quire.shared(dtype=many, shape=1) as ours,
            pytest.raises(ValueError, match="more than 4096 bytes"),
        ):
            ours.send(here)


def test_reading_only() -> None:
    here, there = socket.socketpair()
    with here, there, quire.shared(size=SIZE) as ours:
        ours.send(here, "r")
        with quire.receive(there) as theirs:
            assert not theirs.writable
            with pytest.raises(quire.Error, match="EACCES"):
                theirs.protect("rw")
            with pytest.raises(ValueError, match="cannot be sent for writing"):
                theirs.send(here, "rw")
            theirs.send(here)
            with quire.receive(there) as third:
                assert not third.writable
        ours.send(here, "r")
        with pytest.raises(quire.SourceError, match="sent for reading only"):
            quire.receive(there, "rw")
        ours.send(here)
        with quire.receive(there, "r") as theirs:
            assert not theirs.writable
        with pytest.raises(ValueError, match="there is no protection"):
            ours.send(here, "q")


def test_the_name_goes_along_and_outlives_the_sender() -> None:
    name = f"test-{os.getpid()}-goes-along"
    here, there = socket.socketpair()
    with here, there:
        with quire.shared(name, SIZE) as ours:
            ours.array[0] = 3
            ours.send(here)
        with pytest.raises(quire.SourceError, match="nobody holds"):  # it is on its way
            quire.shared(name, create=False)
        with quire.receive(there) as theirs:
            assert theirs.shared_name == name
            with quire.shared(name, create=False) as same:
                assert same.array[0] == 3
        with quire.shared(name, SIZE) as ours:
            ours.send(here)
        with quire.shared(name, SIZE, create=True), quire.receive(there) as theirs:
            assert theirs.shared_name is None  # the name is another segment's by now
            assert theirs.array[0] == 0


def test_the_bytes_live_on_their_way() -> None:
    here, there = socket.socketpair()
    with here, there:
        ours = quire.shared(size=SIZE)
        ours.array[:] = 5
        ours.send(here)
        ours.close()
        with quire.receive(there) as theirs:
            assert theirs.read() == bytes([5]) * SIZE


def sender(number: str) -> None:
    with socket.socket(fileno=int(number)) as there, quire.shared(shape=9, dtype="i8") as segment:
        segment.array[:] = range(9)
        segment.send(there)
        assert there.recv(1) == b"!"
        assert segment.array[0] == 42


def test_another_process() -> None:
    here, there = socket.socketpair()
    argv = [sys.executable, __file__, "sender", str(there.fileno())]
    with here, subprocess.Popen(argv, pass_fds=[there.fileno()]) as process:
        there.close()
        with quire.receive(here) as segment:
            assert segment.array.tolist() == list(range(9))
            segment.array[0] = 42
            here.send(b"!")
            assert process.wait(60) == 0


@pytest.mark.parametrize(("permissions", "may"), [(0o600, False), (0o666, True)])
def test_another_user(permissions: int, may: bool) -> None:
    """He reads what he was handed; whether he may open it to write is up to permissions."""
    if os.geteuid() != 0:
        return  # only root can be two users
    here, there = socket.socketpair()

    def receive_as_nobody() -> None:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with quire.receive(there) as theirs:
            assert theirs.read(0, 1) == b"\x07"
            assert theirs.shared_name is None
            try:
                descriptor = os.open(f"/proc/self/fd/{theirs.fileno()}", os.O_RDWR)
            except PermissionError:
                assert not may
            else:
                assert may
                os.pwrite(descriptor, b"\x08", 0)

    name = f"test-{os.getpid()}-other-user"
    with here, there, quire.shared(name, SIZE, permissions=permissions) as ours:
        ours.array[0] = 7
        ours.send(here, "r")
        assert children.in_fork(receive_as_nobody) == ""
        assert ours.array[0] == (8 if may else 7)


def sealed(size: int) -> int:
    with quire.shared(size=size) as segment:
        return os.dup(segment.fileno())


def frame(size: int, name: bytes = b"", header: bytes = b"", magic: bytes = b"quireSEG") -> bytes:
    head = struct.pack("=8sQHH", magic, size, len(name), len(header))
    return (head + name + header).ljust(FRAME_BYTES, b"\0")


def test_hostile_senders() -> None:
    loose = os.memfd_create("loose")
    os.ftruncate(loose, SIZE)
    good, pipe = sealed(SIZE), os.pipe()
    with open("/dev/zero", "rb") as zero:
        cases = [
            (frame(SIZE), [], "one descriptor, not 0"),
            (frame(SIZE), [good, good], "one descriptor, not 2"),
            (frame(SIZE), [good] * 100, "one descriptor, not"),
            (frame(SIZE), [loose], "no memory file with its size sealed"),
            (frame(SIZE), [zero.fileno()], "no memory file with its size sealed"),
            (frame(0), [pipe[0]], "no memory file with its size sealed"),
            (frame(SIZE + 1), [good], "no memory file with its size sealed"),
            (frame(1 << 63), [good], "no memory file with its size sealed"),
            (frame(SIZE, magic=b"another!"), [good], "describes no segment"),
            (frame(SIZE, b"a/b"), [good], "no good name"),
            (frame(SIZE, b"../../x"), [good], "no good name"),
            (struct.pack("=8sQHH", b"quireSEG", SIZE, 65535, 65535) + bytes(4076), [good], "no s"),
            (frame(SIZE, header=b"\x93NUMPY\x01\x00\xff\xff"), [good], "header"),
            (frame(SIZE, header=b"__import__('os')"), [good], "header"),
        ]
        for kind in KINDS:
            here, there = socket.socketpair(socket.AF_UNIX, kind)
            with here, there:
                for message, descriptors, words in cases:
                    before = take_census().descriptors
                    socket.send_fds(here, [message], descriptors)
                    with pytest.raises((quire.FormatError, quire.SourceError), match=words):
                        quire.receive(there)
                    assert take_census().descriptors == before
    for descriptor in (loose, good, *pipe):
        os.close(descriptor)


def test_the_other_end_closes() -> None:
    for sent in (b"", b"quire", frame(SIZE)[:-1]):
        here, there = socket.socketpair()
        with there:
            with here:
                here.sendall(sent)
            with pytest.raises(EOFError, match="closed the connection"):
                quire.receive(there)
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        socket.send_fds(here, [b"short"], [0])
        with pytest.raises(quire.FormatError, match="describes no segment"):
            quire.receive(there)


def test_pieces_of_a_stream() -> None:
    here, there = socket.socketpair()
    descriptor, message = sealed(SIZE), frame(SIZE)
    with here, there:
        socket.send_fds(here, [message[:10]], [descriptor])
        here.sendall(message[10:3000])
        here.sendall(message[3000:])
        here.sendall(b"what follows")
        with quire.receive(there) as segment:
            assert len(segment) == SIZE
        assert there.recv(100) == b"what follows"
    os.close(descriptor)


if __name__ == "__main__":
    children.main()
