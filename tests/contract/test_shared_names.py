"""The records behind the names of shared memory: hostile ones, crashes in the middle, races."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import os
import pickle
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import quire
from quire import _core, shared_names, shared_records
from quire.testing import children
from quire.testing.census import take_census
from quire.testing.content import new_seed
from quire.testing.waiting import wait_until

SIZE = 4096
FOLDER = Path(f"/dev/shm/quire-{os.geteuid()}")
NOBODY = 65534
PR_SET_DUMPABLE = 4


@pytest.fixture
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """A name that nobody else uses, whose record goes with the test."""
    quire.shared("test-makes-the-folder", SIZE).close()
    made = f"test-{os.getpid()}-{request.node.name}"[:150].replace("/", "-")
    yield made
    (FOLDER / f"name.{made}").unlink(missing_ok=True)


def record_of(name: str) -> Path:
    return FOLDER / f"name.{name}"


def record(size: int, descriptor: int, *slots: tuple[int, int]) -> bytes:
    """A record that leads to a descriptor of this process."""
    found = os.fstat(descriptor)
    head = struct.pack("=8sQQQ32x", b"quireSM1", size, found.st_dev, found.st_ino)
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    return head + b"".join(struct.pack("=QII", namespace, *slot) for slot in slots)


@pytest.mark.parametrize(
    "garbage",
    [b"x", b"quireSM1", b"\0" * 64, b"quireSM2" + bytes(56), b"[1, 2]" * 1000, os.urandom(5000)],
    ids=["one-byte", "short", "zeros", "another-version", "text", "noise"],
)
def test_what_is_no_record_is_refused_and_kept(name: str, garbage: bytes) -> None:
    record_of(name).write_bytes(garbage)
    for create in (True, False, None):
        with pytest.raises(quire.FormatError, match="no record of a shared name"):
            quire.shared(name, SIZE, create=create)
    shared_names.sweep()
    assert record_of(name).read_bytes() == garbage


def test_records_that_lie(name: str) -> None:
    """Slots without a lock mean nothing, whatever they say."""
    rng = np.random.default_rng(new_seed())
    with open("/dev/null", "rb") as null:
        lies = [
            record(SIZE, null.fileno(), (os.getpid(), null.fileno())),
            record(SIZE, null.fileno(), (1, 0), (0xFFFFFFFF, 0xFFFFFFFF)),
            record(1 << 63, null.fileno()),
            record(SIZE, null.fileno()) + rng.bytes(999),
            record(SIZE, null.fileno(), *[(7, 7)] * 5000),
        ]
    for lie in lies:
        for create in (True, None):
            record_of(name).write_bytes(lie)
            with quire.shared(name, SIZE, create=create) as segment:
                assert segment.read() == bytes(SIZE)
                assert record_of(name).stat().st_size < 200
        record_of(name).write_bytes(lie)
        with pytest.raises(quire.SourceError, match="nobody holds"):
            quire.shared(name, create=False)
        assert not record_of(name).exists()


def test_a_record_leads_to_nothing_but_a_sealed_memory_file(name: str, tmp_path: Path) -> None:
    """Even one with a lock on its slot, which only this user can make."""
    (tmp_path / "file").write_bytes(bytes(SIZE))
    loose = os.memfd_create("loose")
    os.ftruncate(loose, SIZE)
    with (tmp_path / "file").open("r+b") as file:
        for descriptor in (file.fileno(), loose):
            with record_of(name).open("w+b", buffering=0) as liar:
                liar.write(record(SIZE, descriptor, (os.getpid(), descriptor)))
                shared_records.set_lock(liar.fileno(), fcntl.F_WRLCK, 64, 16)
                with pytest.raises(quire.SourceError, match="it has closed the segment"):
                    quire.shared(name, create=False)
    os.close(loose)


def test_a_link_is_not_followed(name: str, tmp_path: Path) -> None:
    aim = tmp_path / "aim"
    aim.write_bytes(b"precious")
    record_of(name).symlink_to(aim)
    for create in (True, False, None):
        with pytest.raises(quire.SourceError, match="symbolic link") as caught:
            quire.shared(name, SIZE, create=create)
        assert caught.value.errno == errno.ELOOP
    assert aim.read_bytes() == b"precious"


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket"])
def test_other_things_of_the_name(name: str, kind: str) -> None:
    path = record_of(name)
    with socket.socket(socket.AF_UNIX) as bound:
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            bound.bind(str(path))
        for create in (True, False, None):
            with pytest.raises(quire.SourceError, match="the record of a shared name"):
                quire.shared(name, SIZE, create=create)
        shared_names.sweep()
        assert path.exists()
    path.rmdir() if kind == "folder" else path.unlink()


def test_a_record_of_another_user_is_refused(name: str) -> None:
    if os.geteuid() != 0:
        return  # only root can make one
    record_of(name).write_bytes(b"")
    os.chown(record_of(name), NOBODY, NOBODY)
    for create in (True, False, None):
        with pytest.raises(quire.SourceError, match="no file of user 0"):
            quire.shared(name, SIZE, create=create)


@pytest.mark.parametrize("flaw", ["mode", "link", "file", "owner"])
def test_a_folder_that_is_not_safe_is_refused(
    flaw: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "names"
    if flaw == "link":
        (tmp_path / "real").mkdir(mode=0o700)
        path.symlink_to(tmp_path / "real")
    elif flaw == "file":
        path.touch(mode=0o600)
    elif flaw == "owner" and os.geteuid():
        path = Path("/proc/1")  # root's
    elif flaw == "owner":
        path.mkdir(mode=0o700)
        os.chown(path, NOBODY, NOBODY)
    else:
        path.mkdir(mode=0o700)
        path.chmod(0o750)
    monkeypatch.setattr(shared_records, "folder_path", lambda: str(path))
    with pytest.raises(quire.SourceError, match=r"not safe to use: it must be a folder of user"):
        quire.shared("x", SIZE)
    quire.shared(None, SIZE).close()  # which needs no folder


def test_without_a_place_for_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_records, "folder_path", lambda: str(tmp_path / "not" / "there"))
    with pytest.raises(quire.SourceError, match="cannot be made: No such file") as caught:
        quire.shared("x", SIZE)
    assert "send()" in str(caught.value)


def test_a_folder_that_was_removed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "names"
    monkeypatch.setattr(shared_records, "folder_path", lambda: str(path))
    with quire.shared("x", SIZE) as old:
        old.array[0] = 1
        shutil.rmtree(path)
        with pytest.raises(quire.SourceError, match="nobody holds"):
            quire.shared("x", create=False)
        with quire.shared("x", SIZE, create=True) as new, quire.shared("x") as same:
            assert (old.array[0], new.array[0], same.array[0]) == (1, 0, 0)
            old.close()
            quire.shared("x", create=False).close()
    assert list(path.iterdir()) == []


STEPS = ["os.memfd_create", "os.ftruncate", "os.pwrite", "fcntl.fcntl", "os.fstat"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_killed_in_the_middle(name: str, step: str, count: int) -> None:
    """Wherever the maker dies, the name is as if it had never been used."""
    with children.start(die_at, name, step, count) as child:
        child.process.wait()
        assert child.process.returncode in (0, -signal.SIGKILL)
    with pytest.raises(quire.SourceError, match="nobody holds"):
        quire.shared(name, create=False)
    with quire.shared(name, SIZE, create=True), quire.shared(name, create=False) as same:
        assert same.read() == bytes(SIZE)
    assert not record_of(name).exists()


def die_at(name: str, step: str, count: str) -> None:
    """Makes a segment; the ``count``-th call of ``step`` is the last thing it does."""
    module, _, function = step.partition(".")
    real = getattr(sys.modules[module], function)
    left = int(count)

    def dying(*arguments: object) -> object:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    setattr(sys.modules[module], function, dying)
    with quire.shared(name, SIZE, create=True):
        pass


def test_one_that_stands_still_in_the_middle_is_told_of(name: str) -> None:
    with children.start(stand_still, name) as child:
        child.wait_line("stands")
        for create in (True, False, None):
            with pytest.raises(quire.SourceError, match="and does not go on"):
                quire.shared(name, SIZE, create=create)
        child.process.kill()
        child.process.wait()
    quire.shared(name, SIZE, create=True).close()


def stand_still(name: str) -> None:
    with shared_names.LOCK:
        reserved = shared_names.reserve(shared_names.key_of(name))
        assert reserved is not None
        print("stands", flush=True)
        signal.pause()


def hold(name: str) -> None:
    with quire.shared(name, SIZE) as segment:
        segment.array[0] = 5
        print("holds", flush=True)
        signal.pause()


def become(user: str) -> None:
    """Goes on as another user, after what is imported was imported."""
    quire.shared(None, SIZE).close()
    os.setgroups([])
    os.setresgid(int(user), int(user), int(user))
    os.setresuid(int(user), int(user), int(user))


def hold_and_hide(name: str, user: str = "") -> None:
    if user:
        become(user)
    with quire.shared(name, SIZE):
        assert ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) == 0
        print("holds", flush=True)
        signal.pause()


def attach_as(name: str, user: str) -> None:
    become(user)
    quire.shared(name, create=False)


def test_a_process_that_hides_its_descriptors_is_told_of(name: str) -> None:
    """It calls prctl(PR_SET_DUMPABLE, 0); root sees it all the same, and so tries as nobody."""
    root = os.geteuid() == 0
    with children.start(hold_and_hide, name, *([NOBODY] if root else [])) as child:
        child.wait_line("holds")
        if root:
            said = children.run(attach_as, name, NOBODY).errors
        else:
            with pytest.raises(quire.SourceError) as caught:
                quire.shared(name)
            said = str(caught.value)
            with pytest.raises(quire.SourceError, match="is held by somebody"):
                quire.shared(name, SIZE, create=True)
        assert "does not let others open its descriptors" in said
        assert f"process {child.process.pid} holds it" in said
        assert "send()" in said


def test_users_have_names_of_their_own(name: str) -> None:
    if os.geteuid() != 0:
        return  # only root can be two users
    with quire.shared(name, SIZE) as segment:
        segment.array[0] = 1
        assert children.run(have_my_own, name, NOBODY).check() == ""
        assert segment.array[0] == 1
    assert not Path(f"/dev/shm/quire-{NOBODY}/name.{name}").exists()


def have_my_own(name: str, user: str) -> None:
    become(user)
    with quire.shared(name, 2 * SIZE, create=True) as segment:
        assert segment.array[0] == 0


def test_a_holder_in_another_container_is_told_of(name: str) -> None:
    if os.geteuid() != 0:
        return  # only root may surely make a PID namespace
    inside = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    argv = [*inside, sys.executable, __file__, "hold", name]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with children.Child(subprocess.Popen(argv, **pipes)) as child:  # type: ignore[call-overload]
        child.wait_line("holds")
        with pytest.raises(quire.SourceError, match=r"another PID namespace .* send\(\)"):
            quire.shared(name)
        with pytest.raises(quire.SourceError, match="is held by somebody"):
            quire.shared(name, SIZE, create=True)
    wait_until(lambda: can_be_made(name), "the end of a container ends the lease")


def can_be_made(name: str) -> bool:
    try:
        quire.shared(name, SIZE, create=True).close()
    except quire.SourceError:
        return False
    return True


def test_descriptors_used_up(name: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with quire.shared(name, SIZE) as segment:
        kept: list[quire.SharedMapping] = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (segment.fileno() + 30, hard))
        try:
            for wanted in (name, None):
                with pytest.raises(quire.Error, match=r"ulimit -n|Too many open files"):
                    fill(kept, wanted)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for mapping in kept:
            mapping.close()
        assert len(kept) > 5
        quire.shared(name, create=False).close()
    assert not record_of(name).exists()


def fill(kept: list[quire.SharedMapping], name: str | None) -> None:
    while len(kept) < 100:
        kept.append(quire.shared(name, SIZE))


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_no_room_for_the_record(name: str, writes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = os.pwrite, writes

    def full(*arguments: object) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)  # type: ignore[arg-type]

    gc.collect()  # what other tests left is not counted
    before = take_census().descriptors
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        # The quick way writes by itself; where it cannot, it leaves all to this one.
        for quick in ("attach_segment", "make_record"):
            patch.setattr(_core, quick, lambda *_: None)
        for _ in range(2):
            with pytest.raises(quire.SourceError, match="cannot be written: No space left"):
                quire.shared(name, SIZE).close() if writes < 2 else attach_to_new(name)
            left = writes
    gc.collect()
    assert take_census().descriptors == before
    quire.shared(name, SIZE, create=True).close()
    assert not record_of(name).exists()


def attach_to_new(name: str) -> None:
    with quire.shared(name, SIZE, create=True):
        quire.shared(name, create=False)


def test_slots_of_the_dead_are_used_again(name: str) -> None:
    with quire.shared(name, SIZE):
        for _ in range(5):
            with children.start(hold, name) as first, children.start(hold, name) as second:
                first.wait_line("holds")
                second.wait_line("holds")
        assert record_of(name).stat().st_size <= 64 + 16 * 3
    assert not record_of(name).exists()


def test_the_sweep_takes_what_outlived_its_holders(name: str) -> None:
    with children.start(hold, name) as child:
        child.wait_line("holds")
    assert record_of(name).exists()
    with quire.shared(f"{name}-kept", SIZE):
        held, gone = shared_names.sweep()
        assert held >= 1
        assert gone >= 1
        assert not record_of(name).exists()
        quire.shared(f"{name}-kept", create=False).close()


def test_a_process_that_makes_its_first_name_sweeps(name: str) -> None:
    with children.start(hold, name) as child:
        child.wait_line("holds")
    assert record_of(name).exists()
    assert children.run(make_another, name).check() == ""
    assert not record_of(name).exists()


def make_another(name: str) -> None:
    quire.shared(f"{name}-another", SIZE).close()


def churn(name: str, seed: str) -> None:
    """Makes, attaches and lets go at random; what it sees of a segment is always whole."""
    rng = np.random.default_rng(int(seed))
    mine: list[quire.SharedMapping] = []
    for _ in range(300):
        if mine and rng.random() < 0.5:
            mine.pop(int(rng.integers(len(mine)))).close()
        else:
            segment = quire.shared(name, SIZE)
            segment.array[:8].view("u8")[0] = 7
            mine.append(segment)
        found = {int(segment.array[:8].view("u8")[0]) for segment in mine}
        assert found <= {7}
        inodes = {os.fstat(segment.fileno()).st_ino for segment in mine}
        assert len(inodes) <= 1, "two segments of one name at once"
    print("ended", flush=True)
    if int(seed) % 2:
        os.kill(os.getpid(), signal.SIGKILL)


def test_many_processes_at_once(name: str) -> None:
    seed = new_seed() % 100_000
    started = [children.start(churn, name, seed + number) for number in range(6)]
    try:
        for child in started:
            child.wait_line("ended", 60)
    finally:
        for child in started:
            ended = child.finish()
            assert ended.errors == ""
    with pytest.raises(quire.SourceError, match="nobody holds"):
        quire.shared(name, create=False)
    assert not record_of(name).exists()


class TestUnlink:
    def test_the_name_goes_and_the_memory_stays(self, name: str) -> None:
        with quire.shared(name, SIZE, create=True) as ours, quire.shared(name) as theirs:
            quire.unlink(name)
            ours.write(b"still shared")
            assert theirs.read(0, 12) == b"still shared"
            assert ours.shared_name is theirs.shared_name is None
            assert not record_of(name).exists()
            for _ in range(2):
                with pytest.raises(quire.SourceError, match="nobody holds") as caught:
                    quire.unlink(name)
                assert caught.value.errno == errno.ENOENT

    def test_the_name_can_be_anothers_at_once(self, name: str) -> None:
        with quire.shared(name, SIZE, create=True) as first:
            quire.unlink(name)
            with quire.shared(name, 2 * SIZE, create=True):
                first.close()
                assert quire.shared(name, create=False).size_bytes == 2 * SIZE

    def test_nobody_brings_it_back(self, name: str) -> None:
        with quire.shared(name, 2 * SIZE, create=True) as ours:
            ours.write(b"same")
            quire.unlink(name)

            def child() -> None:
                assert ours.shared_name is None
                assert ours.read(0, 4) == b"same"

            assert children.in_fork(child) == ""
            with pickle.loads(pickle.dumps(ours)) as again:
                assert again.read(0, 4) == b"same"
                assert again.shared_name is None
            here, there = socket.socketpair()
            with here, there:
                ours.send(here)
                with quire.receive(there) as received:
                    assert received.shared_name is None
            with ours.split(SIZE) as rest:
                assert rest.shared_name is None
            assert not record_of(name).exists()

    def test_what_a_killed_process_left_is_no_name(self, name: str) -> None:
        record_of(name).write_bytes(record(SIZE, 0, (os.getpid(), 0)))
        with pytest.raises(quire.SourceError, match="nobody holds"):
            quire.unlink(name)
        assert not record_of(name).exists()

    def test_what_is_being_taken_away_stays(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else who takes it away would remove what came in its place."""
        record_of(name).write_bytes(record(SIZE, 0, (os.getpid(), 0)))
        monkeypatch.setattr(shared_names, "TRY_S", 0.01)
        with record_of(name).open("r+b") as taker:
            shared_records.set_lock(taker.fileno(), fcntl.F_WRLCK, 0, 0)
            with pytest.raises(quire.SourceError, match="and does not go on"):
                quire.unlink(name)
            assert record_of(name).exists()

    def test_what_is_no_record_stays(self, name: str) -> None:
        record_of(name).write_bytes(b"something else")
        with pytest.raises(quire.FormatError):
            quire.unlink(name)
        assert record_of(name).exists()


def share_with_room_for(limit: str, name: str, create: str) -> None:
    """Says why it cannot be done while files have no more bytes than that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), hard))
    try:
        quire.shared(name, 16, create=create == "True")
    except quire.Error as error:
        print(type(error).__name__, error.errno == errno.EFBIG, "ulimit -f" in str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    quire.shared(name, 16).close()


@pytest.mark.parametrize(
    ("limit", "error"), [(8, "Error"), (40, "SourceError"), (70, "SourceError")]
)
def test_a_record_that_has_room_for_a_part_only(name: str, limit: int, error: str) -> None:
    said = children.run(share_with_room_for, limit, name, True).check()
    assert said.split() == [error, "True", "True"]
    assert not record_of(name).exists()


@pytest.mark.parametrize("limit", [80, 85])
def test_a_slot_that_has_room_for_a_part_only(name: str, limit: int) -> None:
    with quire.shared(name, 16) as segment:
        before = record_of(name).read_bytes()
        said = children.run(share_with_room_for, limit, name, False).check()
        assert said.split() == ["SourceError", "True", "True"]
        assert record_of(name).read_bytes().rstrip(b"\0") == before.rstrip(b"\0")
        assert segment.shared_name == name
    assert not record_of(name).exists()


if __name__ == "__main__":
    children.main()
