"""Mappings when the world gets worse: files that change, reads that fail, limits, the end."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import pickle
import re
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import quire
from quire import _core
from quire.testing import children
from quire.testing.census import Census, child_processes, take_census
from quire.testing.content import random_content
from quire.testing.stores import BytesStore, DyingStore
from quire.testing.touches import TOUCHES, equals
from quire.testing.waiting import wait_until

PAGE = mmap.PAGESIZE
PAGES = 64
SIZE = PAGES * PAGE
CONTENT = random_content(SIZE, 13)
MODEL = np.frombuffer(CONTENT, "u1")
FILLER = 0xFF
MIB = 1 << 20
EXIT_LIMIT_S = 5.0
SETTLE_S = 0.3
LATE_S = 30.0
LATE_OFFSET = 50 * PAGE
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}


def map_file(path: Path, pmap: str) -> quire.Mapping:
    return quire.open(path, dtype="u1", pmap=pmap, granule=PAGE, budget="2 MiB", retries=0)


def resident(mapping: quire.Mapping) -> list[int]:
    """Numbers of the resident granules."""
    return [number for number, is_in in enumerate(mapping.residency()) if is_in]


def wait_settled(mapping: quire.Mapping) -> list[int]:
    """The resident granules, when readahead has come to rest."""
    seen: list[list[int]] = []

    def settled() -> bool:
        seen.append(resident(mapping))
        return len(seen) > 10 and seen[-1] == seen[-10]

    wait_until(settled, "readahead comes to rest")
    return seen[-1]


def change(path: Path, how: str) -> None:
    """Changes a file in place; its clock moves on."""
    if how == "truncated":
        os.truncate(path, SIZE // 2 + 100)
    elif how == "emptied":
        os.truncate(path, 0)
    else:
        path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 1_000_000))
    threading.Event().wait(0.005)  # a file is looked at once a millisecond


@pytest.mark.parametrize(
    ("how", "kind", "least_offset"),
    [
        ("truncated", quire.TruncatedError, SIZE // 2 + 100),
        ("emptied", quire.TruncatedError, 0),
        ("rewritten", quire.ChangedError, 0),
    ],
)
def test_a_file_that_changes_while_mapped(
    how: str, kind: type[quire.Error], least_offset: int, pmap: str, tmp_path: Path
) -> None:
    """Cold pages raise, resident ones are read on; opened anew the file is what it is now."""
    path = tmp_path / "content"
    path.write_bytes(CONTENT)
    with map_file(path, pmap) as mapping:
        array = mapping.array
        assert array[5] == MODEL[5]
        assert array[20 * PAGE] == MODEL[20 * PAGE]
        warm = wait_settled(mapping)
        cold = max(set(range(PAGES)) - set(warm))
        change(path, how)
        for touch in TOUCHES.values():
            with pytest.raises(quire.PageIOError) as caught:
                touch(array[cold * PAGE : cold * PAGE + 10])
            assert type(caught.value) is kind
            assert caught.value.source == str(path)
            assert caught.value.page == cold
            assert caught.value.offset is not None
            assert max(least_offset, cold * PAGE) <= caught.value.offset < (cold + 1) * PAGE
        assert type(mapping.failed) is kind
        for number in warm:
            part = slice(number * PAGE, (number + 1) * PAGE)
            assert equals(array[part], MODEL[part])
        del array
    with map_file(path, pmap) as mapping:
        assert bytes(mapping.array) == path.read_bytes()
        assert mapping.failed is None


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_a_file_that_is_replaced_stays_the_one_that_was_opened(
    how: str, pmap: str, tmp_path: Path
) -> None:
    """A rename over it changes the name alone; who opens the name again has the new file."""
    path, other = tmp_path / "content", tmp_path / "other"
    path.write_bytes(CONTENT)
    with map_file(path, pmap) as mapping:
        array = mapping.array
        assert array[0] == MODEL[0]
        recipe = pickle.dumps(mapping)
        if how == "replaced":
            other.write_bytes(CONTENT[: SIZE // 4][::-1])
            other.rename(path)
        else:
            path.unlink()
        threading.Event().wait(0.005)
        try:
            same = equals(array, MODEL)
        except quire.ChangedError as error:  # the status change of the last name is seen
            pytest.fail(f"the open file did not change: {error}")
        assert same
        with pytest.raises(quire.ChangedError if how == "replaced" else quire.SourceError):
            pickle.loads(recipe)
        del array
    if how == "replaced":
        with map_file(path, pmap) as mapping:
            assert bytes(mapping.array) == CONTENT[: SIZE // 4][::-1]


# Reads that fail, each in turn.

FAULTS = {
    "EIO": {"code": "io", "errno": errno.EIO},
    "ESTALE": {"code": "io", "errno": errno.ESTALE},
    "short": {"code": "truncated"},
}


def work(array: np.ndarray, seen: np.ndarray) -> None:
    """Copies everything, in pieces that are sequential, scattered and backwards."""
    spans = [slice(0, 20 * PAGE), slice(40 * PAGE + 5, 41 * PAGE), slice(60 * PAGE, 61 * PAGE)]
    for span in [*spans, slice(None, None, -1), slice(20 * PAGE, None)]:
        np.copyto(seen[span], array[span])
        for _ in range(3):
            pass


def open_with_fault(pmap: str, kind: str, packed: bytes, faults: dict[str, object]) -> _core.Store:
    if kind == "zstd":
        return _core.open_zstd(_core.open_faulty(_core.open_memory(packed, "packed"), **faults))
    return _core.open_faulty(_core.open_memory(CONTENT, "content"), **faults)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["plain", "zstd"])
def test_every_read_fails_once_and_for_good(
    kind: str, fault: str, pmap: str, tmp_path: Path
) -> None:
    """Once: what may pass is tried again, and right. For good: an error, and nothing wrong."""
    (tmp_path / "plain").write_bytes(CONTENT)
    quire.pack(tmp_path / "plain", tmp_path / "packed", frame="16 KiB")
    packed = (tmp_path / "packed").read_bytes()
    errors = 0
    for number in range(1000):
        for count in (1, None):
            faults = {"first": number, "count": count, **FAULTS[fault]}
            seen = np.zeros(SIZE, "u1")
            error: quire.Error | None = None
            mapping = None
            try:
                store = open_with_fault(pmap, kind, packed, faults)
                mapping = quire.open(
                    store, dtype="u1", pmap=pmap, granule="16 KiB", budget="2 MiB", retries=1
                )
                work(mapping.array, seen)
            except quire.Error as caught:
                error = caught
            if error is None and mapping is not None and mapping.statistics().errors == 0:
                assert np.array_equal(seen, MODEL), (number, count)
            else:
                errors += 1
                assert count is None or fault == "short" or mapping is None, (number, error)
                check_failure(mapping, error, FAULTS[fault].get("errno"), seen)
            fails_nothing = error is None and count is None
            del mapping
        if fails_nothing:
            break
    assert number >= SIZE >> 14 or kind == "zstd"
    assert errors >= number


def check_failure(
    mapping: quire.Mapping | None, error: quire.Error | None, number: object, seen: np.ndarray
) -> None:
    """It names errno and offset; what was copied is right, filler, or was not copied."""
    error = error or (None if mapping is None else mapping.failed)
    assert isinstance(error, quire.PageIOError | quire.SourceError), error
    assert error.errno == number
    assert isinstance(error.offset, int) or mapping is None
    wrong = (seen != MODEL) & (seen != 0) & (seen != FILLER)
    assert not wrong.any()
    if mapping is not None:
        with pytest.raises(quire.PageIOError):
            mapping.check()


# Limits.


def check_same(before: Census, after: Census) -> None:
    """Nothing is there that was not."""
    assert after.threads == before.threads
    assert after.descriptors == before.descriptors
    assert after.children == before.children


def source_of(kind: str, folder: Path) -> Path | BytesStore:
    if kind == "python":
        return BytesStore(CONTENT)
    if not (folder / "content").exists():
        (folder / "content").write_bytes(CONTENT)
        quire.pack(folder / "content", folder / "content.zst", frame="16 KiB")
    return folder / ("content.zst" if kind == "zstd" else "content")


def use(kind: str, pmap: str, folder: Path) -> None:
    """Opens, reads all, closes."""
    with quire.open(source_of(kind, folder), dtype="u1", pmap=pmap, budget="2 MiB") as mapping:
        assert equals(mapping.array, MODEL)


def child_has_little_room(what: str, kind: str, pmap: str, folder: str) -> None:
    """Allows a little more each time, until opening and reading succeed."""
    limit, steps = LIMITS[what]
    place = Path(folder)
    for _ in range(2):
        use(kind, pmap, place)
    before = take_census()
    said, done = set(), False
    _, hard = resource.getrlimit(limit)
    for more in steps:
        used = before.address_space_bytes if what == "address space" else highest_descriptor() + 1
        try:
            resource.setrlimit(limit, (used + more, hard))
            use(kind, pmap, place)
            done = True
        except quire.Error as error:
            said.add(f"{type(error).__name__}: {error}")
        except MemoryError:
            said.add("MemoryError")  # the interpreter's own
        resource.setrlimit(limit, (hard, hard))
        gc.collect()
        check_same(before, take_census())
        if done:
            break
    assert done
    assert said, "no step was too small"
    use(kind, pmap, place)
    print("\n".join(sorted(said)))


def highest_descriptor() -> int:
    return max(int(path.name) for path in Path("/proc/self/fd").iterdir()) - 1


LIMITS = {
    "address space": (resource.RLIMIT_AS, range(0, 96 * MIB, MIB // 2)),
    "descriptors": (resource.RLIMIT_NOFILE, range(64)),
}


@pytest.mark.parametrize("kind", ["file", "zstd", "python"])
@pytest.mark.parametrize("what", LIMITS)
def test_limits_are_errors_and_nothing_leaks(
    what: str, kind: str, pmap: str, tmp_path: Path
) -> None:
    ended = children.run(child_has_little_room, what, kind, pmap, tmp_path, env=ONE_THREAD)
    assert ended.status == 0, ended.errors[-3000:]
    reasons = {"address space": r"ENOMEM|EAGAIN", "descriptors": r"EMFILE"}[what]
    assert re.search(reasons, ended.output), ended.output


def child_cannot_restart_its_pager(pmap: str, folder: str) -> None:
    """The pager dies when there are no descriptors left to start another."""
    store = DyingStore(CONTENT, range(32 * PAGE, 33 * PAGE), Path(folder) / "died")
    mapping = quire.open(store, dtype="u1", pmap=pmap, granule=PAGE, budget="2 MiB")
    array = mapping.array
    assert array[0] == MODEL[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest_descriptor() + 1, hard))
    taken = take_all_descriptors()
    with pytest.raises(quire.PagerDiedError) as caught:
        TOUCHES["item"](array[: 32 * PAGE + 1])
    for descriptor in taken:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.EMFILE, caught.value
    assert isinstance(mapping.failed, quire.PagerDiedError)
    del array, caught  # the traceback refers to the array
    mapping.close()
    assert child_processes() == []
    with quire.open(store, dtype="u1", pmap=pmap, granule=PAGE, budget="2 MiB") as mapping:
        assert equals(mapping.array, MODEL)


def take_all_descriptors() -> list[int]:
    taken = []
    while True:
        try:
            taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            return taken


def test_a_pager_that_cannot_be_started_again(pmap: str, tmp_path: Path) -> None:
    children.run(child_cannot_restart_its_pager, pmap, tmp_path).check()


def child_may_start_no_thread(pmap: str, folder: str) -> None:
    """RLIMIT_NPROC binds ordinary users only (setrlimit(2)): root just succeeds."""
    place = Path(folder)
    for kind in ("file", "zstd", "python"):
        source_of(kind, place)
        soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
        before = take_census()
        resource.setrlimit(resource.RLIMIT_NPROC, (1, hard))
        if os.geteuid() == 0:
            use(kind, pmap, place)
        else:
            with pytest.raises(quire.Error) as caught:
                use(kind, pmap, place)
            assert caught.value.errno == errno.EAGAIN, caught.value
            del caught  # its traceback keeps the store
        check_same(before, take_census())
        resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
        use(kind, pmap, place)


def test_no_more_threads(pmap: str, tmp_path: Path) -> None:
    children.run(child_may_start_no_thread, pmap, tmp_path, env=ONE_THREAD).check()


def child_has_few_map_entries(pmap: str, folder: str) -> None:
    """Uses up vm.max_map_count with single pages of alternating protection."""
    source_of("file", Path(folder))
    count = int(Path("/proc/sys/vm/max_map_count").read_text())
    libc = ctypes.CDLL(None, use_errno=True)
    pages = mmap.mmap(-1, (count + 1000) * PAGE, flags=mmap.MAP_PRIVATE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    odd = 1
    while libc.mprotect(ctypes.c_void_p(start + odd * PAGE), PAGE, mmap.PROT_READ) == 0:
        odd += 2
    assert ctypes.get_errno() == errno.ENOMEM
    before = take_census()
    failures: list[int | None] = []
    for _ in range(100):
        try:
            use("file", pmap, Path(folder))
            break
        except quire.Error as error:
            failures.append(error.errno)
        odd = give_back(libc, start, odd, 1)
    else:
        raise AssertionError("never enough")
    assert failures
    assert set(failures) <= {errno.ENOMEM, errno.EAGAIN}
    check_same(before, take_census())
    give_back(libc, start, odd, 50)
    use("file", pmap, Path(folder))


def give_back(libc: ctypes.CDLL, start: int, odd: int, pairs: int) -> int:
    """Makes pages like their neighbours again: each gives two map entries back."""
    for _ in range(pairs):
        odd -= 2
        access = mmap.PROT_READ | mmap.PROT_WRITE
        assert libc.mprotect(ctypes.c_void_p(start + odd * PAGE), PAGE, access) == 0
    return odd


def test_hardly_any_map_entries_left(pmap: str, tmp_path: Path) -> None:
    ended = children.run(child_has_few_map_entries, pmap, tmp_path, env=ONE_THREAD)
    assert ended.status == 0, ended.errors[-3000:]


# Programs started while threads fault.


def child_starts_programs(pmap: str, folder: str) -> None:
    path = Path(folder) / "content"
    path.write_bytes(CONTENT)
    mapping = quire.open(path, dtype="u1", pmap=pmap, granule=PAGE, budget=16 * PAGE)
    array, stop, wrong = mapping.array, threading.Event(), []

    def fault() -> None:
        while not stop.is_set():
            wrong.extend([1] * (not np.array_equal(array, MODEL)))

    threads = [threading.Thread(target=fault) for _ in range(3)]
    for thread in threads:
        thread.start()
    words = ["/bin/sh", "-c", "exit 7"]
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            os.execv(words[0], words)
        spawned = os.posix_spawn(words[0], words, os.environ)
        for child in (pid, spawned):
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert mapping.failed is None


def test_fork_and_exec_while_threads_fault(pmap: str, tmp_path: Path) -> None:
    children.run(child_starts_programs, pmap, tmp_path, flags=("-W", "ignore")).check()


# The end of the interpreter.


def late(pmap: str) -> quire.Mapping:
    memory = _core.open_memory(CONTENT, "late memory")
    store = _core.open_faulty(memory, offset=LATE_OFFSET, length=1, code="ok", delay_s=LATE_S)
    return quire.open(store, dtype="u1", pmap=pmap, granule=PAGE)


class ReadsWhenItDies:
    """Reads a mapping in its finaliser."""

    def __init__(self, pmap: str) -> None:
        self._mapping = quire.open(_core.open_memory(CONTENT, "content"), dtype="u1", pmap=pmap)

    def __del__(self) -> None:
        os.write(1, b"right\n" if bytes(self._mapping.array) == CONTENT else b"wrong\n")


def child_ends(how: str, pmap: str) -> None:
    """Ends with live mappings while daemon threads touch and stall."""
    import atexit
    import builtins

    mapping = late(pmap)
    array = mapping.array
    small = quire.open(
        _core.open_memory(CONTENT, "content"), dtype="u1", pmap=pmap, granule=PAGE, budget=16 * PAGE
    )
    pager = quire.open(BytesStore(CONTENT), dtype="u1", pmap=pmap)
    assert pager.array[0] == MODEL[0]
    views = [small.array]

    def touch_for_ever() -> None:
        while True:
            assert np.array_equal(views[0], MODEL)

    def stall_for_ever() -> None:
        array[LATE_OFFSET : LATE_OFFSET + PAGE].copy()

    bodies = [touch_for_ever, touch_for_ever, stall_for_ever]
    for body in bodies:
        threading.Thread(target=body, daemon=True).start()
    vars(builtins)["kept"] = ReadsWhenItDies(pmap)  # lives as long as the interpreter
    atexit.register(lambda: print(bytes(small.array[:5]) == CONTENT[:5], flush=True))
    threading.Event().wait(SETTLE_S)
    print(*child_processes(), flush=True)
    if how == "raise":
        raise KeyError(how)
    if how == "signal":
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(LATE_S)
    {"exit": sys.exit, "_exit": os._exit}[how](7)


@pytest.mark.parametrize(
    ("how", "status"), [("exit", 7), ("_exit", 7), ("raise", 1), ("signal", -signal.SIGTERM)]
)
def test_the_interpreter_ends_while_threads_touch_and_stall(
    how: str, status: int, pmap: str
) -> None:
    ended = children.run(child_ends, how, pmap, timeout_s=2 * EXIT_LIMIT_S)
    assert ended.status == status, ended
    assert "Fatal" not in ended.errors
    assert bool(ended.errors) == (how == "raise"), ended.errors
    pagers, *said = ended.output.splitlines()
    assert said == (["True", "right"] if how in {"exit", "raise"} else [])
    for pager in pagers.split():
        wait_until(lambda: not is_alive(pager), "the end of the pager process")  # noqa: B023


def is_alive(pid: str) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def child_stalls_for_good(pmap: str) -> None:
    """The main thread stalls with the interpreter lock: no code of Python can run."""
    array = late(pmap).array
    print("stalling", flush=True)
    TOUCHES["item"](array[: LATE_OFFSET + 1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGQUIT])
def test_a_stalled_process_can_be_ended(number: signal.Signals, pmap: str) -> None:
    with children.start(child_stalls_for_good, pmap) as child:
        child.wait_line("stalling")
        child.wait_idle()
        child.process.send_signal(number)
        assert child.finish(EXIT_LIMIT_S).status == -number


def opened_files() -> list[str]:
    """What the descriptors of this process stand for."""
    found = []
    for number in Path("/proc/self/fd").iterdir():
        try:
            found.append(str(number.readlink()))
        except FileNotFoundError:  # that of the listing itself
            continue
    return found


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_a_closed_mapping_holds_no_file_open(pmap: str, tmp_path: Path, mode: str) -> None:
    """So that its file system can be unmounted while the object lives."""
    path = tmp_path / "content"
    path.write_bytes(CONTENT)
    mapping = quire.open(path, dtype="u1", pmap=pmap, granule=PAGE, mode=mode)
    assert mapping.read(0, PAGE) == CONTENT[:PAGE]
    assert opened_files().count(str(path)) == 1
    if mode != "r":
        mapping.write(b"\1", 0)
    mapping.close()
    assert not [name for name in opened_files() if name.startswith(str(tmp_path))]
    assert mapping.closed
    written = b"\1" if mode == "r+" else CONTENT[:1]
    assert path.read_bytes() == written + CONTENT[1:]
    mapping.close()


if __name__ == "__main__":
    children.main()
