"""`quire.map`: the arguments of mmap(2), what they do, and what is refused with which reason."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import pickle
import platform
import re
import socket
import stat
from pathlib import Path

import numpy as np
import pytest

import quire
from quire import _core
from quire.map_flags import MapFlag
from quire.testing import children
from quire.testing.census import is_mapped
from quire.testing.content import new_seed
from quire.testing.touches import touch

PAGE = mmap.PAGESIZE


@pytest.fixture
def content() -> bytes:
    return np.random.default_rng(5).bytes(40 * PAGE + 123)


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    found = tmp_path / "content.bin"
    found.write_bytes(content)
    return found


def test_any_offset_and_any_size(path: Path, content: bytes) -> None:
    rng = np.random.default_rng(new_seed())
    for _ in range(200):
        offset = int(rng.integers(0, len(content)))
        size = int(rng.integers(0, len(content) - offset + 1))
        with quire.map(path, size, sharing="shared", offset=offset) as mapping:
            assert bytes(memoryview(mapping)) == content[offset : offset + size]
            assert (mapping.offset, len(mapping)) == (offset, size) or size == 0
            assert mapping.read() == content[offset : offset + size]


def test_all_to_the_end_when_there_is_no_size(path: Path, content: bytes) -> None:
    with quire.map(path, sharing="private", offset=PAGE + 1) as mapping:
        assert mapping.read() == content[PAGE + 1 :]
    with quire.map(path, sharing="private", page_offset=2) as mapping:
        assert mapping.read() == content[2 * 4096 :]
    with pytest.raises(ValueError, match="beyond the end of the source"):
        quire.map(path, sharing="shared", offset=len(content) + 1)


@pytest.mark.parametrize("offset", [1 << 44, (1 << 44) + 4097, (1 << 62) + 12_345])
def test_offsets_beyond_two_to_the_44(offset: int) -> None:
    descriptor = os.memfd_create("far")
    try:
        os.ftruncate(descriptor, offset + 10)
        os.pwrite(descriptor, b"far away", offset)
        with quire.map(descriptor, sharing="shared", offset=offset, protection="rw") as far:
            assert far.read() == b"far away\0\0"
            far.write(b"F")
        assert os.pread(descriptor, 8, offset) == b"Far away"
        unit = offset // 4096
        with quire.map(descriptor, 5000, sharing="shared", page_offset=unit) as far:
            assert far.read(offset % 4096, 8) == b"Far away"
    finally:
        os.close(descriptor)


def test_paths_files_and_descriptors(path: Path, content: bytes) -> None:
    with path.open("rb") as file:
        mappings = [
            quire.map(source, sharing="shared") for source in (path, str(path), file, file.fileno())
        ]
    for mapping in mappings:  # the descriptor was duplicated
        with mapping:
            assert mapping.read() == content
            assert isinstance(mapping, quire.Mapping)
            assert quire.mapping_of(mapping.array[3:]) is mapping
    with pytest.raises(TypeError, match="a source is a path"):
        quire.map(3.5, sharing="shared")  # type: ignore[arg-type]


def test_shared_and_private(path: Path, content: bytes) -> None:
    with (
        quire.map(path, sharing="shared", protection="rw") as shared,
        quire.map(path, sharing="private", protection="rw") as private,
        quire.map(path, sharing="shared") as reader,
    ):
        assert (shared.mode, private.mode, reader.mode) == ("r+", "c", "r")
        private.array[0] = content[0] ^ 1
        shared.array[PAGE] = content[PAGE] ^ 1
        assert reader.array[0] == content[0]
        assert reader.array[PAGE] == private.array[PAGE] == content[PAGE] ^ 1
        shared.sync()
        with pytest.raises(ValueError, match="read-only"):
            reader.array[0] = 1
        with pytest.raises(quire.ModeError):
            reader.write(b"x")
    assert path.read_bytes() == content[:PAGE] + bytes([content[PAGE] ^ 1]) + content[PAGE + 1 :]


def test_anonymous_memory_is_shared_with_children_or_not() -> None:
    shared = quire.map(size=PAGE, sharing="shared")
    private = quire.map(size=PAGE, sharing="private")

    def write() -> None:
        shared.array[0] = private.array[0] = 9

    assert children.in_fork(write) == ""
    assert (shared.array[0], private.array[0]) == (9, 0)
    assert shared.protection == "rw"


def test_arrays(path: Path, content: bytes) -> None:
    with quire.map(
        path, 24, sharing="shared", offset=7, dtype="<i4", shape=(-1, 3), order="F"
    ) as mapping:
        model = np.frombuffer(content, "<i4", 6, 7).reshape((2, 3), order="F")
        assert np.array_equal(mapping.array, model)
        assert mapping.array.flags.f_contiguous
    before = _core.live_mappings()
    with pytest.raises(quire.FormatError, match="whole number"):
        quire.map(path, 23, sharing="shared", dtype="<i4")
    assert _core.live_mappings() == before


def test_a_mapping_pickles_as_its_source(path: Path, content: bytes) -> None:
    with quire.map(path, 100, sharing="private", offset=9, protection="rw") as mapping:
        again = pickle.loads(pickle.dumps(mapping))
        with again:
            assert again.read() == content[9:109]
            assert (again.sharing, again.protection) == ("private", "rw")
    with quire.map(size=PAGE, sharing="private") as nameless, pytest.raises(TypeError):
        pickle.dumps(nameless)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sharing": None}, "say whether stores"),
        ({"sharing": "both"}, "no sharing 'both'"),
        ({"sharing": "shared", "flags": MapFlag.PRIVATE}, "not the same"),
        ({"sharing": "shared", "protection": "q"}, "no protection 'q'"),
        ({"sharing": "shared", "flags": MapFlag.NONBLOCK}, "POPULATE does nothing"),
        ({"sharing": "shared", "flags": MapFlag.DENYWRITE}, "ignores DENYWRITE"),
        ({"sharing": "shared", "flags": MapFlag.EXECUTABLE}, "ignores EXECUTABLE"),
        ({"sharing": "shared", "flags": MapFlag.UNINITIALIZED}, "ignores UNINITIALIZED"),
        ({"sharing": "shared", "flags": MapFlag.HUGE_2MB}, "ignores HUGE_2MB"),
        ({"sharing": "shared", "flags": MapFlag.ANONYMOUS}, "leave out source"),
        ({"sharing": "shared", "flags": MapFlag.FIXED}, "need an address"),
        ({"sharing": "shared", "flags": MapFlag.FIXED_NOREPLACE}, "need an address"),
        ({"sharing": "shared", "flags": MapFlag.SYNC}, "shared-validate"),
        ({"sharing": "private", "flags": MapFlag.GROWSDOWN}, "private anonymous"),
        ({"sharing": "shared", "offset": -1}, "counts from the start"),
        ({"sharing": "shared", "offset": 1, "page_offset": 1}, "say the same"),
        ({"sharing": "shared", "size": -1}, "size"),
        (
            {"sharing": "shared", "flags": MapFlag.BIT32 | MapFlag.FIXED, "address": PAGE * 64},
            "ignores BIT32",
        ),
    ],
)
def test_what_would_do_nothing_is_refused(
    path: Path, arguments: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        quire.map(path, **arguments)  # type: ignore[arg-type]


def test_anonymous_memory_needs_a_size_and_no_offset() -> None:
    with pytest.raises(ValueError, match="needs a size"):
        quire.map(sharing="private")
    with pytest.raises(ValueError, match="source"):
        quire.map(size=9, offset=9, sharing="private")


def refused(number: int, *arguments: object, **named: object) -> str:
    with pytest.raises(quire.Error) as caught:
        quire.map(*arguments, **named)  # type: ignore[arg-type]
    assert caught.value.errno == number
    return str(caught.value)


def test_what_the_kernel_refuses_is_explained(path: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "read it" in refused(errno.ENODEV, tmp_path / "pipe", 10, sharing="shared")
    assert "read it" in refused(errno.ENODEV, tmp_path, 10, sharing="shared")
    said = refused(errno.ENOENT, tmp_path / "absent", sharing="shared")
    assert "absent" in said
    with pytest.raises(quire.SourceError):
        quire.map(tmp_path / "absent", sharing="shared")
    assert "Bad file" in refused(errno.EBADF, 9999, 10, sharing="shared")
    with path.open("rb") as file:
        said = refused(errno.EACCES, file, sharing="shared", protection="rw")
        assert "open for reading and writing" in said
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert "read it" in refused(errno.ENODEV, ours, 10, sharing="shared")
    with path.open("rb") as file:
        said = refused(errno.EOPNOTSUPP, file, sharing="shared-validate", flags=int(MapFlag.SYNC))
        assert "DAX" in said
    said = refused(errno.EINVAL, path, sharing="shared", flags=int(MapFlag.HUGETLB))
    assert "hugetlbfs" in said


def test_what_has_no_bytes_to_map_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for source, what in ((tmp_path, "a folder"), (tmp_path / "pipe", "a pipe"), (ours, "a so")):
            with pytest.raises(quire.FormatError, match=f"cannot be mapped, as it is {what}"):
                quire.map(source, sharing="shared")
    for absent in ("nul\0here", Path("nul\0here")):
        with pytest.raises(quire.SourceError, match="NUL character"):
            quire.map(absent, sharing="shared")


@pytest.mark.parametrize(
    "where",
    [
        {"offset": 1 << 63},
        {"offset": 1 << 64},
        {"page_offset": 1 << 60},
        {"address": 1 << 64},
        {"address": -1},
    ],
)
def test_places_that_no_number_of_the_systems_holds(path: Path, where: dict[str, int]) -> None:
    (name,) = where
    words = "an address is from 0 to" if name == "address" else "an offset is below 2"
    with pytest.raises(ValueError, match=words):
        quire.map(path, 1, sharing="shared", **where)  # type: ignore[arg-type]


def test_what_becomes_of_a_cache_is_checked_without_a_budget_too(path: Path) -> None:
    with pytest.raises(ValueError, match="'zzz'"):
        quire.map(path, sharing="shared", cache="zzz")


@pytest.mark.parametrize("opened", [False, True])
def test_files_that_do_not_say_how_long_they_are(opened: bool) -> None:
    """They are made anew for whoever reads them: of /proc empty by their size, of /sys a page."""
    for path in ("/proc/self/status", "/sys/kernel/mm/transparent_hugepage/enabled"):
        options = {"dtype": "u1"} if opened else {"dtype": "u1", "sharing": "shared"}
        with pytest.raises(quire.Error, match="read it") as caught:
            (quire.open if opened else quire.map)(path, **options)  # type: ignore[operator]
        assert not isinstance(caught.value, quire.TruncatedError)
        assert caught.value.source == path
    with (
        open("/proc/self/status", "rb") as file,
        pytest.raises(quire.SourceError, match="than the 0 bytes"),
    ):
        quire.map(file, sharing="shared")
    with pytest.raises(quire.Error, match="read it"):
        quire.map("/proc/self/status", 10, sharing="shared")


def test_a_sealed_memory_file_is_not_mapped_for_writing() -> None:
    import fcntl

    descriptor = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, PAGE)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        said = refused(errno.EPERM, descriptor, sharing="shared", protection="rw")
        assert "F_SEAL_WRITE" in said
        with quire.map(descriptor, sharing="shared") as mapping:
            assert mapping.array[0] == 0
    finally:
        os.close(descriptor)


def test_populate_and_locked(path: Path) -> None:
    with quire.map(path, sharing="shared", flags=MapFlag.POPULATE) as mapping:
        assert mapping.statistics().resident_bytes >= 40 * PAGE
        assert mapping.resident().all()
        assert mapping.flags & MapFlag.POPULATE
    before = locked_bytes()
    with quire.map(size=4 * PAGE, sharing="private", flags=MapFlag.LOCKED):
        assert locked_bytes() - before == 4 * PAGE
    assert locked_bytes() == before


def locked_bytes() -> int:
    found = re.search(r"VmLck:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def test_addresses(path: Path, content: bytes) -> None:
    with quire.map(size=64 * PAGE, sharing="private", protection="none") as room:
        place = room.address + 8 * PAGE
        with pytest.raises(quire.Error, match="Something is mapped there") as taken:
            quire.map(path, sharing="shared", address=place, flags=MapFlag.FIXED_NOREPLACE)
        assert taken.value.errno == errno.EEXIST
        with pytest.raises(quire.Error, match="another mapping of quire") as taken:
            quire.map(path, PAGE, sharing="shared", address=place, flags=MapFlag.FIXED)
        assert taken.value.errno == errno.EEXIST
    for flags in (MapFlag.FIXED_NOREPLACE, MapFlag.FIXED, MapFlag(0)):
        with quire.map(path, sharing="shared", address=place, flags=flags) as mapping:
            assert mapping.address == place
            assert mapping.read() == content
    with pytest.raises(quire.Error, match="multiple of the page"):
        quire.map(path, sharing="shared", address=place + 1, flags=MapFlag.FIXED)


@pytest.mark.parametrize("flag", [MapFlag.NORESERVE, MapFlag.STACK])
def test_flags_that_change_no_content(flag: MapFlag) -> None:
    with quire.map(size=PAGE, sharing="private", flags=flag) as mapping:
        mapping.array[:] = 3
        assert mapping.array.sum() == 3 * PAGE


def test_low_addresses() -> None:
    if platform.machine() != "x86_64":
        with pytest.raises(ValueError, match="x86-64"):
            quire.map(size=PAGE, sharing="private", flags=MapFlag.BIT32)
        return
    with quire.map(size=PAGE, sharing="private", flags=MapFlag.BIT32) as mapping:
        assert mapping.address < 1 << 31


def test_it_grows_down_and_goes_whole() -> None:
    with quire.map(size="16 MiB", sharing="private", protection="none") as room:
        place = room.address + (8 << 20)  # a hole on both sides: 256 pages must stay free below
    flags = MapFlag.GROWSDOWN | MapFlag.FIXED_NOREPLACE
    with quire.map(size=4 * PAGE, sharing="private", flags=flags, address=place) as mapping:
        below = mapping.address - 3 * PAGE
        ctypes.memset(below, 5, 1)
        assert ctypes.string_at(below, 1) == b"\5"
    assert not is_mapped(below)
    assert not is_mapped(below + 4 * PAGE)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with quire.map(tmp_path / "empty", sharing="shared") as mapping:
        assert mapping.array.shape == (0,)
        assert mapping.read() == b""


def test_code_runs_where_it_may() -> None:
    code = {"x86_64": b"\xb8\x2a\0\0\0\xc3", "aarch64": b"\x40\x05\x80\x52\xc0\x03\x5f\xd6"}
    with quire.map(size=PAGE, sharing="private", protection="rw") as mapping:
        mapping.write(code[platform.machine()])
        mapping.protect("rx")
        assert mapping.protection == "rx"
        assert ctypes.CFUNCTYPE(ctypes.c_int)(mapping.address)() == 42


def test_a_relative_path_stays_the_file_that_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no descriptor is kept it is opened again, from whatever folder the program is in."""
    for folder in (tmp_path / "here", tmp_path / "there"):
        folder.mkdir()
        (folder / "same").write_bytes(bytes(4 * PAGE))
    monkeypatch.chdir(tmp_path / "here")
    with quire.map("same", sharing="shared", protection="rw") as mapping:
        mapping.drop_descriptor()
        monkeypatch.chdir(tmp_path / "there")
        mapping.resize(8 * PAGE)
        mapping.array[7 * PAGE] = 1
        os.truncate(tmp_path / "here/same", PAGE)
        with pytest.raises(quire.TruncatedError):
            touch(mapping.array, 3 * PAGE)
    assert (tmp_path / "there/same").stat().st_size == 4 * PAGE


def test_files_keep_no_descriptor_when_few_are_left(path: Path, content: bytes) -> None:
    children.run(child_uses_up_descriptors, path).check()


def child_uses_up_descriptors(path: str) -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    size = Path(path).stat().st_size
    mappings = [quire.map(path, sharing="shared") for _ in range(200)]
    open_now = len(list(Path("/proc/self/fd").iterdir()))
    assert open_now < 50, open_now
    last = mappings[-1]
    os.truncate(path, 0)
    with pytest.raises(quire.TruncatedError) as caught:
        touch(last.array, size - 1)
    assert caught.value.offset == size - 1
    Path(path).rename(f"{path}.away")
    Path(path).write_bytes(b"another")
    with pytest.raises(quire.PageIOError) as stale:
        last.read(5, 1)
    assert stale.value.errno == errno.ESTALE


def test_ten_thousand_at_once_and_in_turn(path: Path, content: bytes) -> None:
    children.run(child_maps_ten_thousand, path).check()


def child_maps_ten_thousand(path: str) -> None:

    first = Path(path).read_bytes()[0]

    def used() -> tuple[int, int]:
        gc.collect()
        maps = len(Path("/proc/self/maps").read_text().splitlines())
        return maps, len(list(Path("/proc/self/fd").iterdir()))

    quire.map(path, sharing="shared").close()
    maps, descriptors = used()
    mappings = [quire.map(path, sharing="shared") for _ in range(10_000)]
    assert all(mapping.array[0] == first for mapping in mappings)
    for mapping in mappings:
        mapping.close()
    del mappings, mapping
    assert used()[1] <= descriptors
    for _ in range(10_000):
        with quire.map(path, sharing="shared", protection="rw") as mapping:
            mapping.read(0, 1)
    after = used()
    assert after[0] <= maps + 20  # the interpreter's own memory
    assert after[1] <= descriptors
    assert _core.live_mappings() == 0


def test_ten_thousand_cycles_of_a_watched_mapping_leave_nothing(tmp_path: Path) -> None:
    """Those of 1 MiB or more are watched by a thread: it is one, and keeps nothing of them."""
    large = tmp_path / "large.bin"
    large.write_bytes(bytes(1 << 20))

    def used() -> tuple[int, ...]:
        gc.collect()
        status = Path("/proc/self/status").read_text()
        anonymous = int(status.partition("RssAnon:")[2].split()[0])
        counted = (len(list(Path("/proc/self", part).iterdir())) for part in ("fd", "task"))
        return anonymous, len(Path("/proc/self/maps").read_text().splitlines()), *counted

    def cycle() -> None:
        with quire.map(large, sharing="shared", protection="rw") as mapping:
            mapping.read(0, 1)

    for _ in range(1000):
        cycle()
    before = used()
    for _ in range(10_000):
        cycle()
    after = used()
    assert after[0] <= before[0] + 4096, "KiB of memory"
    assert after[1] <= before[1] + 20, "the interpreter's own memory"
    assert after[2] <= before[2], "descriptors"
    assert after[3] <= before[3] + 1, "threads"


def test_an_offset_beyond_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that tells its size in /sys, as a frame buffer does."""
    monkeypatch.setattr("quire._map.device_bytes", lambda _path: 2 * PAGE)
    with pytest.raises(ValueError, match=f"offset {3 * PAGE} lies beyond the end of the source"):
        quire.map("/dev/zero", sharing="private", offset=3 * PAGE)
    with quire.map("/dev/zero", sharing="private", offset=PAGE) as mapping:
        assert mapping.size_bytes == PAGE


def test_character_devices() -> None:
    with quire.map("/dev/zero", 3 * PAGE, sharing="private", protection="rw") as mapping:
        assert not mapping.array.any()
        mapping.array[:] = 1
        assert mapping.array.all()
    with quire.map("/dev/zero", PAGE, sharing="shared", protection="rw") as mapping:
        assert children.in_fork(lambda: mapping.write(b"z") and None) == ""
        assert mapping.read(0, 1) == b"z"
    assert stat.S_ISCHR(Path("/dev/zero").stat().st_mode)
    with pytest.raises(ValueError, match="does not say how long"):
        quire.map("/dev/zero", sharing="private")


if __name__ == "__main__":
    children.main()
