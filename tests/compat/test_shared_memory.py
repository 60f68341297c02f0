"""`quire.compat.shared_memory` beyond the standard library's tests: life, death, failures."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import pickle
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
from quire import shared_names
from quire.compat import shared_memory as module
from quire.compat.shared_memory import ShareableList, SharedMemory
from quire.testing import children
from quire.testing.waiting import wait_until

SIZE = 12_345  # no whole number of pages


@pytest.fixture(params=["unnamed", "named"])
def block(request: pytest.FixtureRequest) -> Iterator[SharedMemory]:
    """A block that this process made, with a name of either kind."""
    name = f"test-{os.getpid()}-{id(request)}" if request.param == "named" else None
    made = SharedMemory(name, create=True, size=SIZE)
    yield made
    made.close()
    with contextlib.suppress(FileNotFoundError):
        made.unlink()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def write(name: str, text: str) -> None:
    """In a child: attaches, writes, says the size, and ends without a `close`."""
    block = SharedMemory(name)
    assert block.buf is not None
    block.buf[: len(text)] = text.encode()
    print(block.size, len(block.buf))


def test_who_attaches_sees_the_same_size_and_never_deletes(block: SharedMemory) -> None:
    for text in ("first", "again"):
        said = children.run(write, block.name, text).check()
        assert said.split() == [str(SIZE), str(SIZE)]
        assert bytes(block.buf[:5]) == text.encode()
    with_same = SharedMemory(block.name)
    assert bytes(with_same.buf[:5]) == b"again"
    with_same.close()


def make_and_wait(name: str) -> None:
    """In a child: makes a block and holds it until it is killed."""
    block = SharedMemory(name or None, create=True, size=SIZE)
    block.buf[:3] = b"abc"
    print(block.name, flush=True)
    sys.stdin.read()
    signal.pause()


def name_made_by(child: children.Child) -> str:
    wait_until(lambda: child.lines or child.process.poll() is not None, "the child made a block")
    return child.lines[0].strip()


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("named", [False, True])
def test_nothing_is_left_of_a_killed_maker(named: bool, by: signal.Signals) -> None:
    asked = f"test-killed-{os.getpid()}-{int(by)}" if named else ""
    with children.start(make_and_wait, asked) as child:
        name = name_made_by(child)
        held = SharedMemory(name)
        child.process.send_signal(by)
        ended = child.finish()
    assert ended.status == -by
    assert ended.errors == ""  # no tracker that warns
    assert bytes(held.buf[:3]) == b"abc"  # who holds it keeps it
    held.close()
    with pytest.raises(FileNotFoundError, match="nobody holds"):
        SharedMemory(name)
    assert not Path("/dev/shm", name).exists()


def test_a_given_name_outlives_its_maker(request: pytest.FixtureRequest) -> None:
    name = f"test-outlives-{os.getpid()}"
    with children.start(make_and_wait, name) as child:
        held = SharedMemory(name_made_by(child))
        child.process.kill()
        child.finish()
    said = children.run(write, name, "xyz").check()
    assert said.split()[0] == str(SIZE)
    assert bytes(held.buf[:3]) == b"xyz"
    held.unlink()
    held.close()


def test_it_stays_after_its_maker_closed_it(block: SharedMemory) -> None:
    block.buf[:5] = b"kept!"
    block.close()
    assert block.buf is None
    children.run(write, block.name, "K").check()
    again = SharedMemory(block.name)
    assert bytes(again.buf[:5]) == b"Kept!"
    again.close()


def unlink(name: str) -> None:
    block = SharedMemory(name)
    block.close()
    block.unlink()


def test_what_another_process_unlinked_is_given_up(block: SharedMemory) -> None:
    block.close()
    before = descriptors()
    children.run(unlink, block.name).check()
    with pytest.raises(FileNotFoundError):
        SharedMemory(block.name)
    for _ in range(2):  # makes others, and so looks at those it holds
        other = SharedMemory(create=True, size=1)
        other.close()
        other.unlink()
    assert descriptors() < before


def test_unlink_leaves_the_memory_and_works_once(block: SharedMemory) -> None:
    other = SharedMemory(block.name)
    other.unlink()
    block.buf[0] = 7
    assert other.buf[0] == 7
    for one in (block, other):
        with pytest.raises(FileNotFoundError):
            one.unlink()
    with pytest.raises(FileNotFoundError):
        SharedMemory(block.name)
    other.close()


def test_a_name_is_free_after_unlink() -> None:
    name = f"test-free-{os.getpid()}"
    first = SharedMemory(name, create=True, size=10)
    first.unlink()
    second = SharedMemory(name, create=True, size=20)
    third = SharedMemory(name)
    assert third.size == 20
    first.buf[0], second.buf[0] = 1, 2
    assert (first.buf[0], third.buf[0]) == (1, 2)
    for one in (first, third, second):
        one.close()
    second.unlink()


def test_nothing_is_left_open() -> None:
    def cycle(name: str | None) -> None:
        made = SharedMemory(name, create=True, size=SIZE)
        same = SharedMemory(made.name)
        same.close()
        made.close()
        made.unlink()

    name = f"test-cycle-{os.getpid()}"
    for one in (None, name):
        cycle(one)
    before = descriptors()
    for one in (None, name) * 50:
        cycle(one)
    assert descriptors() == before


@pytest.mark.parametrize("track", [True, False])
def test_track_is_accepted_and_starts_no_tracker(track: bool) -> None:
    said = children.run(use_with_track, track).check()
    assert said.split() == ["None", "None"]


def use_with_track(track: str) -> None:
    made = SharedMemory(create=True, size=1, track=track == "True")
    same = SharedMemory(made.name, track=track == "True")
    tracker = resource_tracker._resource_tracker
    print(tracker._pid, tracker._fd)
    same.close()  # and never unlinked: nobody warns


class TestViews:
    def test_close_is_refused_while_an_array_is_alive(self, block: SharedMemory) -> None:
        array = np.frombuffer(block.buf, np.uint8)
        part = block.buf[:10]
        with pytest.raises(BufferError):
            block.close()
        array_of_part = np.frombuffer(part, np.uint8)
        del array
        with pytest.raises(BufferError):
            block.close()
        del array_of_part
        part.release()
        block.close()
        assert block.buf is None

    def test_another_object_of_the_block_may_be_closed(self, block: SharedMemory) -> None:
        array = np.frombuffer(block.buf, np.uint8)
        same = SharedMemory(block.name)
        same.close()
        assert array[0] == 0
        del array
        block.close()

    def test_arrays_keep_the_memory_of_an_object_that_is_gone(self) -> None:
        made = SharedMemory(create=True, size=SIZE)
        array = np.frombuffer(made.buf, np.uint8)
        writer = SharedMemory(made.name)
        writer.buf[9] = 9
        made.unlink()
        writer.close()
        before = descriptors()
        del made, writer
        gc.collect()
        assert array[9] == 9
        del array
        gc.collect()
        assert descriptors() < before


class TestFork:
    def test_a_child_writes_and_its_end_takes_nothing_away(self, block: SharedMemory) -> None:
        def child() -> None:
            block.buf[0] = 5
            block.close()

        assert children.in_fork(child) == ""
        assert block.buf[0] == 5
        same = SharedMemory(block.name)
        assert same.buf[0] == 5
        same.close()

    def test_a_child_holds_nothing_that_its_parent_closed(self, block: SharedMemory) -> None:
        block.close()

        def child() -> None:
            from quire.compat.shared_blocks import BLOCKS

            assert block.name not in BLOCKS._known
            same = SharedMemory(block.name)
            same.buf[1] = 6
            same.close()

        assert children.in_fork(child) == ""
        same = SharedMemory(block.name)
        assert same.buf[1] == 6
        same.close()


class TestPosixSegments:
    """Those that the standard library's class made."""

    @pytest.fixture
    def posix(self) -> Iterator[shared_memory.SharedMemory]:
        made = shared_memory.SharedMemory(create=True, size=10_000)
        yield made
        made.close()
        try:
            made.unlink()
        except FileNotFoundError:
            resource_tracker.unregister(made._name, "shared_memory")

    def test_attach_write_and_unlink(self, posix: shared_memory.SharedMemory) -> None:
        posix.buf[:2] = b"hi"
        ours = SharedMemory(posix.name)
        assert (ours.size, bytes(ours.buf[:2])) == (posix.size, b"hi")
        ours.buf[:2] = b"HI"
        assert bytes(posix.buf[:2]) == b"HI"
        ours.close()
        ours.unlink()
        with pytest.raises(FileNotFoundError):
            ours.unlink()
        with pytest.raises(FileNotFoundError):
            shared_memory.SharedMemory(posix.name)

    def test_its_name_is_held(self, posix: shared_memory.SharedMemory) -> None:
        with pytest.raises(FileExistsError, match="POSIX segment"):
            SharedMemory(posix.name, create=True, size=1)

    def test_one_that_is_truncated_raises(self, posix: shared_memory.SharedMemory) -> None:
        ours = SharedMemory(posix.name)
        array = np.frombuffer(ours.buf, np.uint8)
        os.truncate(f"/dev/shm/{posix.name}", 0)
        with pytest.raises(quire.TruncatedError):
            array[5000].item()
        os.truncate(f"/dev/shm/{posix.name}", 10_000)
        del array
        ours.close()

    def test_an_empty_one_is_refused(self) -> None:
        path = Path(f"/dev/shm/test-empty-{os.getpid()}")
        path.touch()
        try:
            with pytest.raises(ValueError, match="empty"):
                SharedMemory(path.name)
        finally:
            path.unlink()

    def test_the_standard_class_does_not_find_ours(self, block: SharedMemory) -> None:
        with pytest.raises(FileNotFoundError):
            shared_memory.SharedMemory(block.name)

    def test_a_list_made_by_the_standard_class(self) -> None:
        items = ["howdy", b"bytes", 1, 2.5, None, True]
        theirs = shared_memory.ShareableList(items)
        ours = ShareableList(name=theirs.shm.name)
        assert list(ours) == items
        ours[2] = 77
        assert theirs[2] == 77
        ours.shm.close()
        theirs.shm.close()
        theirs.shm.unlink()


class TestNames:
    @pytest.mark.parametrize(
        ("name", "number"),
        [("", errno.EINVAL), ("a/b", errno.EINVAL), ("n" * 300, errno.ENAMETOOLONG)],
    )
    @pytest.mark.parametrize("create", [True, False])
    def test_bad_ones(self, name: str, number: int, create: bool) -> None:
        with pytest.raises(OSError) as caught:
            SharedMemory(name, create=create, size=1)
        assert caught.value.errno == number

    def test_a_nul_character(self) -> None:
        for create in (True, False):
            with pytest.raises(ValueError, match="embedded null"):
                SharedMemory("a\0b", create=create, size=1)

    def test_places_that_lie(self, tmp_path: Path) -> None:
        """A name that says where a block is leads to blocks and to nothing else."""
        path = tmp_path / "file"
        path.write_bytes(bytes(100))
        reading, writing = os.pipe()
        with open("/dev/null", "rb") as null, open(path, "r+b") as file:
            memory = os.memfd_create("unsealed")
            for descriptor in (null.fileno(), file.fileno(), reading, memory, 9999):
                try:
                    inode = os.fstat(descriptor).st_ino
                except OSError:
                    inode = 1
                for process in (os.getpid(), os.getppid(), 0x3FFFFF):
                    name = f"psm_{process:06x}_{descriptor:05x}_{inode:010x}"
                    if descriptor == memory and process == os.getpid():
                        continue  # another descriptor of this very process
                    with pytest.raises(OSError):
                        SharedMemory(name)
            for one in (reading, writing, memory):
                os.close(one)

    def test_a_place_cannot_be_asked_for(self, block: SharedMemory) -> None:
        with pytest.raises(FileExistsError):
            SharedMemory("psm_000001_00001_0000000001", create=True, size=1)

    def test_a_leading_slash(self) -> None:
        made = SharedMemory(f"/test-slash-{os.getpid()}", create=True, size=1)
        same = SharedMemory(made.name)
        assert made.name == same.name
        same.close()
        made.close()
        made.unlink()


def test_threads_make_attach_and_close_at_once() -> None:
    shared = SharedMemory(create=True, size=SIZE)
    wrong: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(50):
                same = SharedMemory(shared.name)
                same.buf[number] = turn
                own = SharedMemory(create=True, size=1 + number)
                assert SharedMemory(own.name).size == 1 + number
                own.close()
                own.unlink()
                same.close()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert bytes(shared.buf[:8]) == bytes([49] * 8)
    shared.close()
    shared.unlink()


class TestList:
    def test_strings_have_room_for_their_bytes(self) -> None:
        items = ["é" * 20, "日本語" * 9, "plain"]
        made = ShareableList(items)
        assert list(made) == items
        assert list(pickle.loads(pickle.dumps(made))) == items
        made.shm.close()
        made.shm.unlink()

    def test_it_cannot_hold_other_types(self) -> None:
        with pytest.raises(KeyError):
            ShareableList([object()])

    def test_negative_positions_that_are_not_there(self) -> None:
        made = ShareableList([1, 2])
        for position in (-3, 2):
            with pytest.raises(IndexError):
                made[position]
            with pytest.raises(IndexError):
                made[position] = 1
        made.shm.close()
        made.shm.unlink()


def with_manager() -> None:
    import multiprocessing.managers

    import quire.compat.shared_memory as ours

    multiprocessing.managers.shared_memory = ours
    with multiprocessing.managers.SharedMemoryManager() as manager:
        made = manager.ShareableList(range(10))
        block = manager.SharedMemory(SIZE)
        print(sum(made), block.size)
        name = block.name
    try:
        SharedMemory(name)
    except FileNotFoundError:
        print("gone")


def test_a_manager_says_nothing_of_leaks() -> None:
    assert children.run(with_manager).check().split() == ["45", str(SIZE), "gone"]


def test_a_name_that_is_used_again_while_it_is_unlinked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread makes a block of the name while the thread that unlinks it is not done."""
    name = f"test-again-{os.getpid()}"
    really, made = module._unlink_named, []

    def unlink_and_make(key: str) -> None:
        really(key)
        made.append(SharedMemory(name, create=True, size=SIZE))

    first = SharedMemory(name, create=True, size=SIZE)
    with monkeypatch.context() as patched:
        patched.setattr(module, "_unlink_named", unlink_and_make)
        first.unlink()
    (second,) = made
    second.buf[:2] = b"ok"
    second.close()
    again = SharedMemory(name)  # its maker holds it, and nobody has unlinked it
    assert bytes(again.buf[:2]) == b"ok"
    again.close()
    again.unlink()
    with pytest.raises(FileNotFoundError):
        SharedMemory(name)
    first.close()


@pytest.mark.parametrize("first", ["maker", "other"])
def test_a_block_that_is_attached_to_while_it_is_made(
    monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """Two threads map the same memory at once: whichever is first, it is held as its maker's."""
    name = f"test-at-once-{first}-{os.getpid()}"
    really, others = quire.shared, []

    def shared(key: str, *arguments: Any, create: bool, **named: Any) -> quire.SharedMapping:
        monkeypatch.setattr(quire, "shared", really)
        if first == "maker":  # which came after the other had looked
            others.append(SharedMemory(name, create=True, size=SIZE))
            return really(key, *arguments, create=create, **named)
        mapped = really(key, *arguments, create=create, **named)
        others.append(SharedMemory(name))
        return mapped

    before = descriptors()
    monkeypatch.setattr(quire, "shared", shared)
    makes = first != "maker"
    one = SharedMemory(name, create=makes, size=SIZE)
    (other,) = others
    assert one._mmap is other._mmap  # the same addresses
    one.buf[:2] = b"ok"
    one.close()
    other.close()
    again = SharedMemory(name)
    assert bytes(again.buf[:2]) == b"ok"
    again.unlink()
    again.close()
    with pytest.raises(FileNotFoundError):
        SharedMemory(name)
    assert descriptors() == before


def test_a_block_that_is_unlinked_while_it_is_attached_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block that was attached to does not take the place of the one that has its name now."""
    name = f"test-replaced-{os.getpid()}"
    really, made = quire.shared, [SharedMemory(name, create=True, size=SIZE)]

    def shared(*arguments: Any, **named: Any) -> quire.SharedMapping:
        monkeypatch.setattr(quire, "shared", really)
        mapped = really(*arguments, **named)
        made[0].unlink()
        made.append(SharedMemory(name, create=True, size=SIZE))
        return mapped

    monkeypatch.setattr(module.BLOCKS, "use", lambda _: None)
    monkeypatch.setattr(quire, "shared", shared)
    old = SharedMemory(name)
    monkeypatch.undo()
    first, second = made
    first.buf[:3], second.buf[:3] = b"old", b"new"
    assert bytes(old.buf[:3]) == b"old"
    second.close()
    found = SharedMemory(name)
    assert bytes(found.buf[:3]) == b"new"
    found.unlink()
    for block in (old, first, found):
        block.close()


def drop_blocks_while_names_are_taken() -> None:
    """Collections come in the middle of taking a name, with blocks among what is collected."""

    class Collecting(weakref.WeakSet[Any]):
        def add(self, item: object) -> None:
            gc.collect()
            super().add(item)

    shared_names.HELD = Collecting(shared_names.HELD)
    gc.disable()
    gc.freeze()  # a collection looks at little else

    def take_names() -> None:
        for number in range(300):
            ring: list[Any] = [SharedMemory(create=True, size=1)]
            ring.append(ring)
            del ring
            quire.shared(f"test-{threading.get_native_id()}-{number}", 1).close()

    def make_blocks() -> None:
        for number in range(300):
            made = SharedMemory(f"test-{threading.get_native_id()}-{number}", create=True, size=1)
            made.unlink()
            made.close()

    threads = [threading.Thread(target=work) for work in (take_names, make_blocks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("done")


def test_finalizers_of_blocks_and_of_names_do_not_wait_for_each_other() -> None:
    """A finalizer runs in any thread, whatever that is at: one lock guards both."""
    assert children.run(drop_blocks_while_names_are_taken).check() == "done\n"


if __name__ == "__main__":
    children.main()
