"""System calls on arrays whose pages are not resident, with every pmap."""

from __future__ import annotations

import errno
import gc
import hashlib
import io
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
from quire import _core
from quire.testing import children
from quire.testing.content import new_seed, random_content
from quire.testing.pmaps import takes_system_calls, writable_pmaps
from quire.testing.waiting import wait_until

SIZE = 1 << 20
BUDGET = 1 << 20
GRANULE = 16 << 10
PART = np.s_[70_001:270_001]
Array = np.ndarray[Any, Any]


@pytest.fixture
def content() -> bytes:
    return random_content(SIZE, new_seed())


@pytest.fixture
def path(content: bytes, tmp_path: Path) -> Path:
    (tmp_path / "content").write_bytes(content)
    return tmp_path / "content"


@pytest.fixture(params=writable_pmaps())
def tracked_pmap(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def open_bytes(path: Path, pmap: str, **options: Any) -> quire.Mapping:
    """Maps it as bytes, none of them resident."""
    given = {"budget": BUDGET, "granule": GRANULE, "dtype": "u1"} | options
    return quire.open(path, pmap=pmap, **given)


def cool(mapping: quire.Mapping) -> None:
    """Evicts every page: a pin that was left behind would keep its own."""

    def none_left() -> bool:
        mapping.evict()
        return not mapping.resident().any()

    wait_until(none_left, "every page goes")


def write_unbuffered(part: Array, folder: Path) -> bytes:
    with open(folder / "out", "wb", buffering=0) as file:
        assert file.write(part) == part.nbytes
    return (folder / "out").read_bytes()


def write_buffered(part: Array, folder: Path) -> bytes:
    with open(folder / "out", "wb") as file:
        assert file.write(part) == part.nbytes
    return (folder / "out").read_bytes()


def write_by_descriptor(part: Array, folder: Path) -> bytes:
    with open(folder / "out", "wb", buffering=0) as file:
        assert os.write(file.fileno(), part) == part.nbytes
    return (folder / "out").read_bytes()


def write_at(part: Array, folder: Path) -> bytes:
    with open(folder / "out", "wb", buffering=0) as file:
        assert os.pwrite(file.fileno(), part, 0) == part.nbytes
    return (folder / "out").read_bytes()


def write_vector(part: Array, folder: Path) -> bytes:
    with open(folder / "out", "wb", buffering=0) as file:
        half = len(part) // 2
        assert os.writev(file.fileno(), [part[:half], part[half:]]) == part.nbytes
    return (folder / "out").read_bytes()


def send_some(part: Array, folder: Path) -> bytes:
    one, other = socket.socketpair()
    with one, other:
        sent = one.send(part[:1000])
        assert sent == 1000
        return other.recv(sent, socket.MSG_WAITALL) + part[1000:].tobytes()


def send_all(part: Array, folder: Path) -> bytes:
    one, other = socket.socketpair()
    received: list[bytes] = []
    with one, other:
        reader = threading.Thread(
            target=lambda: received.append(other.recv(part.nbytes, socket.MSG_WAITALL))
        )
        reader.start()
        one.sendall(part)
        reader.join(20)
    return received[0]


def to_file(part: Array, folder: Path) -> bytes:
    part.tofile(folder / "out")
    return (folder / "out").read_bytes()


def to_open_file(part: Array, folder: Path) -> bytes:
    """Between other bytes of a file that stays open."""
    with open(folder / "out", "wb") as file:
        file.write(b"before")
        part.tofile(file, sep="")
        file.write(b"after")
    written = (folder / "out").read_bytes()
    assert (written[:6], written[-5:]) == (b"before", b"after")
    return written[6:-5]


def save(part: Array, folder: Path) -> bytes:
    np.save(folder / "out.npy", part)
    return bytes(np.load(folder / "out.npy").tobytes())


def save_compressed(part: Array, folder: Path) -> bytes:
    np.savez(folder / "out.npz", part=part)
    with np.load(folder / "out.npz") as arrays:
        return bytes(arrays["part"].tobytes())


WAYS = [
    write_unbuffered,
    write_buffered,
    write_by_descriptor,
    write_at,
    write_vector,
    send_some,
    send_all,
    to_file,
    to_open_file,
    save,
    save_compressed,
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["r", "c"])
def test_cold_pages_are_written_out(
    way: Callable[[Array, Path], bytes],
    mode: str,
    pmap: str,
    content: bytes,
    path: Path,
    tmp_path: Path,
) -> None:
    with open_bytes(path, pmap, mode=mode) as mapping:
        part = mapping.array[PART]
        assert type(part) is np.ndarray
        assert way(part, tmp_path) == content[PART]
        cool(mapping)
        assert way(part, tmp_path) == content[PART]
        cool(mapping)
        del part
        mapping.close()
    with pytest.raises(quire.ClosedError):
        mapping.array  # noqa: B018


@pytest.mark.parametrize("way", [to_file, to_open_file, save])
def test_any_size_goes_to_a_file(
    way: Callable[[Array, Path], bytes], pmap: str, tmp_path: Path
) -> None:
    """Also what is far larger than the budget, of every layout."""
    model = np.random.default_rng(new_seed()).integers(0, 1 << 60, (1031, 1033))
    model.tofile(tmp_path / "content")
    for order in ("C", "F"):
        layout = {"dtype": "i8", "shape": (1031, 1033), "order": order}
        with open_bytes(tmp_path / "content", pmap, **layout) as mapping:
            array, numbers = mapping.array, model.reshape((1031, 1033), order="C")
            numbers = numbers if order == "C" else np.ravel(model).reshape(array.shape, order="F")
            views: list[Any] = [np.s_[:], np.s_[3:900], np.s_[:, 5], np.s_[::-1, ::7], np.s_[4, 4]]
            if order == "F":  # across, every element is in another page
                views = [np.s_[:, 5], np.s_[:, :20], np.s_[4, 4]] + [np.s_[:]] * (way is save)
            for view in views:
                part = np.asarray(array[view])
                expected = np.asarray(numbers[view]).tobytes()
                if way is save:
                    np.save(tmp_path / "out.npy", part)
                    assert np.load(tmp_path / "out.npy").tobytes() == expected
                else:
                    assert way(part, tmp_path) == expected
            assert mapping.statistics().peak_resident_bytes <= BUDGET
            del array, part


def read_unbuffered(part: Array, data: Path) -> None:
    with open(data, "rb", buffering=0) as file:
        assert file.readinto(part) == part.nbytes


def read_buffered(part: Array, data: Path) -> None:
    with open(data, "rb") as file:
        assert file.readinto(part) == part.nbytes


def read_vector(part: Array, data: Path) -> None:
    with open(data, "rb") as file:
        half = len(part) // 2
        assert os.preadv(file.fileno(), [part[:half], part[half:]], 0) == part.nbytes


def receive(part: Array, data: Path) -> None:
    one, other = socket.socketpair()
    with one, other:
        writer = threading.Thread(target=one.sendall, args=(data.read_bytes(),))
        writer.start()
        assert other.recv_into(part, 0, socket.MSG_WAITALL) == part.nbytes
        writer.join(20)


@pytest.mark.parametrize("way", [read_unbuffered, read_buffered, read_vector, receive])
@pytest.mark.parametrize("state", ["cold", "clean", "dirty"])
def test_what_the_kernel_writes_is_synced(
    way: Callable[[Array, Path], None],
    state: str,
    tracked_pmap: str,
    content: bytes,
    path: Path,
    tmp_path: Path,
) -> None:
    """Under every way to notice writes, by sync and by eviction, and again after a sync."""
    expected = bytearray(content)
    with open_bytes(path, tracked_pmap, mode="r+") as mapping:
        part = mapping.array[PART]
        for round_ in range(3):
            if state == "cold":
                cool(mapping)
            elif state == "dirty":
                part[::5000] = round_
            else:
                assert part.sum() > 0
            (tmp_path / "data").write_bytes(random_content(part.nbytes, new_seed()))
            way(part, tmp_path / "data")
            expected[PART] = (tmp_path / "data").read_bytes()
            if round_ == 1:
                cool(mapping)
            mapping.sync()  # also waits for what the page daemon evicts
            assert path.read_bytes() == expected
        del part
    assert path.read_bytes() == expected


def test_a_sync_does_not_disturb_a_read_that_waits(
    tracked_pmap: str, content: bytes, path: Path
) -> None:
    """Pages that the kernel is going to write to stay open to writes, and are synced afterwards."""
    one, other = socket.socketpair()
    with open_bytes(path, tracked_pmap, mode="r+") as mapping, one, other:
        part = mapping.array[PART]
        got: list[object] = []

        def read(part: Array = part) -> None:
            try:
                got.append(other.recv_into(part, 0, socket.MSG_WAITALL))
            except OSError as error:
                got.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        one.sendall(b"\x01" * 1000)
        wait_until(lambda: bool(mapping.array[70_001] == 1), "the read has begun")
        for _ in range(3):
            mapping.sync()
        one.sendall(b"\x02" * (part.nbytes - 1000))
        reader.join(20)
        assert got == [part.nbytes]
        mapping.sync()
        expected = bytearray(content)
        expected[PART] = b"\x01" * 1000 + b"\x02" * (part.nbytes - 1000)
        assert path.read_bytes() == expected
        cool(mapping)
        del part


def test_a_read_makes_nothing_dirty(tracked_pmap: str, path: Path, tmp_path: Path) -> None:
    with open_bytes(path, tracked_pmap, mode="r+") as mapping:
        write_unbuffered(mapping.array[PART], tmp_path)
        mapping.sync()
        assert mapping.statistics().written_bytes == 0


def test_a_read_only_array_is_not_read_into(pmap: str, path: Path) -> None:
    with open_bytes(path, pmap) as mapping, open(path, "rb") as file:
        with pytest.raises(TypeError, match="read-write"):
            file.readinto(mapping.array)
        assert mapping.statistics().fills == 0


def test_gaps_are_refused_as_by_numpy(pmap: str, path: Path, tmp_path: Path) -> None:
    with open_bytes(path, pmap) as mapping, open(tmp_path / "out", "wb") as file:
        with pytest.raises(ValueError, match="contiguous"):
            file.write(mapping.array[::2])
        assert file.write(mapping.array[:0]) == 0
        assert mapping.statistics().fills == 0


def test_text_is_as_of_numpy(pmap: str, content: bytes, path: Path, tmp_path: Path) -> None:
    model = np.frombuffer(content, "u1")
    with open_bytes(path, pmap) as mapping:
        part = mapping.array[PART]
        part[:100].tofile(tmp_path / "ours", sep=" ", format="%3d")
        model[PART][:100].tofile(tmp_path / "theirs", " ", "%3d")
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
        for arguments, keywords in [((), {}), ((1, 2, 3, 4), {}), (("a",), {"file": "b"})]:
            with pytest.raises(TypeError) as ours:
                part.tofile(*arguments, **keywords)
            with pytest.raises(TypeError) as theirs:
                model.tofile(*arguments, **keywords)
            assert str(ours.value) == str(theirs.value)
        for keywords in ({"sep": None}, {"sep": "", "format": 3}, {"separator": ""}):
            with pytest.raises(TypeError):
                part.tofile(tmp_path / "refused", **keywords)
        reader, writer = os.pipe()
        with open(reader, "rb"), open(writer, "wb") as pipe, open(path, "rb") as not_writable:
            for bad in (tmp_path / "none" / "x", tmp_path, 3.5, pipe, not_writable):
                told = []
                for array in (part, model[PART]):
                    with pytest.raises(Exception, match=r".") as raised:
                        array.tofile(bad)
                    told.append((raised.type, str(raised.value)))
                assert told[0] == told[1]


def test_what_does_not_fit_says_what_to_do(pmap: str, path: Path, tmp_path: Path) -> None:
    """Bad addresses are put into words, and nothing else is: what is not a system call works."""
    with open_bytes(path, pmap, budget=SIZE // 2) as mapping:
        array = mapping.array
        assert hashlib.sha256(array).digest() == hashlib.sha256(path.read_bytes()).digest()
        assert struct.unpack_from("<I", array, 9) == struct.unpack_from("<I", path.read_bytes(), 9)
        assert np.array_equal(np.frombuffer(array, "u1"), array)
        cool(mapping)
        with open(tmp_path / "out", "wb", buffering=0) as file:
            if takes_system_calls(pmap):
                assert file.write(array) == SIZE
            else:
                with pytest.raises(OSError, match=r"Bad address.*quire\.Mapping\.pin") as caught:
                    file.write(array)
                assert caught.value.errno == errno.EFAULT
                assert str(path) in str(caught.value)
                one, other = socket.socketpair()
                with one, other, pytest.raises(OSError, match=r"quire\.Mapping\.pin"):
                    one.sendall(array)
            with pytest.raises(OSError) as closed:
                os.write(1 << 20, array)
            assert closed.value.errno == errno.EBADF
            assert "quire" not in str(closed.value)
        del array


def test_a_page_that_cannot_be_had_is_told(pmap: str, tmp_path: Path) -> None:
    """At once, and by quire's own error."""
    ways = [write_buffered, to_file, save]
    if not takes_system_calls(pmap):  # there these two write what comes before the page
        ways += [write_unbuffered, write_by_descriptor]
    for way in ways:
        inner = _core.open_memory(bytes(SIZE), "bad memory")
        store = _core.open_faulty(inner, offset=170_000, length=1, errno=5)
        options = {"dtype": "u1", "pmap": pmap, "granule": GRANULE, "retries": 0}
        with quire.open(store, **options) as mapping:  # type: ignore[arg-type]
            part = mapping.array[PART]
            if takes_system_calls(pmap):
                with pytest.raises((OSError, quire.PageIOError)):
                    way(part, tmp_path)
            else:
                with pytest.raises(quire.PageIOError) as caught:
                    way(part, tmp_path)
                assert caught.value.errno == 5
                assert caught.value.source == "bad memory"
                assert isinstance(mapping.failed, quire.PageIOError)
            del part


def test_the_mapping_itself_is_written(
    pmap: str, content: bytes, path: Path, tmp_path: Path
) -> None:
    with open_bytes(path, pmap, budget=4 * SIZE) as mapping:
        for _ in range(2):
            with open(tmp_path / "out", "wb", buffering=0) as file:
                assert file.write(mapping) == SIZE
            assert (tmp_path / "out").read_bytes() == content
            cool(mapping)
        assert mapping.exports == 0


def test_threads_share_the_budget(pmap: str, content: bytes, path: Path, tmp_path: Path) -> None:
    """Exports that find no room left are told of it, or wait for none; no byte is wrong."""
    failed: list[BaseException] = []
    with open_bytes(path, pmap) as mapping:
        array = mapping.array

        def write(number: int, array: Array = array) -> None:
            rng = np.random.default_rng(number)
            try:
                for _ in range(60):
                    start = int(rng.integers(0, SIZE - 40_000))
                    part = array[start : start + 40_000]
                    with open(tmp_path / f"out{number}", "wb") as file:
                        if rng.integers(2):
                            part.tofile(file)
                        else:
                            file.write(part)
                    written = (tmp_path / f"out{number}").read_bytes()
                    assert written == content[start : start + 40_000]
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failed
        assert mapping.statistics().peak_resident_bytes <= BUDGET
        cool(mapping)
        del array


def test_close_is_refused_while_a_system_call_is_under_way(pmap: str, path: Path) -> None:
    one, other = socket.socketpair()
    mapping = open_bytes(path, pmap, budget=4 * SIZE)
    sender = threading.Thread(target=lambda: one.sendall(mapping))
    sender.start()
    wait_until(lambda: mapping.exports > 0, "the export")
    with pytest.raises(BufferError, match="alive"):
        mapping.close()
    left = SIZE
    while left:
        left -= len(other.recv(left))
    sender.join(20)
    mapping.close()
    one.close()
    other.close()


def test_the_last_export_ends_the_mapping(pmap: str, path: Path) -> None:
    one, other = socket.socketpair()
    gc.collect()  # what other tests left is not counted
    before = _core.live_mappings()
    with one, other:
        with open_bytes(path, pmap) as mapping:
            sender = threading.Thread(target=one.sendall, args=(mapping.array[:400_000],))
            one.settimeout(20)
            other.settimeout(20)
            sender.start()
            other.recv(1)
        assert not mapping.closed
        left = 400_000 - 1
        while left:
            left -= len(other.recv(left))
        sender.join(20)
        del sender
        wait_until(lambda: mapping.closed, "the mapping goes with its last view")
    assert _core.live_mappings() == before


def test_other_arrays_are_left_alone(pmap: str, path: Path, tmp_path: Path) -> None:
    """Their exports are numpy's own, also while mappings are watched."""
    plain, mapped = np.arange(1000), np.memmap(path, "u1", "r+")
    with open_bytes(path, pmap) as mapping:
        array = mapping.array
        for other in (plain, mapped, plain[::2].copy(), np.zeros(0), np.rec.array([(1, 2)])):
            assert memoryview(other).obj is other
            assert write_unbuffered(other, tmp_path) == other.tobytes()
            assert to_file(other, tmp_path) == other.tobytes()
        out = io.BytesIO()
        np.save(out, plain)
        assert out.getvalue()[-plain.nbytes :] == plain.tobytes()
        with open(path, "rb") as file:
            assert file.readinto(plain) == plain.nbytes
        assert memoryview(array).obj is array
        assert isinstance(array.base, memoryview) or array.base is not None
        del array


def test_a_child_of_a_fork_is_told(path: Path, tracked_pmap: str, tmp_path: Path) -> None:
    """Of a writable mapping; a system call there never writes what is not the parent's."""
    with open_bytes(path, tracked_pmap, mode="r+") as mapping:
        part = mapping.array[PART]
        write_unbuffered(part, tmp_path)

        def child(part: Array = part) -> None:
            for way in (write_unbuffered, to_file):
                with pytest.raises((quire.PageIOError, OSError)):
                    way(part, tmp_path)

        assert children.in_fork(child) == ""
        del part


def test_numpy_is_watched() -> None:
    """Where it cannot be, `quire doctor` says why; with the numpy of the tests it can."""
    assert _core.watch_exports() is None


if __name__ == "__main__":
    children.main()
