import errno
import io
import os
import signal
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import quire
from quire import _core, packing


@pytest.fixture
def content() -> bytes:
    """About 1 MB, half of it noise."""
    noise = np.random.default_rng(3).bytes(500_000)
    return noise + b"quire " * 90_000


@pytest.fixture
def file(content, tmp_path):
    path = tmp_path / "content.bin"
    path.write_bytes(content)
    return path


def mapped(path) -> bytes:
    with quire.open(path, dtype="u1") as mapping:
        return mapping.array.tobytes()


def unzstd(path) -> bytes:
    return subprocess.run(["zstd", "-dcq", path], check=True, capture_output=True).stdout


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("frame", [4096, 4097, "1 MiB"])
def test_mapped_and_decompressed_it_is_the_same(content, file, tmp_path, frame, threads, checksum):
    target = tmp_path / "content.zst"
    result = quire.pack(file, target, frame=frame, threads=threads, checksum=checksum)
    assert mapped(target) == content
    assert unzstd(target) == content
    assert result.source_bytes == len(content)
    assert result.packed_bytes == target.stat().st_size
    assert result.frames == -(-len(content) // result.frame_bytes)
    store = _core.open_zstd(_core.open_file(str(target)))
    facts = store.describe()
    assert facts["checksums"] is checksum
    assert facts["frames"] == result.frames
    store.close()


def test_result_does_not_depend_on_threads(file, tmp_path):
    for threads in (1, 4):
        quire.pack(file, tmp_path / f"{threads}.zst", frame="16 KiB", threads=threads)
    assert (tmp_path / "1.zst").read_bytes() == (tmp_path / "4.zst").read_bytes()


def test_levels(file, tmp_path):
    sizes = [quire.pack(file, tmp_path / "x.zst", level=n).packed_bytes for n in (-5, 1, 19)]
    assert sizes[0] >= sizes[1] >= sizes[2]


def test_empty_source(tmp_path):
    (tmp_path / "empty").touch()
    result = quire.pack(tmp_path / "empty", tmp_path / "x.zst")
    assert (result.frames, result.source_bytes) == (0, 0)
    assert unzstd(tmp_path / "x.zst") == b""


class Dribble(io.RawIOBase):
    """Gives few bytes at a time, as a pipe may."""

    def __init__(self, data: bytes, chunk: int) -> None:
        self._data, self._chunk = io.BytesIO(data), chunk

    def read(self, size: int = -1) -> bytes:
        return self._data.read(min(size, self._chunk))


@settings(max_examples=30, deadline=None)
@given(data=st.binary(max_size=3000), chunk=st.integers(1, 999), frame=st.integers(1, 999))
def test_any_bytes_in_any_pieces(tmp_path_factory, data, chunk, frame):
    assume(data[:4] != packing.ZSTD_MAGIC)  # such bytes are unpacked first
    target = tmp_path_factory.getbasetemp() / "any.zst"
    result = quire.pack(Dribble(data, chunk), target, frame=frame, threads=2)
    assert result.frames == -(-len(data) // frame)
    assert unzstd(target) == data


@pytest.mark.parametrize("pieces", [1, 3], ids=["single-frame", "multi-frame"])
def test_plain_zstd_is_packed_again(content, tmp_path, pieces):
    path = tmp_path / "plain.zst"
    third = len(content) // pieces + 1
    parts = [content[start : start + third] for start in range(0, len(content), third)]
    path.write_bytes(b"".join(_core.compress_frame(part, 1)[0] for part in parts))
    quire.pack(path, tmp_path / "new.zst")
    assert mapped(tmp_path / "new.zst") == content


def test_packed_file_is_packed_again(content, file, tmp_path):
    quire.pack(file, tmp_path / "small.zst", frame=5000)
    result = quire.pack(tmp_path / "small.zst", tmp_path / "large.zst", frame="1 MiB")
    assert result.frames == 1 + len(content) // (1 << 20)
    assert mapped(tmp_path / "large.zst") == content


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_zstd_leaves_nothing(content, tmp_path, damage):
    data = bytearray(subprocess.run(["zstd", "-cq"], input=content, capture_output=True).stdout)
    if damage == "truncated":
        del data[-100:]
    else:
        data[len(data) // 2] ^= 255
    (tmp_path / "bad.zst").write_bytes(data)
    with pytest.raises(quire.FormatError, match="damaged or truncated") as caught:
        quire.pack(tmp_path / "bad.zst", tmp_path / "new.zst")
    assert caught.value.source == str(tmp_path / "bad.zst")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.zst"]


def test_compressed_source_without_a_zstd_module(tmp_path, monkeypatch):
    (tmp_path / "x.zst").write_bytes(_core.compress_frame(b"x", 3)[0])
    for name in ("compression", "backports"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(quire.SourceError, match=r"pip install backports\.zstd"):
        quire.pack(tmp_path / "x.zst", tmp_path / "new.zst")


def test_progress_reaches_the_total(content, file, tmp_path):
    seen: list[tuple[int, int | None]] = []
    quire.pack(file, tmp_path / "x.zst", frame="64 KiB", progress=lambda *now: seen.append(now))
    done = [now for now, _ in seen]
    assert done == sorted(done)
    assert seen[-1] == (len(content), len(content))
    quire.pack(io.BytesIO(content), tmp_path / "x.zst", progress=lambda *now: seen.append(now))
    assert seen[-1] == (len(content), None)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_interrupts_leaves_the_old_file_and_no_other(file, tmp_path, error):
    target = tmp_path / "x.zst"
    target.write_bytes(b"old")
    before = threading.active_count()

    def interrupt(done: int, total: int | None) -> None:
        raise error

    with pytest.raises(error):
        quire.pack(file, target, frame=10_000, progress=interrupt)
    assert target.read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"x.zst", "content.bin"}
    assert threading.active_count() == before


def test_ctrl_c_while_standard_input_waits(tmp_path):
    code = (
        "import sys, quire; from pathlib import Path\n"
        "def told(done, total): print('packing', flush=True)\n"
        f"quire.pack(sys.stdin.buffer, {str(tmp_path / 'x.zst')!r}, frame=100, progress=told)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdin.write(bytes(100_000))
        process.stdin.flush()
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert b"KeyboardInterrupt" in process.stderr.read()
    assert list(tmp_path.iterdir()) == []


class Full:
    """A file on a disk that is full."""

    def __init__(self, file) -> None:
        self._file = file

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk(file, tmp_path, monkeypatch):
    def open_full(path, mode):
        opened = open(path, mode)
        return Full(opened) if "x" in mode else opened

    monkeypatch.setattr(packing, "open", open_full, raising=False)
    with pytest.raises(quire.Error, match="No space left") as caught:
        quire.pack(file, tmp_path / "x.zst")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.source == str(tmp_path / "x.zst")
    assert [path.name for path in tmp_path.iterdir()] == ["content.bin"]


class Broken:
    name = "tape"

    def read(self, size: int, /) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_unreadable_sources(file, tmp_path):
    with pytest.raises(quire.SourceError) as caught:
        quire.pack(tmp_path / "absent", tmp_path / "x.zst")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(quire.SourceError) as caught:
        quire.pack(tmp_path, tmp_path / "x.zst")
    assert caught.value.errno == errno.EISDIR
    with pytest.raises(quire.SourceError) as caught:
        quire.pack(Broken(), tmp_path / "x.zst")
    assert (caught.value.errno, caught.value.source) == (errno.EIO, "tape")
    with pytest.raises(TypeError, match="binary file"):
        quire.pack(17, tmp_path / "x.zst")
    assert not (tmp_path / "x.zst").exists()


def test_unfit_destinations(file, tmp_path):
    with pytest.raises(quire.Error) as caught:
        quire.pack(file, tmp_path / "absent" / "x.zst")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(quire.Error, match="no regular file"):
        quire.pack(file, tmp_path)
    with pytest.raises(quire.Error, match="no regular file"):
        quire.pack(file, "/dev/null")
    (tmp_path / "link").symlink_to(file)
    for same in (file, tmp_path / "link"):
        with pytest.raises(ValueError, match="the source itself"):
            quire.pack(file, same)


@pytest.mark.parametrize(
    "options",
    [
        {"frame": 0},
        {"frame": "2 GiB"},
        {"frame": "big"},
        {"level": 23},
        {"level": -(1 << 20)},
        {"threads": 0},
    ],
)
def test_arguments_out_of_range(options, file, tmp_path):
    with pytest.raises(ValueError):
        quire.pack(file, tmp_path / "x.zst", **options)
    assert not (tmp_path / "x.zst").exists()


def test_mode_and_link_of_an_existing_destination_stay(file, tmp_path):
    target, link = tmp_path / "real.zst", tmp_path / "link.zst"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link.symlink_to(target)
    quire.pack(file, link)
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert mapped(target) == file.read_bytes()


def test_new_file_follows_the_umask(file, tmp_path):
    old = os.umask(0o027)
    try:
        quire.pack(file, tmp_path / "x.zst")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x.zst").stat().st_mode) == 0o640


def test_memory_is_bounded_by_frames_under_way(tmp_path, monkeypatch):
    """No more than two frames a thread are between the reader and the file."""
    frame_bytes, threads = 1000, 2
    seen = {"read": 0, "done": 0, "ahead": 0}

    class Counting:
        def read(self, size: int, /) -> bytes:
            seen["ahead"] = max(seen["ahead"], seen["read"] - seen["done"])
            if seen["read"] >= 200 * frame_bytes:
                return b""
            seen["read"] += size
            return b"x" * size

    def told(done: int, total: int | None) -> None:
        seen["done"] = done

    quire.pack(Counting(), tmp_path / "x", frame=frame_bytes, threads=threads, progress=told)
    assert seen["ahead"] <= (packing.FRAMES_AHEAD * threads + 1) * frame_bytes
