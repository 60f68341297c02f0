"""`quire.shared`: what a segment is, how long it lives, and how it goes to other processes."""

from __future__ import annotations

import errno
import gc
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import quire
from quire.testing import children
from quire.testing.census import take_census
from quire.testing.waiting import wait_until

PAGE = mmap.PAGESIZE
STARTS = ["fork", "spawn", "forkserver"]


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name that nobody else uses."""
    return f"test-{os.getpid()}-{request.node.name}"[:150].replace("/", "-")


def hold(name: str, size: str = "") -> None:
    """Holds a segment until it is killed; makes it, if it is told a size."""
    with quire.shared(name, int(size) if size else None, create=bool(size)) as segment:
        if size:
            segment.array[:5] = list(b"hello")
        print("holds", flush=True)
        signal.pause()


def record_of(name: str) -> Path:
    return Path(f"/dev/shm/quire-{os.geteuid()}/name.{name}")


def assert_gone(name: str) -> None:
    """Nobody can attach, a new one may be made, and it begins with zeros."""
    with pytest.raises(quire.SourceError, match="nobody holds") as caught:
        quire.shared(name, create=False)
    assert caught.value.errno == errno.ENOENT
    assert not record_of(name).exists()
    with quire.shared(name, PAGE, create=True) as segment:
        assert segment.read() == bytes(PAGE)


def test_create_attach_and_either(name: str) -> None:
    with pytest.raises(quire.SourceError, match="nobody holds"):
        quire.shared(name, PAGE, create=False)
    with quire.shared(name, PAGE, create=True) as first:
        assert (first.shared_name, first.size_bytes, first.mode) == (name, PAGE, "r+")
        assert first.pmap == "kernel"
        with pytest.raises(quire.SourceError, match="is held by somebody") as caught:
            quire.shared(name, PAGE, create=True)
        assert caught.value.errno == errno.EEXIST
        with quire.shared(name, create=False) as second, quire.shared(name, PAGE) as third:
            first.array[7] = 9
            assert second.array[7] == third.array[7] == 9
    assert_gone(name)


def test_the_descriptor_stays_as_long_as_the_segment() -> None:
    with quire.shared(size=PAGE) as segment:
        with pytest.raises(quire.Error, match=r"keeps its descriptor.*close the mapping"):
            segment.drop_descriptor()
        assert os.fstat(segment.fileno()).st_size == PAGE
        with pickle.loads(pickle.dumps(segment)) as same:
            assert same.size_bytes == PAGE


def test_attaching_and_closing_never_deletes(name: str) -> None:
    with quire.shared(name, PAGE) as segment:
        for _ in range(3):
            quire.shared(name).close()
        assert children.run(attach_and_end, name).check() == ""
        with quire.shared(name, create=False) as again:
            assert again.fileno() != segment.fileno()
    assert_gone(name)


def attach_and_end(name: str) -> None:
    assert quire.shared(name, create=False).size_bytes == PAGE


def test_the_creator_may_close_first(name: str) -> None:
    creator = quire.shared(name, PAGE)
    creator.array[0] = 1
    attached = quire.shared(name)
    creator.close()
    creator.close()
    with quire.shared(name, create=False) as third:
        assert third.array[0] == 1
    attached.close()
    assert_gone(name)


def test_sizes(name: str) -> None:
    with quire.shared(name, 5000) as segment:
        assert len(segment) == 5000
        with quire.shared(name) as same:
            assert len(same) == len(memoryview(same)) == 5000
        with pytest.raises(quire.SourceError, match="has 5000 bytes, and 4096 were asked for"):
            quire.shared(name, 4096)
        with pytest.raises(quire.SourceError, match="has 5000 bytes, and 8 were asked for"):
            quire.shared(name, shape=2, dtype="f4", create=False)
        with pytest.raises(quire.FormatError, match="no whole number of pieces"):
            quire.shared(name, dtype="f8", shape=(-1, 3))
        with quire.shared(name, create=False):
            pass  # those that failed gave their slots back
    assert_gone(name)
    with pytest.raises(ValueError, match="needs a size"):
        quire.shared(name)
    with pytest.raises(ValueError, match="needs a size"):
        quire.shared(name, shape=(-1, 2))
    with pytest.raises(quire.Error, match="An address space has"):
        quire.shared(name, 1 << 48)
    with pytest.raises(ValueError, match="cannot be mapped"):
        quire.shared(name, (1 << 63) - 1)
    assert_gone(name)


def test_a_segment_of_no_bytes(name: str) -> None:
    with quire.shared(name, 0) as none, quire.shared(name, create=False) as same:
        assert (len(none), len(same), same.read(), same.array.shape) == (0, 0, b"", (0,))
        assert pickle.loads(pickle.dumps(same)).shape == (0,)
    gc.collect()
    assert_gone(name)


@pytest.mark.parametrize("bad", ["", "a/b", "/a", "a\0", "x" * 201, "ä" * 101])
def test_names_that_cannot_be(bad: str) -> None:
    with pytest.raises(ValueError, match="a name has 1 to 200 bytes"):
        quire.shared(bad, PAGE)


@pytest.mark.parametrize("good", ["x" * 200, ".", "..", "a b\n", "ä", "\udcff", "name.x"])
def test_names_of_all_kinds(good: str) -> None:
    with quire.shared(good, PAGE, create=True) as one, quire.shared(good, create=False) as two:
        one.array[1] = 3
        assert (two.array[1], two.shared_name) == (3, good)


def test_arguments_that_cannot_be(name: str) -> None:
    with pytest.raises(TypeError, match="a name is text"):
        quire.shared(5, PAGE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without a name cannot be attached to"):
        quire.shared(None, PAGE, create=False)
    for protection in ["w", "rwx", "none", "rq"]:
        with pytest.raises(ValueError, match="protection"):
            quire.shared(name, PAGE, protection=protection)
    for permissions in [0o777, 0o4600, -1]:
        with pytest.raises(ValueError, match="more than reading and writing"):
            quire.shared(name, PAGE, permissions=permissions)
    assert not record_of(name).exists()


def test_reading_only(name: str) -> None:
    with quire.shared(name, PAGE) as writer, quire.shared(name, protection="r") as reader:
        writer.array[0] = 4
        assert (reader.array[0], reader.mode, reader.writable) == (4, "r", False)
        with pytest.raises(ValueError, match="read-only"):
            reader.array[0] = 1
        with pytest.raises(quire.ModeError):
            reader.write(b"x")
        with pytest.raises(quire.Error, match="EACCES"):
            reader.protect("rw")
        writer.close()
        with quire.shared(name) as other:  # through the descriptor of one who may only read
            other.array[0] = 5
            assert reader.array[0] == 5


def test_its_size_is_sealed(name: str) -> None:
    with quire.shared(name, PAGE) as segment:
        for length in (0, PAGE - 1, 2 * PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(segment.fileno(), length)
        with pytest.raises(quire.Error, match="a segment keeps its size, 4096 bytes"):
            segment.resize(2 * PAGE)
        assert len(segment) == PAGE
        segment.advise("remove")  # holes may be punched still


def test_permissions() -> None:
    with quire.shared(None, PAGE) as segment:
        assert segment.permissions == 0o600
    with quire.shared(None, PAGE, permissions=0o640) as segment:
        assert segment.permissions == 0o640
        assert os.fstat(segment.fileno()).st_uid == os.geteuid()


def test_the_owner_is_held_to_permissions(name: str) -> None:
    with quire.shared(name, PAGE, permissions=0o400):
        if os.geteuid() == 0:  # to whom they do not apply
            quire.shared(name).close()
            return
        quire.shared(name, protection="r").close()
        with pytest.raises(quire.SourceError, match="permissions of the segment do not allow"):
            quire.shared(name)


def test_arrays(name: str) -> None:
    with quire.shared(name, shape=(3, 4), dtype="i4", order="F") as segment:
        assert len(segment) == 48
        segment.array[:] = np.arange(12).reshape(3, 4)
        with quire.shared(name, shape=(3, -1), dtype="i4", order="F") as same:
            assert np.array_equal(same.array, np.arange(12).reshape(3, 4))
            assert quire.mapping_of(same.array[1:]) is same
        assert segment.statistics().errors == 0
        array = segment.array
        with pytest.raises(BufferError):
            segment.close()
        assert quire.shared(name).size_bytes == 48  # what could not be closed is held
        del array
        gc.collect()
    assert_gone(name)


def test_views_outlive_the_block(name: str) -> None:
    with quire.shared(name, PAGE) as segment:
        array = segment.array
    array[0] = 3
    with quire.shared(name, create=False) as other:
        assert other.array[0] == 3
    del array, segment
    gc.collect()
    assert_gone(name)


def test_what_is_collected_is_given_up(name: str) -> None:
    array = quire.shared(name, PAGE).array
    gc.collect()
    quire.shared(name, create=False).close()
    del array
    gc.collect()
    assert_gone(name)


def test_parts_hold_the_segment(name: str) -> None:
    with quire.shared(name, 4 * PAGE) as segment:
        rest = segment.split(PAGE)
        rest.array[0] = 8
        segment.close()
        with quire.shared(name, create=False) as whole:
            assert (len(whole), whole.array[PAGE]) == (4 * PAGE, 8)
        rest.close()
    assert_gone(name)


def test_closed() -> None:
    segment = quire.shared(None, PAGE)
    assert segment.shared_name is None
    segment.close()
    for call in (segment.fileno, lambda: segment.array, lambda: pickle.dumps(segment)):
        with pytest.raises(quire.ClosedError):
            call()


@pytest.mark.parametrize("killed", ["creator", "attacher", "both"])
def test_kill_9(name: str, killed: str) -> None:
    with children.start(hold, name, PAGE) as creator:
        creator.wait_line("holds")
        with children.start(hold, name) as attacher:
            attacher.wait_line("holds")
            for who, child in (("creator", creator), ("attacher", attacher)):
                if killed in (who, "both"):
                    child.process.kill()
                    child.process.wait()
            if killed != "both":
                with quire.shared(name, create=False) as segment:
                    assert segment.read(0, 5) == b"hello"
    assert_gone(name)


def test_kill_9_frees_the_memory(name: str) -> None:
    size = 64 << 20
    before = shared_memory_bytes()
    with children.start(hold_all, name, size) as child:
        child.wait_line("holds")
        assert shared_memory_bytes() - before > size // 2
    wait_until(lambda: shared_memory_bytes() - before < size // 2, "the kernel frees it")
    assert_gone(name)


def hold_all(name: str, size: str) -> None:
    with quire.shared(name, int(size)) as segment:
        segment.array[:] = 1
        print("holds", flush=True)
        signal.pause()


def shared_memory_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Shmem:"))


def test_a_forked_child_holds_it(name: str) -> None:
    segment = quire.shared(name, PAGE)
    segment.array[0] = 6
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.apply(int)  # it runs, and holds
        segment.close()
        with quire.shared(name, create=False) as again:
            assert again.array[0] == 6
        pool.terminate()
        pool.join()
    assert_gone(name)


def test_a_forked_child_gives_up_its_own_only(name: str) -> None:
    with quire.shared(name, PAGE) as segment:
        assert children.in_fork(segment.close) == ""
        with quire.shared(name, create=False) as same:
            assert same.fileno() != segment.fileno()
        assert children.in_fork(lambda: quire.shared(name, create=False).close()) == ""
    assert_gone(name)


def test_a_child_of_a_killed_parent_holds_it(name: str) -> None:
    with children.start(fork_and_hold, name) as parent:
        parent.wait_line("holds", count=2)
        child = int(next(line for line in parent.lines if line.startswith("child")).split()[1])
        parent.process.kill()
        parent.process.wait()
        with quire.shared(name, create=False) as segment:
            assert segment.read(0, 5) == b"hello"
        os.kill(child, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{child}/fd/0").exists(), "the child ends")
    assert_gone(name)


def fork_and_hold(name: str) -> None:
    with quire.shared(name, PAGE) as segment:
        segment.array[:5] = list(b"hello")
        child = os.fork()
        if child:
            os.write(1, b"child %d\n" % child)  # in one piece each: both write to one pipe
        os.write(1, b"holds\n")
        signal.pause()


def test_a_program_that_replaces_the_process_holds_nothing(name: str) -> None:
    with children.start(hold_then_exec, name) as child:
        child.wait_line("replaced")
        assert_gone(name)


def hold_then_exec(name: str) -> None:
    segment = quire.shared(name, PAGE)
    assert segment.fileno() > 2
    os.execv(
        sys.executable,
        [
            sys.executable,
            "-c",
            "import signal; print('replaced', flush=True); signal.pause()",
        ],
    )


def test_the_end_of_the_interpreter_takes_the_name_away(name: str) -> None:
    code = f"import quire; kept = quire.shared({name!r}, 4096); print(kept.shared_name)"
    ended = os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code])
    assert ended == 0
    assert not record_of(name).exists()


def total(segment: quire.SharedMapping, part: int) -> int:
    """What a worker does: reads, writes, and lets go."""
    segment.array[part] += 1
    return int(segment.array.sum())


def total_in_queue(queue: object, answers: object) -> None:
    segment = queue.get()  # type: ignore[attr-defined]
    answers.put((segment.shared_name, int(segment.array.sum())))  # type: ignore[attr-defined]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("named", [True, False])
def test_workers_get_a_reference(name: str, start: str, named: bool) -> None:
    context = multiprocessing.get_context(start)
    segment = quire.shared(name if named else None, shape=(100,), dtype="i8")
    segment.array[:] = 2
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        totals = [pool.submit(total, segment, part).result() for part in range(10)]
    assert totals == list(range(201, 211))
    assert segment.array[:10].tolist() == [3] * 10
    # To a new process, which need not find anyone who holds it.
    queue, answers = context.Queue(), context.Queue()
    worker = context.Process(target=total_in_queue, args=(queue, answers))
    worker.start()
    queue.put(segment)
    assert answers.get(timeout=60) == (name if named else None, 210)
    worker.join()
    direct = context.Process(target=add_and_end, args=(segment,))
    direct.start()
    direct.join()
    assert direct.exitcode == 0
    assert segment.array[99] == 3
    segment.close()
    if named:
        assert_gone(name)


def add_and_end(segment: quire.SharedMapping) -> None:
    segment.array[99] += 1


def test_pickles_are_small_and_refer(name: str) -> None:
    with quire.shared(name, "1 MiB", dtype="f4") as segment:
        pickled = pickle.dumps(segment)
        assert len(pickled) < 600
        with pickle.loads(pickled) as same:
            same.array[3] = 1.5
            assert segment.array[3] == 1.5
            assert same.shared_name == name
    with pytest.raises(quire.SourceError, match="has ended: all processes that held it"):
        pickle.loads(pickled)
    with (
        quire.shared(name, "1 MiB"),
        pytest.raises(quire.ChangedError, match="another segment's by now"),
    ):
        pickle.loads(pickled)
    assert_gone(name)


def test_a_pickle_of_a_reader_is_a_reader(name: str) -> None:
    with (
        quire.shared(name, PAGE),
        quire.shared(name, protection="r") as reader,
        pickle.loads(pickle.dumps(reader)) as same,
    ):
        assert not same.writable


def test_many_cycles_leak_nothing(name: str) -> None:
    for _ in range(20):
        cycle(name)
    gc.collect()
    # The thread that watched large mappings of another test ends by itself, with its descriptor.
    wait_until(lambda: "quire-kernel" not in take_census().threads, "no mapping is watched")
    before = take_census()
    for _ in range(1000):
        cycle(name)
    gc.collect()
    after = take_census()
    assert after.descriptors == before.descriptors
    assert after.threads == before.threads
    assert after.children == before.children
    assert after.map_entries <= before.map_entries + 2
    assert after.resident_bytes < before.resident_bytes + (4 << 20)
    assert not record_of(name).exists()


def cycle(name: str) -> None:
    with quire.shared(name, 3 * PAGE, create=True) as one, quire.shared(name) as two:
        two.array[0] = one.array[PAGE] = 1
    quire.shared(None, PAGE).close()


def test_threads(name: str) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(100):
                with quire.shared(name, PAGE) as segment:
                    segment.array[:8].view("u8")[0] += 0
                    assert len(segment) == PAGE
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert_gone(name)


def test_forks_beside_threads(name: str) -> None:
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            quire.shared(name, PAGE).close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(20):
            assert children.in_fork(lambda: quire.shared(name, PAGE).close()) == ""
    finally:
        ended.set()
        thread.join()
    assert_gone(name)


def show_threads() -> None:
    with quire.shared(size="4 MiB") as segment:
        segment.array[:] = 1
        tasks = Path("/proc/self/task").iterdir()
        print(sorted((task / "comm").read_text().strip() for task in tasks))


def test_nobody_watches_what_is_in_memory() -> None:
    """Nothing is read ahead of its touches, so it needs no daemon: attaching is quick."""
    assert "quire-kernel" not in children.run(show_threads).check()


if __name__ == "__main__":
    children.main()
