"""The ring buffer: one piece at any position, two threads, refusals, the end."""

from __future__ import annotations

import mmap
import random
import threading
from collections import deque

import numpy as np
import pytest

import quire
from quire.testing.census import is_mapped
from quire.testing.content import new_seed

PAGE = mmap.PAGESIZE


def test_the_size_is_rounded_up() -> None:
    with quire.Ring(1) as one, quire.Ring(PAGE + 1) as two:
        assert (one.size_bytes, two.size_bytes) == (PAGE, 2 * PAGE)
        assert (one.readable, one.writable, len(one)) == (0, PAGE, 0)
    for size in (0, -1, "no size"):
        with pytest.raises(ValueError):
            quire.Ring(size)


def test_everything_is_one_piece_wherever_it_begins() -> None:
    with quire.Ring(PAGE) as ring:
        content = np.random.default_rng(new_seed()).integers(0, 256, PAGE, dtype=np.uint8)
        for start in range(0, 3 * PAGE, 511):
            with ring.reserve(PAGE) as room:
                assert room.contiguous
                np.frombuffer(room, "u1")[:] = content
            ring.commit(PAGE)
            with ring.peek() as view:
                assert view.readonly
                assert np.array_equal(np.frombuffer(view, "u1"), content), start
            ring.consume(PAGE)
            ring.write(bytes(511))
            ring.consume(511)


def test_random_operations_equal_a_queue() -> None:
    source = random.Random(new_seed())
    queue: deque[int] = deque()
    with quire.Ring(2 * PAGE) as ring:
        for _ in range(3000):
            length = source.randrange(0, 3 * PAGE)
            if source.random() < 0.5:
                data = source.randbytes(length)
                if length > 2 * PAGE - len(queue):
                    with pytest.raises(quire.RingFullError):
                        ring.write(data)
                else:
                    assert ring.write(data) == length
                    queue.extend(data)
            elif length > len(queue):
                with pytest.raises(ValueError, match="readable"):
                    ring.read(length)
            else:
                assert ring.read(length) == bytes(queue.popleft() for _ in range(length))
            assert (ring.readable, ring.writable) == (len(queue), 2 * PAGE - len(queue))


def test_refusals_say_what_to_do() -> None:
    with quire.Ring(PAGE) as ring:
        ring.write(bytes(PAGE - 1))
        with pytest.raises(quire.RingFullError, match=r"room for 1: wait_writable"):
            ring.write(b"ab")
        with pytest.raises(BufferError, match="larger ring"):
            ring.reserve(PAGE + 1)
        with pytest.raises(quire.RingFullError):
            ring.commit(2)
        assert ring.readable == PAGE - 1
        for refused in (ring.peek, ring.consume, ring.read):
            for length in (PAGE, -1):
                with pytest.raises(ValueError, match="wait_readable"):
                    refused(length)
        for call in (ring.reserve, ring.commit):
            with pytest.raises(ValueError, match="negative"):
                call(-1)
        for wait in (ring.wait_readable, ring.wait_writable):
            with pytest.raises(ValueError, match="never"):
                wait(PAGE + 1)
        assert not ring.wait_writable(2, timeout=0.01)
        assert ring.wait_writable(1, timeout=0.01)
        assert ring.wait_readable(PAGE - 1)
        assert not ring.wait_readable(PAGE, timeout=0.01)
        with pytest.raises(TypeError):
            ring.write("text")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="read-only"):
            ring.peek(1)[0] = 1
        assert ring.write(np.arange(0, dtype="i8")) == 0


def test_one_thread_writes_and_one_reads() -> None:
    seed, total = new_seed(), 4 << 20
    content = np.random.default_rng(seed).integers(0, 256, total, dtype=np.uint8).tobytes()
    got = bytearray()
    with quire.Ring(4 * PAGE) as ring:

        def produce() -> None:
            source, at = random.Random(seed), 0
            while at < total:
                part = content[at : at + source.randrange(1, 4 * PAGE)]
                assert ring.wait_writable(len(part), timeout=60)
                ring.write(part)
                at += len(part)

        thread = threading.Thread(target=produce)
        thread.start()
        while len(got) < total:
            assert ring.wait_readable(timeout=60)
            with ring.peek() as view:
                got += view
                length = len(view)
            ring.consume(length)
        thread.join()
    assert bytes(got) == content


def test_the_end() -> None:
    ring = quire.Ring(PAGE)
    address = ring._arena.address
    ring.write(b"abc")
    view = ring.peek()
    with pytest.raises(BufferError, match="views"):
        ring.close()
    assert bytes(view) == b"abc"
    assert ring.read(1) == b"a"
    with ring:
        pass
    assert ring.closed
    assert bytes(view) == b"abc"
    view.release()
    assert ring._arena.closed
    ring.close()
    for call in (ring.peek, ring.read, ring.__enter__):
        with pytest.raises(quire.ClosedError, match="closed"):
            call()
    del ring, call
    assert not is_mapped(address)


def test_closing_wakes_who_waits() -> None:
    ring = quire.Ring(PAGE)
    woken = []
    thread = threading.Thread(target=lambda: woken.append(ring.wait_readable(timeout=60)))
    thread.start()
    ring.close()
    thread.join(timeout=60)
    assert woken == [True]
    assert "closed" in repr(ring)


@pytest.mark.parametrize("length", [0, PAGE])
def test_a_closed_ring_says_so_full_or_empty(length: int) -> None:
    ring = quire.Ring(PAGE)
    ring.write(bytes(length))
    ring.close()
    for call in (
        lambda: ring.write(b"x"),
        lambda: ring.reserve(1),
        lambda: ring.commit(1),
        lambda: ring.read(1),
        lambda: ring.peek(PAGE),
        lambda: ring.consume(1),
    ):
        assert ring.wait_writable()
        assert ring.wait_readable()
        with pytest.raises(quire.ClosedError, match="the ring is closed: make another"):
            call()


def test_no_descriptor_stays_open_for_long() -> None:
    rings = [quire.Ring(PAGE) for _ in range(50)]
    for number, ring in enumerate(rings):
        ring.write(bytes([number]))
    assert [ring.read()[0] for ring in rings] == list(range(50))
    for ring in rings:
        ring.close()
