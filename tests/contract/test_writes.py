"""Writable mappings: stores that can be written, and what only files can show."""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import quire
from quire import _core
from quire.testing import WriteContract, children
from quire.testing.content import new_seed, random_content
from quire.testing.pmaps import takes_system_calls, writable_pmaps
from quire.testing.waiting import wait_until
from quire.testing.write_model import WriteModel, same_bytes


class TestFile(WriteContract):
    def open_writable(self, content: bytes, folder: Path) -> _core.Store:
        (folder / "content.bin").write_bytes(content)
        return _core.open_file(folder / "content.bin", True)


class TestMemory(WriteContract):
    def open_writable(self, content: bytes, folder: Path) -> _core.Store:
        return _core.open_memory(content, "memory of a test")


class TestConcat(WriteContract):
    """Two files, joined where no page ends."""

    def open_writable(self, content: bytes, folder: Path) -> _core.Store:
        middle = len(content) // 2 + 5
        (folder / "first.bin").write_bytes(b"header" + content[:middle])
        (folder / "second.bin").write_bytes(content[middle:])
        parts = [
            (_core.open_file(folder / "first.bin", True), 6, middle),
            (_core.open_file(folder / "second.bin", True), 0, len(content) - middle),
        ]
        return _core.open_concat(parts, "two files", None)


LAYOUTS = {
    "raw": {"dtype": "u1", "shape": (900_001,)},
    "offset": {"dtype": "<i4", "shape": (300, 701), "offset": 5003},
    "fortran": {"dtype": ">u2", "shape": (700, 601), "order": "F"},
    "structured": {
        "dtype": [("id", "<u4"), ("tag", "S3"), ("xy", "<f8", (2,))],
        "shape": (36_000,),
    },
    "npy": {"dtype": "<i8", "shape": (331, 331)},
    "npy-fortran": {"dtype": "<i2", "shape": (700, 601), "order": "F"},
}


@pytest.fixture(params=writable_pmaps())
def tracked_pmap(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("granule", [_core.page_bytes(), 64 << 10])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_equal_the_model(
    name: str, granule: int, tracked_pmap: str, tmp_path: Path
) -> None:
    """Array and file, headers and bytes before the array included, are as numpy has them."""
    layout = dict(LAYOUTS[name])
    rng = np.random.default_rng(new_seed())
    order, offset = str(layout.get("order", "C")), int(layout.get("offset", 0))
    dtype, shape = np.dtype(layout["dtype"]), layout["shape"]
    content = rng.bytes(int(np.prod(shape)) * dtype.itemsize)
    model = np.frombuffer(content, dtype).reshape(shape, order=order).copy(order=order)
    path = tmp_path / ("array.npy" if "npy" in name else "array.bin")
    if "npy" in name:
        np.save(path, model)
        header, options = path.read_bytes()[: -model.nbytes], {}
    else:
        header, options = rng.bytes(offset), layout
        path.write_bytes(header + content)
    least = 4 * granule
    with quire.open(
        path, mode="r+", pmap=tracked_pmap, granule=granule, budget=max(least, 128 << 10), **options
    ) as mapping:
        budgets = [least, 2 * least, 4 << 20]
        WriteModel(mapping, model, path.read_bytes, budgets, rng, header).run(40)
    assert path.read_bytes() == header + model.tobytes("A")
    if "npy" in name:
        assert same_bytes(np.load(path), model)


def new_file(folder: Path, size: int = 1 << 20) -> Path:
    path = folder / "array.bin"
    path.write_bytes(bytes(size))
    return path


def add_in_threads(
    path: Path, pmap: str, granule: int, rounds: int, syncs: Callable[[quire.Mapping], None]
) -> None:
    """Four threads increment disjoint elements of the same pages, which are evicted meanwhile."""
    threads = 4
    budget = max(64 << 10, 4 * granule)
    with quire.open(
        path, mode="r+", dtype="u4", pmap=pmap, granule=granule, budget=budget
    ) as mapping:
        array = mapping.array
        raised: list[BaseException] = []

        def add(part: np.ndarray) -> None:
            try:
                for _ in range(rounds):
                    np.add(part, 1, out=part)
            except BaseException as error:
                raised.append(error)

        adders = [
            threading.Thread(target=add, args=(array[number::threads],))
            for number in range(threads)
        ]
        for adder in adders:
            adder.start()
        while any(adder.is_alive() for adder in adders):
            syncs(mapping)
            adders[0].join(0.05)
        for adder in adders:
            adder.join()
        assert not raised
        assert (array == rounds).all()
        assert mapping.statistics().evictions > rounds
    assert (np.fromfile(path, "u4") == rounds).all()


@pytest.mark.parametrize("granule", [_core.page_bytes(), 64 << 10])
def test_no_increment_is_lost(granule: int, tracked_pmap: str, tmp_path: Path) -> None:
    add_in_threads(new_file(tmp_path), tracked_pmap, granule, 8, lambda mapping: mapping.sync())


@pytest.mark.long
@pytest.mark.parametrize("granule", [_core.page_bytes(), 64 << 10])
def test_no_increment_is_lost_of_many(granule: int, tracked_pmap: str, tmp_path: Path) -> None:
    """Ten to the eighth, so that a window of a few instructions is met."""
    path = new_file(tmp_path)
    rounds = 100_000_000 // (path.stat().st_size // 4) + 1
    add_in_threads(path, tracked_pmap, granule, rounds, lambda mapping: mapping.sync())


def test_system_calls_into_pages(tracked_pmap: str, tmp_path: Path) -> None:
    """Into pages that are not there they work, or are refused with EFAULT; nothing is corrupted."""
    path, size, half = new_file(tmp_path), 1 << 20, 1 << 19
    data = random_content(size, new_seed())
    (tmp_path / "data").write_bytes(data)
    with (
        quire.open(
            path, mode="r+", dtype="u1", pmap=tracked_pmap, budget="128 KiB", granule=4096
        ) as mapping,
        open(tmp_path / "data", "rb", buffering=0) as file,
    ):
        array = mapping.array
        if takes_system_calls(tracked_pmap):
            assert file.readinto(memoryview(array)[:half]) == half
            one, other = socket.socketpair()
            with one, other:
                one.sendall(data[half : half + 8192])
                view = memoryview(array)[half : half + 8192]
                assert other.recv_into(view, 8192, socket.MSG_WAITALL) == 8192
            expected = data[: half + 8192] + bytes(half - 8192)
        else:
            with pytest.raises(OSError) as caught:
                file.readinto(memoryview(array)[:half])
            assert caught.value.errno == errno.EFAULT
            one, other = socket.socketpair()
            with one, other:
                one.sendall(b"sent")
                with pytest.raises(OSError) as caught:
                    other.recv_into(memoryview(array)[half : half + 4])
                assert caught.value.errno == errno.EFAULT
            expected = bytes(size)
        assert array.tobytes() == expected
        mapping.sync()
        assert path.read_bytes() == expected


def test_system_calls_into_clean_pages(tracked_pmap: str, tmp_path: Path) -> None:
    """Pages that are there and clean: with wp-async the kernel itself notices the write."""
    path = new_file(tmp_path, 64 << 10)
    data = random_content(8192, new_seed())
    (tmp_path / "data").write_bytes(data)
    with (
        quire.open(path, mode="r+", dtype="u1", pmap=tracked_pmap, granule=4096) as mapping,
        open(tmp_path / "data", "rb", buffering=0) as file,
    ):
        array = mapping.array
        array[:16384] = 7
        view = memoryview(array)[4096:12288]
        for clean in (False, True):
            if clean:
                mapping.sync()
            file.seek(0)
            works = (
                not clean
                or mapping.dirty_tracking == "wp-async"
                or takes_system_calls(tracked_pmap)
            )
            if works:
                assert file.readinto(view) == 8192
                assert bytes(view) == data
            else:
                with pytest.raises(OSError) as caught:
                    file.readinto(view)
                assert caught.value.errno == errno.EFAULT
        mapping.sync()
        expected = b"\x07" * 4096 + data + b"\x07" * 4096 + bytes(48 << 10)
        assert array.tobytes() == path.read_bytes() == expected


def test_a_forked_child_is_refused(tracked_pmap: str, tmp_path: Path) -> None:
    """It would not see what its parent writes: its touch says so, and it writes nothing."""
    path = new_file(tmp_path)
    with quire.open(
        path, mode="r+", dtype="u4", pmap=tracked_pmap, budget="128 KiB", granule=4096
    ) as mapping:
        array = mapping.array
        array[:] = np.arange(len(array))
        array[5] = 77

        def touch() -> None:
            uses = (lambda: array[5], lambda: array[5000:9000].fill(9), array[-9000:].sum)
            for use in uses * 3:  # not the first touch of a page only
                with pytest.raises(quire.Error, match=r"not inherited.*open it again in the child"):
                    checked(use)
            with ThreadPoolExecutor(1) as thread:
                told = thread.submit(lambda: checked(uses[0])).exception(20)
            assert "not inherited" in str(told)
            for refused in (mapping.check, mapping.sync, mapping.flush):
                with pytest.raises(quire.Error, match=r"not inherited|belongs to the parent"):
                    refused()
            again = quire.open(path, mode="r+", dtype="u4", pmap=tracked_pmap)
            again.array[6] = 88
            again.close()

        written = mapping.statistics().written_bytes
        assert children.in_fork(touch) == ""
        assert mapping.failed is None
        assert mapping.statistics().written_bytes == written
        assert array[5] == 77
        array[6] = 66
        assert (array[7:] == np.arange(7, len(array))).all()
    expected = np.arange(len(np.fromfile(path, "u4")), dtype="u4")
    expected[5:7] = 77, 66
    assert np.array_equal(np.fromfile(path, "u4"), expected)


def checked(use: Callable[[], object]) -> object:
    """Uses; the loop lets a pending error arrive."""
    value = use()
    for _ in range(10):
        pass
    return value


def child_exits_after_fork(path: str, pmap: str) -> None:
    """Its child ends as interpreters end, with the inherited mapping, and must write nothing."""
    mapping = quire.open(path, mode="r+", dtype="u1", pmap=pmap, granule=4096)
    mapping.array[0] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        sys.exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert Path(path).read_bytes()[:1] == b"\0"
    assert mapping.statistics().written_bytes == 0
    print("unwritten")


def test_the_exit_of_a_forked_child_writes_nothing(tracked_pmap: str, tmp_path: Path) -> None:
    path = new_file(tmp_path)
    ended = children.run(child_exits_after_fork, path, tracked_pmap)
    assert ended.check() == "unwritten\n"
    assert path.read_bytes()[:1] == b"\1"


if __name__ == "__main__":
    children.main()


def test_a_replaced_file_is_told(tracked_pmap: str, tmp_path: Path) -> None:
    """What was written went where no name leads: the sync says so, and names both files."""
    path = new_file(tmp_path)
    mapping = quire.open(path, mode="r+", dtype="u1", pmap=tracked_pmap)
    mapping.array[3] = 7
    mapping.sync()
    opened = path.stat().st_ino
    (tmp_path / "other").write_bytes(bytes(mapping.size_bytes))
    (tmp_path / "other").replace(path)
    mapping.array[4] = 8
    for save in (mapping.sync, mapping.close):
        with pytest.raises(quire.SyncError, match=r"was replaced.*discard=True") as caught:
            save()
        assert str(opened) in str(caught.value)
        assert str(path.stat().st_ino) in str(caught.value)
    assert mapping.array[:5].tolist() == [0, 0, 0, 7, 8]
    assert not path.read_bytes().strip(b"\0")
    path.unlink()  # who unlinks a file that is in use means it
    mapping.close()


def test_what_is_dirty_can_be_given_up(tracked_pmap: str, tmp_path: Path) -> None:
    """A truncated file refuses its pages for ever, and with them the closing."""
    path = new_file(tmp_path)
    mapping = quire.open(path, mode="r+", dtype="u1", pmap=tracked_pmap)
    mapping.array[:10] = 7
    os.truncate(path, 100_000)

    def is_refused() -> bool:
        mapping.array[:10] = 9
        try:
            mapping.sync()
        except quire.SyncError as error:
            assert "call sync() again" in str(error)  # noqa: PT017
            return True
        return False

    wait_until(is_refused, "the file is looked at once a millisecond")
    with pytest.raises(quire.SyncError, match=r"truncated.*close\(discard=True\)"):
        mapping.close()
    view = mapping.array
    with pytest.raises(BufferError, match="1 view"):
        mapping.close(discard=True)
    del view
    mapping.close(discard=True)
    assert mapping.closed
    assert path.stat().st_size == 100_000
    mapping.close(discard=True)


def test_discarding_writes_nothing(tracked_pmap: str, tmp_path: Path) -> None:
    path = new_file(tmp_path)
    before = path.read_bytes()
    mapping = quire.open(path, mode="r+", dtype="u1", pmap=tracked_pmap)
    mapping.array[:] = 9
    mapping.close(discard=True)
    assert path.read_bytes() == before
    with pytest.raises(quire.ClosedError):
        _ = mapping.array


def test_pins_are_told_from_views(tracked_pmap: str, tmp_path: Path) -> None:
    mapping = quire.open(new_file(tmp_path), mode="r+", dtype="u1", pmap=tracked_pmap)
    pin = mapping.pin(np.s_[:10])
    with pytest.raises(BufferError, match=r"1 pin\(s\) are held; release"):
        mapping.close()
    part = pin.array
    pin.release()
    with pytest.raises(BufferError, match=r"1 view\(s\)"):
        mapping.close()
    del part
    mapping.close()
