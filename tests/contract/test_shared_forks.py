"""Names of shared memory across forks: the child holds what its parent held, at every moment."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import quire
from quire import shared_names
from quire.testing import children
from quire.testing.waiting import wait_until

SIZE = 4096
ROUNDS = 40
FOLDER = Path(f"/dev/shm/quire-{os.geteuid()}")
NOBODY = 65534


@pytest.fixture
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A name that nobody else uses; who attaches to it waits long for a child that is slow."""
    monkeypatch.setattr(shared_names, "TRY_S", 60.0)
    return f"test-{os.getpid()}-{request.node.name}"[:150].replace("/", "-")


@contextlib.contextmanager
def beside_threads() -> Iterator[None]:
    """Python warns of a fork in a process with threads, which may be those of other tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@contextlib.contextmanager
def forked(fork: Callable[[], int] = os.fork) -> Iterator[int]:
    """A child that holds what its parent holds, until it is killed."""
    with beside_threads():
        child = fork()
    if child == 0:
        try:
            signal.pause()
        finally:
            os._exit(1)
    try:
        yield child
    finally:
        kill(child)


def kill(child: int) -> None:
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def filled(name: str) -> quire.SharedMapping:
    segment = quire.shared(name, SIZE, create=True)
    segment.array[0] = 5
    return segment


def assert_held(name: str) -> None:
    """Nobody can give the name to another segment."""
    with pytest.raises(quire.SourceError, match="is held by somebody"):
        quire.shared(name, SIZE, create=True)


def assert_reached(name: str) -> None:
    with quire.shared(name, create=False) as segment:
        assert segment.array[0] == 5


def assert_gone(name: str) -> None:
    with pytest.raises(quire.SourceError, match="nobody holds"):
        quire.shared(name, create=False)
    assert not (FOLDER / f"name.{name}").exists()


def stand_still_until(released: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children stand at their first step after a fork until there is a byte for each lease."""
    real = shared_names.Lease.inherited

    def late(lease: shared_names.Lease) -> None:
        os.read(released, 1)
        real(lease)

    monkeypatch.setattr(shared_names.Lease, "inherited", late)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ours, theirs = os.pipe()
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def test_a_child_holds_the_name_before_it_does_anything(
    name: str, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_still_until(pipe[0], monkeypatch)
    segment = filled(name)
    with forked():
        segment.close()
        assert_held(name)
        os.write(pipe[1], bytes(100))
        assert_reached(name)
        assert_held(name)
    assert_gone(name)


def test_a_child_that_is_killed_before_it_does_anything(
    name: str, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_still_until(pipe[0], monkeypatch)
    with filled(name) as segment:
        with forked():
            assert_reached(name)
        assert_reached(name)
        with forked():
            segment.close()
    assert_gone(name)


def test_a_parent_that_closes_at_once(name: str) -> None:
    for _ in range(ROUNDS):
        segment = filled(name)
        with forked():
            segment.close()
            assert_held(name)
            assert_reached(name)
        assert_gone(name)


def test_a_child_that_closes_at_once(name: str) -> None:
    with filled(name) as segment:
        for _ in range(ROUNDS):
            assert children.in_fork(segment.close) == ""
            assert_held(name)
            assert_reached(name)
    assert_gone(name)


def test_a_fork_in_the_middle_of_a_close(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another thread has unmapped the child has not, and so it does not keep the name."""
    real = quire.SharedMapping._leave

    def leave(segment: quire.SharedMapping) -> None:
        with forked():
            real(segment)
            patch.undo()
            wait_until(lambda: not is_held(name), "the child lets go of the name")

    segment = filled(name)
    with monkeypatch.context() as patch:
        patch.setattr(quire.SharedMapping, "_leave", leave)
        segment.close()
    assert_gone(name)


def test_several_children_and_segments(name: str) -> None:
    names = [f"{name}-{number}" for number in range(3)]
    segments = [filled(each) for each in names]
    with forked() as first, forked() as second, forked():
        for segment in segments:
            segment.close()
        for child in (first, second):
            for each in names:
                assert_held(each)
                assert_reached(each)
            kill(child)
        for each in names:
            assert_held(each)
            assert_reached(each)
    for each in names:
        assert_gone(each)


def test_a_child_of_a_child(name: str, pipe: tuple[int, int]) -> None:
    segment = filled(name)
    with beside_threads():
        child = os.fork()
        if child == 0:
            grandchild = os.fork()
            if grandchild == 0:
                signal.pause()
            os.write(pipe[1], b"%d" % grandchild)
            os._exit(0)
    segment.close()
    os.waitpid(child, 0)
    grandchild = int(os.read(pipe[0], 100))
    assert_held(name)
    assert_reached(name)
    os.kill(grandchild, signal.SIGKILL)
    wait_until(lambda: not is_held(name), "the grandchild ends")
    assert_gone(name)


def is_held(name: str) -> bool:
    try:
        quire.shared(name, SIZE, create=True).close()
    except quire.SourceError:
        return True
    return False


def test_processes_of_multiprocessing(name: str) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        segment = filled(name)
        with beside_threads():
            child = context.Process(target=signal.pause)
            child.start()
        segment.close()
        assert_held(name)
        assert_reached(name)
        child.kill()
        child.join()
        child.close()
        assert_gone(name)


def test_a_child_that_becomes_another_program(name: str) -> None:
    """With a ``preexec_fn`` the child is forked, and runs the hooks of a fork."""
    segment = filled(name)
    with beside_threads():
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, preexec_fn=lambda: None)
    with child:
        assert_held(name)
        segment.close()
        assert_gone(name)


def test_a_child_of_c_holds_the_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs no hook of Python's, and so cannot be reached; but nobody else gets its name."""
    segment = filled(name)
    with forked(ctypes.PyDLL(None).fork):
        assert_reached(name)
        segment.close()
        assert_held(name)
        monkeypatch.setattr(shared_names, "TRY_S", 0.01)
        with pytest.raises(quire.SourceError, match="is held, and cannot be reached"):
            quire.shared(name, create=False)
    assert_gone(name)


def test_a_child_without_descriptors_holds_the_name(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    segment = filled(name)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # the child can open none
    try:
        assert seen_by_a_child(segment) == 5
        with contextlib.ExitStack() as stack:
            stack.enter_context(forked())
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert_reached(name)
            segment.close()
            assert_held(name)
            monkeypatch.setattr(shared_names, "TRY_S", 0.01)
            with pytest.raises(quire.SourceError, match="is held, and cannot be reached"):
                quire.shared(name, create=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert_gone(name)


def seen_by_a_child(segment: quire.SharedMapping) -> int:
    """The first byte, as a child sees it."""
    with beside_threads():
        child = os.fork()
    if child == 0:
        os._exit(int(segment.array[0]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_an_unlinked_name_is_not_the_childs(
    name: str, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it was taken away before the child had done anything, and is another's by then."""
    stand_still_until(pipe[0], monkeypatch)
    with filled(name) as segment, forked():
        quire.unlink(name)
        with quire.shared(name, 2 * SIZE, create=True) as other:
            os.write(pipe[1], bytes(100))
            segment.close()
            with quire.shared(name, create=False) as same:
                assert same.size_bytes == 2 * SIZE
            other.close()
            assert_gone(name)


def test_a_fork_that_fails(name: str) -> None:
    user = NOBODY if os.geteuid() == 0 else os.geteuid()
    assert children.run(fail_to_fork, name, user).check() == "failed\n"
    assert not Path(f"/dev/shm/quire-{user}/name.{name}").exists()


def fail_to_fork(name: str, user: str) -> None:
    quire.shared(None, SIZE).close()  # imports all that it needs, which another user may not read
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(int(user), int(user), int(user))
        os.setresuid(int(user), int(user), int(user))
    segment = filled(name)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    try:
        os.fork()
    except BlockingIOError:
        print("failed")
    assert_held(name)
    assert_reached(name)
    segment.close()
    with filled(name):
        assert_reached(name)


if __name__ == "__main__":
    children.main()
