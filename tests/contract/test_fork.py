"""Children of a process with mappings read the right data; the parent is unharmed."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import quire
from quire import _core
from quire.store.resolve import Source
from quire.testing import children
from quire.testing.census import child_processes, take_census
from quire.testing.content import random_content
from quire.testing.pmaps import takes_system_calls
from quire.testing.stores import BytesStore
from quire.testing.waiting import wait_until

SIZE = (1 << 20) + 77
CONTENT = random_content(SIZE, 5)
MODEL = np.frombuffer(CONTENT, "u1")
KINDS = ["file", "zstd", "python"]


def source_of(kind: str, folder: Path) -> Source:
    """A source of `CONTENT`."""
    if kind == "python":
        return BytesStore(CONTENT)
    (folder / "content").write_bytes(CONTENT)
    if kind == "zstd":
        quire.pack(folder / "content", folder / "content.zst", frame="16 KiB")
        return folder / "content.zst"
    return folder / "content"


def map_source(source: Source, pmap: str) -> quire.Mapping:
    """Maps under a budget that holds a part."""
    return quire.open(source, dtype="u1", pmap=pmap, budget="2 MiB", granule="16 KiB")


def check(array: np.ndarray) -> None:
    """All of it, and in another order."""
    assert np.array_equal(array, MODEL)
    assert np.array_equal(array[::-4096], MODEL[::-4096])


@contextmanager
def touching(array: np.ndarray, count: int) -> Iterator[None]:
    """Threads that fault all the while, and are all right to the end."""
    stop, wrong = threading.Event(), []

    def touch(number: int) -> None:
        while not stop.is_set():
            for start in range(number * 1000, SIZE, 50_000):
                window = slice(start, start + 600)
                wrong.extend([window] * (not np.array_equal(array[window], MODEL[window])))

    threads = [threading.Thread(target=touch, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", KINDS)
def test_a_child_of_a_child(kind: str, pmap: str, tmp_path: Path) -> None:
    with map_source(source_of(kind, tmp_path), pmap) as mapping:
        array = mapping.array

        def deeper() -> None:
            check(array)
            assert children.in_fork(lambda: check(array)) == ""
            check(array)

        assert children.in_fork(deeper) == ""
        check(array)
        assert mapping.failed is None


@pytest.mark.parametrize("kind", KINDS)
def test_fork_while_threads_fault(kind: str, pmap: str, tmp_path: Path) -> None:
    with map_source(source_of(kind, tmp_path), pmap) as mapping:
        array = mapping.array
        with touching(array, 3):
            for _ in range(3):
                assert children.in_fork(lambda: check(array)) == ""
        check(array)
        assert mapping.failed is None
        assert mapping.statistics().errors == 0


def test_the_child_may_close_and_open(pmap: str, tmp_path: Path) -> None:
    source = source_of("zstd", tmp_path)
    gc.collect()  # tracebacks of other tests may keep mappings in cycles
    with map_source(source, pmap) as mapping:
        holder = [mapping.array]

        def close_and_open() -> None:
            before = take_census().descriptors
            holder.clear()
            mapping.close()
            assert _core.live_mappings() == 0
            assert take_census().threads == ("python",) or len(take_census().threads) == 1
            with map_source(source, pmap) as again:
                check(again.array)
            assert len(take_census().descriptors) <= len(before)

        assert children.in_fork(close_and_open) == ""
        check(holder[0])


def test_the_child_counts_for_itself(pmap: str, tmp_path: Path) -> None:
    with map_source(source_of("file", tmp_path), pmap) as mapping:
        array = mapping.array
        check(array)

        def all_resident() -> bool:
            return 0 not in mapping.residency()

        wait_until(all_resident, "a page is counted a moment after it can be read")

        def look() -> None:
            assert 1 not in mapping.residency()
            check(array)
            assert mapping.statistics().peak_resident_bytes <= 2 << 20

        assert children.in_fork(look) == ""
        assert all_resident()


def test_a_fork_in_c_whose_child_touches(pmap: str, tmp_path: Path) -> None:
    """No hook of the interpreter has run in that child: it reads the data, or it is told."""
    import ctypes

    with map_source(source_of("file", tmp_path), pmap) as mapping:
        array = mapping.array
        check(array)
        fork = ctypes.PyDLL(None).fork  # the child keeps the interpreter lock
        pid = fork()
        if pid == 0:
            status = 3
            try:
                status = 0 if bool((array == MODEL).all()) else 4
            except quire.Error:
                status = 1
            finally:
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) in (0, 1)
        check(array)


LIST_DESCRIPTORS = "import os; print(sorted(os.listdir('/proc/self/fd')))"


def descriptors_of_program(*, close_fds: bool) -> str:
    """What a program started from here finds open."""
    words = [sys.executable, "-S", "-c", LIST_DESCRIPTORS]
    return subprocess.run(
        words, stdout=subprocess.PIPE, text=True, check=True, close_fds=close_fds
    ).stdout


def test_a_program_started_while_mapped(pmap: str, tmp_path: Path) -> None:
    plain = [descriptors_of_program(close_fds=close) for close in (True, False)]
    with map_source(source_of("file", tmp_path), pmap) as mapping:
        array = mapping.array
        with touching(array, 2):
            assert plain == [descriptors_of_program(close_fds=close) for close in (True, False)]
        shell = subprocess.run(["/bin/sh", "-c", "exit 7"], check=False, preexec_fn=os.getpid)
        assert shell.returncode == 7
        if takes_system_calls(pmap):
            cat = subprocess.run(["cat"], input=array.data, capture_output=True, check=True)
            assert cat.stdout == CONTENT
        check(array)


def worker(mapping: quire.Mapping) -> bool:
    """What a worker process does with a mapping that it is given."""
    check(mapping.array)
    return mapping.failed is None


def child_works_in_processes(method: str, pmap: str, folder: str) -> None:
    """Workers of each start method: inherited by fork, else by its recipe."""
    context = multiprocessing.get_context(method)
    path = Path(folder) / "content"
    path.write_bytes(CONTENT)
    with map_source(path, pmap) as one, map_source(BytesStore(CONTENT), pmap) as other:
        check(one.array)
        process = context.Process(target=worker, args=(other,))
        process.start()
        process.join()
        assert process.exitcode == 0
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            assert list(pool.map(worker, [one, other])) == [True, True]
        check(one.array)
        check(other.array)
    if method == "forkserver":
        from multiprocessing import forkserver, resource_tracker

        forkserver._forkserver._stop()
        resource_tracker._resource_tracker._stop()
    assert child_processes() == [] or method == "spawn"


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method: str, pmap: str, tmp_path: Path) -> None:
    ended = children.run(child_works_in_processes, method, pmap, tmp_path)
    assert ended.status == 0, ended.errors
    assert "Error" not in ended.errors


def child_dies_while_its_child_lives(pmap: str) -> None:
    """The parent is killed; its child, an orphan, still reads."""
    mapping = map_source(BytesStore(CONTENT), pmap)
    array = mapping.array
    check(array)
    alive, other = os.pipe()
    if os.fork() == 0:
        os.close(other)
        os.read(alive, 1)  # returns when the parent is dead
        check(array)
        print("the orphan read all", flush=True)
        del array
        mapping.close()
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_orphan_reads_on(pmap: str) -> None:
    ended = children.run(child_dies_while_its_child_lives, pmap)
    assert ended.status == -signal.SIGKILL
    assert ended.output == "the orphan read all\n"
    assert ended.errors == ""


if __name__ == "__main__":
    children.main()
