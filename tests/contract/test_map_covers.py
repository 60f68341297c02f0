"""Calls on a mapping while another thread is in C code that has met pages which cannot be had.

That thread is in ``np.add(bad, gated)``: it has met its first bad page, which is covered, when the
gate stops it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import quire
from quire.testing import children
from quire.testing.pmaps import working_pmaps
from quire.testing.stores import GatedStore
from quire.testing.touches import touch
from quire.testing.waiting import wait_until

PAGE = mmap.PAGESIZE
SIZE = 64 * PAGE
BAD = 8 * PAGE
PINNED = 4 << 20  # an ordinary user may lock 8 MiB
BYTES = np.arange(SIZE, dtype="u1") | 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "some.bin"
    found.write_bytes(BYTES)
    return found


@contextlib.contextmanager
def standing_over(
    mapping: quire.KernelMapping, bad: np.ndarray, folder: Path, out: np.ndarray | None = None
) -> Iterator[None]:
    """A thread stands in a call that has read bytes of ``bad``, or stored to those of ``out``."""
    gated = GatedStore(bytes(len(bad)), folder, range(len(bad) // 2, len(bad) // 2 + PAGE))
    failures: list[quire.Error] = []
    errors = mapping.statistics().errors

    def stand(array: np.ndarray) -> None:
        try:
            np.add(bad, array, out=out)
            touch(bad)
        except quire.Error as error:
            failures.append(error)

    with quire.open(gated, dtype="u1", pmap=working_pmaps()[0], granule=PAGE) as slow:
        thread = threading.Thread(target=stand, args=(slow.array,))
        thread.start()
        wait_until(lambda: mapping.statistics().errors > errors, "the thread has met a bad page")
        wait_until(gated.arrived, "the thread stands at the gate")
        try:
            yield
        finally:
            gate = gated.open_gate()
            thread.join()
            os.close(gate)
    assert failures


def over_truncated(
    mapping: quire.KernelMapping, path: Path
) -> contextlib.AbstractContextManager[None]:
    os.truncate(path, BAD)
    return standing_over(mapping, mapping.array[BAD:], path.parent)


def over_protected(
    mapping: quire.KernelMapping, path: Path
) -> contextlib.AbstractContextManager[None]:
    part = mapping.array[BAD:]
    mapping.protect("r")
    return standing_over(mapping, part, path.parent, out=part)


def entries_of(mapping: quire.KernelMapping) -> list[str]:
    """Lines of /proc/self/smaps of the map entries of a mapping, each with its fields."""
    found: list[str] = []
    within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.partition(" ")[0]
        if "-" in head:
            within = mapping.address <= int(head.partition("-")[0], 16) < mapping.address + SIZE
            found += [line] if within else []
        elif within:
            found[-1] += "\n" + line
    return found


def bytes_of(mapping: quire.KernelMapping, *fields: str) -> int:
    """The sum of some fields of its map entries."""
    lines = "\n".join(entries_of(mapping)).splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(fields))


def test_a_store_to_a_page_that_has_healed_is_kept(path: Path) -> None:
    with quire.map(path, sharing="shared", protection="rw") as mapping:
        with over_truncated(mapping, path):
            os.truncate(path, SIZE)
            mapping.array[BAD] = 77
            assert path.read_bytes()[BAD] == 77
        assert mapping.array[BAD] == 77
        mapping.check()


def store_and_look(array: np.ndarray) -> None:
    array[BAD] = 77
    touch(array)


def test_a_store_to_a_page_that_is_still_bad_is_told(path: Path) -> None:
    with quire.map(path, sharing="shared", protection="rw") as mapping:
        with over_truncated(mapping, path), pytest.raises(quire.TruncatedError):
            store_and_look(mapping.array)
        with pytest.raises(quire.TruncatedError):
            touch(mapping.array, BAD)


def test_it_is_counted_in_the_process_too(path: Path) -> None:
    before = quire.statistics().errors
    with quire.map(path, sharing="shared") as mapping:
        with over_truncated(mapping, path):
            pass
        errors = mapping.statistics().errors
        assert errors > 0
        assert quire.statistics().errors == before + errors
    assert quire.statistics().errors == before + errors


def test_what_was_stored_before_is_synced(path: Path) -> None:
    """The pages lie elsewhere while others are shown."""
    with quire.map(path, sharing="shared", protection="rw") as mapping:
        mapping.array[:] = 7
        with over_protected(mapping, path):
            assert bytes_of(mapping, "Shared_Dirty:", "Private_Dirty:") > 0
            mapping.sync()
            assert bytes_of(mapping, "Shared_Dirty:", "Private_Dirty:") == 0
            assert path.read_bytes() == bytes([7]) * SIZE


def test_a_copy_out_is_of_what_was_stored(path: Path) -> None:
    with (
        quire.map(path, sharing="shared", protection="rw") as mapping,
        over_protected(mapping, path),
    ):
        assert mapping.read(0, SIZE) == BYTES.tobytes()


@pytest.mark.parametrize("first", [True, False], ids=["locked before", "locked meanwhile"])
def test_locked_pages_stay_locked(path: Path, first: bool) -> None:
    with quire.map(path, sharing="shared", protection="rw") as mapping:
        if first:
            mapping.lock()
        before = locked_of_process()
        with over_protected(mapping, path):
            if not first:
                mapping.lock()
        assert bytes_of(mapping, "Locked:") == SIZE
        assert locked_of_process() == before + (0 if first else SIZE)
        mapping.unlock()
        assert bytes_of(mapping, "Locked:") == 0


def locked_of_process() -> int:
    """Bytes that count against RLIMIT_MEMLOCK."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmLck:")[2].split()[0]) << 10


def test_advice_is_of_the_whole_mapping(path: Path) -> None:
    with quire.map(path, sharing="shared", protection="rw", reserve=2 * SIZE) as mapping:
        with over_truncated(mapping, path):
            mapping.advise("sequential")
            mapping.advise("dontdump")
        assert len(entries_of(mapping)) == 1
        os.truncate(path, SIZE)
        mapping.resize(2 * SIZE)
        assert len(mapping) == 2 * SIZE


def child_forks(path: str) -> None:
    """A child has none of what is shown to a thread of its parent."""
    file = Path(path)
    with (
        quire.map(file, sharing="shared", protection="rw") as mapping,
        over_truncated(mapping, file),
    ):
        pid = os.fork()
        if pid == 0:
            os.truncate(file, SIZE)
            mapping.check()
            seen = int(mapping.array[BAD])
            mapping.array[BAD + 1] = 66
            stored = file.read_bytes()[BAD + 1]
            os._exit(0 if (seen, stored) == (0, 66) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_child_sees_what_is_there(path: Path) -> None:
    children.run(child_forks, path).check()


def child_forks_while_pinning(_path: str) -> None:
    """The child's locks are its own."""
    memory = quire.map(size=PINNED, sharing="private")
    pinning, enough = threading.Event(), threading.Event()

    def pin() -> None:
        while not enough.is_set():
            memory.pin().release()
            pinning.set()

    thread = threading.Thread(target=pin)
    thread.start()
    pinning.wait()
    for _ in range(50):
        pid = os.fork()
        if pid == 0:
            memory.pin(slice(0, PAGE)).release()
            memory.evict()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    enough.set()
    thread.join()


def child_forks_with_locks(path: str) -> None:
    file = Path(path)
    with quire.map(file, sharing="shared", protection="rw") as mapping:
        mapping.lock()
        with over_protected(mapping, file):
            pid = os.fork()
            if pid == 0:
                os._exit(int(locked_of_process() > 0))
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_child_inherits_no_locks(path: Path) -> None:
    children.run(child_forks_with_locks, path).check()


def test_a_child_can_pin(path: Path) -> None:
    children.run(child_forks_while_pinning, path).check()


if __name__ == "__main__":
    children.main()
