"""No SIGBUS: what cannot be had of a kernel mapping is an exception, and heals with its cause."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import mmap
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import quire
from quire.testing import children
from quire.testing.touches import touch

PAGE = mmap.PAGESIZE
PAGES = 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "cut.bin"
    found.write_bytes(b"\7" * (PAGES * PAGE))
    return found


@pytest.mark.parametrize("sharing", ["shared", "private"])
@pytest.mark.parametrize("protection", ["r", "rw"])
def test_a_truncated_file(path: Path, sharing: str, protection: str) -> None:
    with quire.map(path, sharing=sharing, protection=protection, offset=11) as mapping:
        array = mapping.array
        os.truncate(path, 5 * PAGE + 1)
        for _ in range(3):
            with pytest.raises(quire.TruncatedError, match="ends after") as caught:
                touch(array, 9 * PAGE)
            assert caught.value.offset == 9 * PAGE + 11
            assert caught.value.source == str(path)
            assert caught.value.page == 9
        assert touch(array, 5 * PAGE - 11) == 7
        assert touch(array, 6 * PAGE - 12) == 0  # the page of the end is whole
        assert isinstance(mapping.failed, quire.TruncatedError)
        with pytest.raises(quire.TruncatedError):
            mapping.check()
        os.truncate(path, PAGES * PAGE)
        assert mapping.failed is None
        assert touch(array, 9 * PAGE) == 0
        assert mapping.statistics().errors >= 3
        os.pwrite(os.open(path, os.O_WRONLY), b"\5", 9 * PAGE + 11)
        assert touch(array, 9 * PAGE) == 5


def test_stores_beyond_the_end(path: Path) -> None:
    with quire.map(path, sharing="shared", protection="rw") as mapping:
        array = mapping.array
        os.truncate(path, PAGE)
        with pytest.raises(quire.TruncatedError):
            touch(array, 2 * PAGE, 9)
        os.truncate(path, PAGES * PAGE)
        assert touch(array, 2 * PAGE) == 0  # it went to filler, and is nowhere


def test_read_and_write_raise_at_once(path: Path) -> None:
    with quire.map(path, sharing="shared", protection="rw") as mapping:
        os.truncate(path, PAGE)
        for call in (lambda: mapping.read(), lambda: mapping.write(b"x", 3 * PAGE)):
            with pytest.raises(quire.TruncatedError, match="ends after"):
                call()
        with pytest.raises(quire.Error):
            mapping.prefetch().result()
        assert mapping.read(0, PAGE) == b"\7" * PAGE
        mapping.sync()


def test_beyond_the_end_from_the_start(path: Path) -> None:
    with quire.map(path, (PAGES + 4) * PAGE, sharing="shared") as mapping:
        with pytest.raises(quire.TruncatedError):
            touch(mapping.array, PAGES * PAGE)
        os.truncate(path, (PAGES + 4) * PAGE)
        assert touch(mapping.array, PAGES * PAGE) == 0


def test_every_thread_is_told(path: Path) -> None:
    with quire.map(path, sharing="shared") as mapping:
        array = mapping.array
        os.truncate(path, 2 * PAGE)
        start = threading.Barrier(8)

        def look(number: int) -> str:
            start.wait()
            try:
                for index in range(number * PAGE, PAGES * PAGE, PAGE):
                    touch(array, index)
            except quire.TruncatedError as error:
                return "told" if (error.offset or 0) >= 2 * PAGE else "told of another page"
            return "not told"

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(look, range(8))) == {"told"}


def test_c_code_without_the_interpreter_lock(path: Path) -> None:
    """`sum` and `copyto` of numpy run in a thread, and free the lock where they may."""
    with quire.map(path, sharing="shared") as mapping:
        array = mapping.array
        os.truncate(path, PAGE)
        told = []

        def work() -> None:
            into = np.empty(len(array), "u1")
            try:
                np.copyto(into, array)
                for _ in range(10):
                    pass
            except quire.TruncatedError as error:
                told.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert len(told) == 1


def test_a_file_that_shrinks_and_grows_under_readers(path: Path) -> None:
    """Whatever is read is data, zeros of a file that grew again, or filler with an exception."""
    stop = threading.Event()
    with quire.map(path, sharing="shared") as mapping:
        array = mapping.array

        def read(seed: int) -> int:
            rng, told = np.random.default_rng(seed), 0
            while not stop.is_set():
                index = int(rng.integers(0, PAGES)) * PAGE
                try:
                    assert touch(array, index) in (0, 7, 255)
                except quire.TruncatedError:
                    told += 1
            return told

        with ThreadPoolExecutor(3) as pool:
            readers = [pool.submit(read, seed) for seed in range(3)]
            for _ in range(300):
                os.truncate(path, PAGE)
                os.truncate(path, PAGES * PAGE)
            os.truncate(path, PAGE)
            with pytest.raises(quire.TruncatedError):
                touch(array, 30 * PAGE)
            stop.set()
            assert all(reader.result() >= 0 for reader in readers)
        os.truncate(path, PAGES * PAGE)
        assert int(array[2 * PAGE :].sum()) == 0


def test_system_calls_say_efault(path: Path, tmp_path: Path) -> None:
    with quire.map(path, sharing="shared") as mapping:
        os.truncate(path, PAGE)
        with (
            open(tmp_path / "copy", "wb", buffering=0) as out,
            pytest.raises(OSError, match="Bad address") as caught,
        ):
            out.write(memoryview(mapping)[2 * PAGE : 3 * PAGE])
        assert caught.value.errno == errno.EFAULT


def test_a_replaced_file_is_still_the_one_that_was_mapped(path: Path) -> None:
    with quire.map(path, sharing="shared") as mapping:
        other = path.with_suffix(".new")
        other.write_bytes(b"")
        other.rename(path)
        assert int(mapping.array.sum()) == 7 * PAGES * PAGE


def test_a_forked_child_is_told_too(path: Path) -> None:
    mapping = quire.map(path, sharing="shared")
    array = mapping.array
    os.truncate(path, PAGE)

    def look() -> None:
        with pytest.raises(quire.TruncatedError):
            touch(array, 2 * PAGE)
        told = []
        thread = threading.Thread(target=lambda: told.append(catch(array)))
        thread.start()
        thread.join()
        assert told == [quire.TruncatedError]

    assert children.in_fork(look) == ""


def catch(array: np.ndarray) -> type | None:
    try:
        touch(array, 3 * PAGE)
    except quire.Error as error:
        return type(error)
    return None


def child_meets_its_own_sigbus(path: str, how: str) -> None:
    """A mapping of the standard library's is not quire's: its SIGBUS goes where it went before."""
    called: list[int] = []
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: os._exit(40 + len(called)))
    if how == "handler":
        ctypes.CDLL(None).signal(signal.SIGBUS, handler)
    if how == "faulthandler":
        faulthandler.enable()
    mapping = quire.map(path, sharing="shared")
    with open(path, "r+b") as file:
        other = mmap.mmap(file.fileno(), 0)
    os.truncate(path, PAGE)
    try:
        touch(mapping.array, 2 * PAGE)
    except quire.TruncatedError:
        print("told", flush=True)
    print(other[2 * PAGE])
    sys.exit(1)


@pytest.mark.parametrize("how", ["default", "handler", "faulthandler"])
def test_foreign_sigbus_goes_where_it_went_before(path: Path, how: str) -> None:
    ended = children.run(child_meets_its_own_sigbus, path, how)
    assert ended.output == "told\n"
    assert ended.status == (40 if how == "handler" else -signal.SIGBUS)
    if how == "faulthandler":
        assert "Fatal Python error: Bus error" in ended.errors
        assert "child_meets_its_own_sigbus" in ended.errors


def child_meets_a_handler_that_passes_nothing_on(path: str, way: str) -> None:
    """Installed between a mapping and the first touch of it."""
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: os._exit(40))
    mapping = quire.map(path, sharing="shared")
    ctypes.CDLL(None).signal(signal.SIGBUS, handler)
    os.truncate(path, PAGE)
    ways = {
        "array": lambda: touch(mapping.array, 2 * PAGE),
        "memoryview": lambda: memoryview(mapping)[2 * PAGE],
        "address": lambda: ctypes.string_at(mapping.address + 2 * PAGE, 1),
        "read": lambda: mapping.read(2 * PAGE, 1),
    }
    try:
        ways[way]()
        mapping.check()
    except quire.TruncatedError:
        print("told", flush=True)


@pytest.mark.parametrize("way", ["array", "memoryview", "address", "read"])
def test_the_handlers_are_on_top_when_a_mapping_is_first_touched(path: Path, way: str) -> None:
    ended = children.run(child_meets_a_handler_that_passes_nothing_on, path, way)
    assert (ended.status, ended.output) == (0, "told\n")


def child_blocks_sigbus(path: str) -> None:
    mapping = quire.map(path, sharing="shared")
    array = mapping.array
    os.truncate(path, PAGE)

    def run(blocks: int) -> None:
        signal.pthread_sigmask(blocks, [signal.SIGBUS])
        print(catch(array), flush=True)

    for blocks in (signal.SIG_UNBLOCK, signal.SIG_BLOCK):
        thread = threading.Thread(target=run, args=(blocks,))
        thread.start()
        thread.join()


def test_a_thread_that_blocks_sigbus_cannot_be_saved(path: Path) -> None:
    ended = children.run(child_blocks_sigbus, path)
    assert ended.output == "<class 'quire.errors.TruncatedError'>\n"
    assert ended.status == -signal.SIGBUS


def child_replaces_the_handler(path: str) -> None:
    mapping = quire.map(path, sharing="shared")
    array = mapping.array
    for handler in (signal.SIG_DFL, lambda number, frame: os._exit(3)):
        signal.signal(signal.SIGBUS, handler)
        with quire.map(path, sharing="shared") as other:
            assert other.array[0] == array[0]
            os.truncate(path, PAGE)
            assert catch(array) is quire.TruncatedError
        os.truncate(path, 4 * PAGE)


def test_the_next_mapping_takes_the_faults_back(path: Path) -> None:
    children.run(child_replaces_the_handler, path).check()


def child_segfaults(path: str) -> None:
    with quire.map(path, sharing="shared") as mapping:
        assert mapping.array[0] == 7
        ctypes.string_at(8, 1)


def test_foreign_sigsegv_ends_the_process_as_before(path: Path) -> None:
    assert children.run(child_segfaults, path).status == -signal.SIGSEGV


def child_jumps_into_data() -> None:
    faulthandler.enable()
    mapping = quire.map(size=PAGE, sharing="private")
    ctypes.CFUNCTYPE(None)(mapping.address)()


def test_a_jump_into_data_is_no_endless_loop() -> None:
    ended = children.run(child_jumps_into_data)
    assert ended.status == -signal.SIGSEGV
    assert "child_jumps_into_data" in ended.errors


def test_check_ends_a_try_in_a_function_that_has_run_often(path: Path) -> None:
    """Where a specialised builtin would let the exception out of it."""

    def caught(mapping: quire.KernelMapping) -> bool:
        try:
            mapping.array[PAGES * PAGE - 1]
            mapping.check()
        except quire.TruncatedError:
            return True
        return False

    whole = quire.map(path, sharing="shared")
    assert not any(caught(whole) for _ in range(100))
    whole.close()
    mappings = [quire.map(path, sharing="shared") for _ in range(100)]
    os.truncate(path, PAGE)
    for mapping in mappings:
        assert caught(mapping)
        mapping.close()


if __name__ == "__main__":
    children.main()
