r"""A ring of video frames between two processes: one writes them, the other looks where they lie.

    producer --- "frame n is there" --->  consumer        by a socket: some bytes for each frame,
             <-- "n is done, its CRC" --                  and an end that is noticed at once
       \____ slots of shared memory ____/                  the frames themselves: never copied

The producer never overwrites a frame that is not done. A consumer that dies, killed or not, closes
its end of the socket: the producer notices, and starts another, which maps the same memory.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
import zlib

import numpy as np

import quire

SLOTS, HEIGHT, WIDTH = 4, 480, 640
FRAME = np.dtype([("number", "u8"), ("crc", "u4"), ("pixels", "u1", (HEIGHT, WIDTH, 3))])
READY = struct.Struct("=Q")  # number of the frame
DONE = struct.Struct("=QI")  # number of the frame, CRC-32 as the consumer found it
FRAMES, KILLED_AT = 90, 30


class ConsumerGone(Exception):  # noqa: N818 (no error: an event)
    """The other process has ended; the frames it had not done yet are still in the ring."""


class Producer:
    """Writes frames into a ring and hands them to a consumer."""

    def __init__(self) -> None:
        self.ring = quire.shared(shape=(SLOTS,), dtype=FRAME)
        self.frames = self.ring.array
        self.written = self.done = 0
        self.start_consumer()

    def start_consumer(self) -> None:
        """A new process, to which the memory goes for reading only."""
        ours, theirs = socket.socketpair()
        argv = [sys.executable, __file__, str(theirs.fileno())]
        self.process = subprocess.Popen(argv, pass_fds=[theirs.fileno()])
        theirs.close()
        self.socket = ours
        self.ring.send(ours, "r")
        for number in range(self.done, self.written):  # what the last one had not done
            ours.sendall(READY.pack(number))

    def put(self, pixels: np.ndarray) -> None:
        """Writes the next frame, as soon as a slot is free.

        Raises:
            ConsumerGone: it has ended, and no slot is free: nothing was written.
        """
        while self.written - self.done >= SLOTS:
            self.wait_done()
        slot = self.frames[self.written % SLOTS]
        slot["pixels"] = pixels
        slot["crc"] = zlib.crc32(slot["pixels"])
        slot["number"] = self.written
        self.written += 1
        with contextlib.suppress(ConnectionError):  # the next wait tells of it
            self.socket.sendall(READY.pack(self.written - 1))

    def wait_done(self) -> None:
        """Waits until the oldest frame is done, and compares what the consumer found."""
        try:
            said = self.socket.recv(DONE.size, socket.MSG_WAITALL)
        except ConnectionError as error:
            raise ConsumerGone from error
        if len(said) < DONE.size:
            raise ConsumerGone
        number, crc = DONE.unpack(said)
        slot = self.frames[self.done % SLOTS]
        assert (number, crc) == (self.done, slot["crc"]), "the consumer saw other bytes"
        self.done += 1

    def close(self) -> None:
        """Waits until every frame is done, and ends the consumer."""
        while self.done < self.written:
            self.wait_done()
        self.stop()

    def stop(self) -> None:
        """Ends the consumer, whatever it is doing: it reads the end of the socket."""
        self.socket.close()
        self.process.wait()


def consume(descriptor: int) -> None:
    """The other process: verifies frames where they lie, to the end of the socket."""
    with socket.socket(fileno=descriptor) as connection, quire.receive(connection) as ring:
        frames = ring.array
        while said := connection.recv(READY.size, socket.MSG_WAITALL):
            (number,) = READY.unpack(said)
            slot = frames[number % SLOTS]
            crc = zlib.crc32(slot["pixels"])
            assert (slot["number"], slot["crc"]) == (number, crc), f"frame {number} is damaged"
            connection.sendall(DONE.pack(number, crc))


def main() -> None:
    """Sends frames, and kills the consumer in the middle of them."""
    producer = Producer()
    across = np.arange(WIDTH, dtype="u1")[:, None]
    for number in range(FRAMES):
        if number == KILLED_AT:
            producer.process.kill()
        pixels = np.broadcast_to(across + np.uint8(number), (HEIGHT, WIDTH, 3))
        try:
            producer.put(pixels)
        except ConsumerGone:
            producer.stop()
            left = producer.written - producer.done
            print(f"the consumer ended ({producer.process.returncode}), {left} frames wait")
            producer.start_consumer()
            producer.put(pixels)
    producer.close()
    megabytes = FRAMES * FRAME["pixels"].itemsize / 1e6
    print(f"{producer.done} frames, {megabytes:,.0f} MB, every checksum right")


if __name__ == "__main__":
    consume(int(sys.argv[1])) if len(sys.argv) > 1 else main()
