"""`quire.compat.mmap` where CPython's own tests do not look."""

from __future__ import annotations

import errno
import mmap as standard
import os
import pickle
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
from quire.compat import mmap

PAGE = mmap.PAGESIZE
LINES = b"first\nsecond, longer\n\nlast without an end"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Three pages of different bytes."""
    path = tmp_path / "file.bin"
    path.write_bytes(bytes(range(256)) * (3 * PAGE // 256))
    return path


@pytest.fixture
def m(path: Path) -> Iterator[mmap.mmap]:
    with open(path, "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    yield mapped
    mapped.close()


def lines_of() -> mmap.mmap:
    made = mmap.mmap(-1, len(LINES))
    made[:] = LINES
    return made


def test_module_has_all_that_the_standard_one_has() -> None:
    for name in dir(standard):
        if not name.startswith("_") and name != "mmap":
            assert getattr(mmap, name) == getattr(standard, name), name
    assert {name for name in dir(standard.mmap) if name[0] != "_"} <= set(dir(mmap.mmap))
    assert mmap.error is OSError
    newer = ("MAP_NORESERVE", "MAP_32BIT", "MS_SYNC", "MS_ASYNC", "MS_INVALIDATE")
    assert all(isinstance(getattr(mmap, name), int) for name in newer)


def test_no_standard_mmap_is_inside(m: mmap.mmap) -> None:
    assert not isinstance(m, standard.mmap)
    assert isinstance(m, quire.MappedFile)
    assert type(m.mapping) is quire.KernelMapping


def test_readline() -> None:
    m = lines_of()
    assert list(iter(m.readline, b"")) == LINES.splitlines(keepends=True)
    assert m.tell() == len(LINES)
    m.seek(3)
    assert m.readline() == b"st\n"


def test_lines_longer_than_what_is_searched_with_the_lock() -> None:
    size = 3 << 20
    m = mmap.mmap(-1, size)
    for at in (0, 1, (256 << 10) - 2, (256 << 10) - 1, 256 << 10, size - 1):
        m[at] = 10
        m.seek(0)
        assert len(m.readline()) == at + 1
        m[at] = 0
    m.seek(5)
    assert m.readline() == bytes(size - 5)


def test_find_across_the_boundary_of_what_is_searched_with_the_lock() -> None:
    size, word = 1 << 20, b"needle"
    m = mmap.mmap(-1, size)
    boundary = 256 << 10
    for at in (*range(boundary - 8, boundary + 3), size - boundary - 3, size - len(word)):
        m[at : at + len(word)] = word
        whole = m[:]
        assert m.find(word, 0) == whole.find(word) == at
        assert m.rfind(word, 0) == at
        assert m.find(word, 0, at + 5) == m.rfind(word, at + 1) == -1
        m[at : at + len(word)] = bytes(len(word))
    long = bytes([1]) * (boundary + 100)
    m[7 : 7 + len(long)] = long
    assert (m.find(long, 0), m.rfind(long, 0)) == (7, 7)
    assert m.find(b"", 5) == 5
    assert m.rfind(b"", 5) == size


def test_iteration_and_in(path: Path) -> None:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 300, prot=mmap.PROT_READ) as m:
        items = list(m)
        assert items == [bytes([byte]) for byte in m[:]]
        assert list(reversed(m)) == items[::-1]
        assert b"a" in m
        assert bytearray(b"a") in m
        assert memoryview(b"a") in m
        for other in (b"ab", b"", 97, "a", None):
            assert other not in m
        walk = iter(m)
        next(walk)
    with pytest.raises(ValueError, match="closed"):
        next(walk)


def test_iteration_sees_that_it_became_shorter() -> None:
    m = mmap.mmap(-1, 2 * PAGE)
    walk = iter(m)
    for _ in range(PAGE):
        next(walk)
    m.resize(PAGE)
    assert next(walk, None) is None


def test_deletion_is_refused(m: mmap.mmap) -> None:
    with pytest.raises(TypeError, match="item deletion"):
        del m[0]
    with pytest.raises(TypeError, match="slice deletion"):
        del m[0:1]
    with pytest.raises(IndexError):
        del m[len(m)]


def test_bytes_of_any_buffer(m: mmap.mmap) -> None:
    values = np.arange(5, dtype="<f8")
    assert m.write(values) == 40
    m[40:80] = values
    assert np.array_equal(np.frombuffer(m, "<f8", 10), np.tile(values, 2))
    assert m.find(values[1:2]) == 48 == m.find(values[1:2].tobytes())
    m[100:104] = memoryview(m)[101:105]  # of the same memory
    assert m[100:104] == bytes(range(101, 105))


def test_closed_is_said_by_everything(m: mmap.mmap) -> None:
    m.close()
    m.close()
    calls = [
        lambda: m[0], lambda: m[0:1], lambda: m.__setitem__(0, 1), lambda: len(m),
        m.read, m.read_byte, m.readline, m.tell, m.size, m.flush, lambda: m.seek(0),
        lambda: m.write(b""),
        lambda: m.write_byte(1), lambda: m.find(b""), lambda: m.rfind(b""), lambda: m.move(0, 0, 0),
        lambda: m.resize(5), lambda: m.madvise(0), lambda: m.__enter__(), lambda: memoryview(m),
        lambda: b"a" in m, lambda: m.set_name("x"), lambda: list(m), lambda: list(reversed(m)),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match="mmap closed or invalid"):
            call()
    assert m.closed
    assert repr(m) == "<mmap.mmap closed=True>"


def test_object_is_as_the_standard_one(m: mmap.mmap) -> None:
    with pytest.raises(AttributeError):
        m.attribute = 1  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(m)
    assert m == m
    assert hash(m) == hash(m)
    assert memoryview(m).obj is m
    reference = weakref.ref(mmap.mmap(-1, 1))
    assert reference() is None
    assert m.seekable()
    assert m.seek(5) == 5


def test_arguments_by_name_and_an_audit_event(path: Path) -> None:
    seen = []
    events = {"mmap.__new__"}
    on = [True]
    sys.addaudithook(lambda event, args: seen.append(args) if on[0] and event in events else None)
    with open(path, "r+b") as file:
        m = mmap.mmap(
            fileno=file.fileno(), length=10, flags=mmap.MAP_SHARED, prot=3, access=0, offset=PAGE
        )
        on[0] = False
        assert seen == [(file.fileno(), 10, 0, PAGE)]
    assert m[:3] == bytes(range(3))
    m.close()


@pytest.mark.parametrize("offset", [1, 300, PAGE - 1, PAGE + 7])
def test_any_offset(path: Path, offset: int) -> None:
    content = path.read_bytes()
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0, offset=offset) as m:
        assert m[:] == content[offset:]
        m[0:2] = b"ab"
        m.flush()
        m.flush(0, 2)
        assert f"offset={offset}" in repr(m)
        m.resize(len(m) + PAGE)
    assert path.read_bytes() == content[:offset] + b"ab" + content[offset + 2 :] + bytes(PAGE)


def test_flush_says_where_its_pages_begin(m: mmap.mmap) -> None:
    with pytest.raises(OSError, match=r"flush\(0, 106\)") as caught:
        m.flush(100, 6)
    assert caught.value.errno == errno.EINVAL
    m.flush(0, 106)
    m.flush(PAGE)  # to the end
    m.flush(PAGE, 10)
    with pytest.raises(ValueError, match="out of range"):
        m.flush(PAGE, len(m))


def test_flush_flags(m: mmap.mmap) -> None:
    m.flush(flags=mmap.MS_ASYNC)
    m.flush(0, PAGE, flags=mmap.MS_SYNC | mmap.MS_INVALIDATE)
    with pytest.raises(OSError) as caught:
        m.flush(flags=mmap.MS_ASYNC | mmap.MS_SYNC)
    assert caught.value.errno == errno.EINVAL
    assert not isinstance(caught.value, quire.SyncError)


def test_resize_keeps_file_and_mapping_of_one_length(path: Path, m: mmap.mmap) -> None:
    content = path.read_bytes()
    m.resize(5 * PAGE)
    assert path.stat().st_size == m.size() == len(m) == 5 * PAGE
    assert m[:] == content + bytes(2 * PAGE)
    m.resize(10)
    assert path.read_bytes() == m[:] == content[:10]
    with pytest.raises(OSError) as caught:
        m.resize(0)
    assert caught.value.errno == errno.EINVAL
    assert path.stat().st_size == 10


@pytest.mark.parametrize("flags", [mmap.MAP_SHARED, mmap.MAP_PRIVATE])
def test_anonymous_memory_grows_and_shrinks(flags: int) -> None:
    m = mmap.mmap(-1, 100, flags=flags)
    m[:] = bytes(range(100))
    m.resize(10 * PAGE)
    assert m[:] == bytes(range(100)) + bytes(10 * PAGE - 100)
    m[9 * PAGE :] = b"x" * PAGE
    assert m.rfind(b"x", 0) == 10 * PAGE - 1
    m.resize(50)
    assert m[:] == bytes(range(50))


def test_views_keep_it_open_and_in_place(m: mmap.mmap) -> None:
    array = np.frombuffer(m, np.uint8)
    with pytest.raises(BufferError, match="exported pointers"):
        m.close()
    with pytest.raises(BufferError, match="exported"):
        m.resize(PAGE)
    with pytest.raises(BufferError), m:
        pass
    assert m[5] == array[5] == 5
    m[5] = 77
    assert array[5] == 77
    del array
    m.resize(PAGE)
    m.close()


def test_a_view_outlives_the_name(path: Path) -> None:
    with open(path, "r+b") as file:
        array = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
    assert array[:256].tobytes() == bytes(range(256))


def test_mapping_beneath_cannot_be_taken_away(m: mmap.mmap) -> None:
    with pytest.raises(BufferError):
        m.mapping.close()
    with pytest.raises(BufferError):
        m.mapping.resize(PAGE)
    m.mapping.advise("random")
    assert m[0] == 0


def descriptors_of(path: Path) -> int:
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(link.readlink() == path for link in links)


def test_trackfd(path: Path) -> None:
    before = descriptors_of(path)
    with open(path, "r+b") as file:
        kept = mmap.mmap(file.fileno(), 0)
        m = mmap.mmap(file.fileno(), 0, trackfd=False)
    assert descriptors_of(path) == before + 1
    kept.close()
    assert descriptors_of(path) == before
    with pytest.raises(OSError) as caught:
        m.size()
    assert caught.value.errno == errno.EBADF
    with pytest.raises(ValueError, match="trackfd"):
        m.resize(PAGE)
    m[0:4] = b"data"
    m.flush()
    assert path.read_bytes()[:4] == b"data"
    os.truncate(path, 0)
    with pytest.raises(quire.TruncatedError):
        m[0]
    m.close()


def test_set_name(m: mmap.mmap) -> None:
    anonymous = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE)
    refused = ""
    try:
        anonymous.set_name("tables")
    except OSError as error:
        refused = str(error)
    named = "cpython:mmap:tables]" in Path("/proc/self/maps").read_text()
    assert named != ("CONFIG_ANON_VMA_NAME" in refused)  # unless the kernel was built without
    with pytest.raises(ValueError, match="non-anonymous"):
        m.set_name("tables")
    with pytest.raises(ValueError, match="too long"):
        anonymous.set_name("n" * 100)


def test_what_the_kernel_refuses_is_an_oserror(path: Path) -> None:
    with open(path, "rb") as file:
        with pytest.raises(PermissionError):
            mmap.mmap(file.fileno(), 0)
        with pytest.raises(ValueError, match="greater than file size"):
            mmap.mmap(file.fileno(), 4 * PAGE, access=mmap.ACCESS_READ)
    with pytest.raises(OSError) as caught:
        mmap.mmap(-1, 1 << 62)
    assert caught.value.errno == errno.ENOMEM


def test_ignored_flags_are_accepted(path: Path) -> None:
    with open(path, "rb") as file:
        flags = mmap.MAP_PRIVATE | mmap.MAP_DENYWRITE | mmap.MAP_EXECUTABLE | mmap.MAP_POPULATE
        with mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ) as m:
            assert m[:3] == b"\0\1\2"


def test_subclasses_take_attributes_and_iterate_as_the_class() -> None:
    class Mine(mmap.mmap):
        pass

    mine = Mine(-1, 3)
    mine.note = 1  # type: ignore[attr-defined]
    assert list(mine) == [b"\0"] * 3
    assert repr(mine).startswith("<Mine closed=False")


@pytest.mark.parametrize("module", [standard, mmap])
def test_methods_of_a_subclass_are_not_called_by_others(module: Any, path: Path) -> None:
    class Own(module.mmap):
        exports = mapping = closed = property(lambda _: pytest.fail("not of the class itself"))

        def tell(self) -> int:
            raise AssertionError("not of the class itself")

        __len__ = close = tell

    with open(path, "r+b") as file:
        m = Own(file.fileno(), 0)
    assert m.size() == 3 * PAGE
    m.resize(2 * PAGE)
    with m:
        assert f"closed=False, access=ACCESS_DEFAULT, length={2 * PAGE}, pos=0" in repr(m)
    assert "closed=True" in repr(m)
    for call in (m.size, lambda: m.resize(5), m.__enter__):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_set_name_takes_text() -> None:
    m = mmap.mmap(-1, 100)
    for name in (5, b"name", None):
        with pytest.raises(TypeError, match="must be str"):
            m.set_name(name)
    m.close()
    with pytest.raises(ValueError, match="closed"):
        m.set_name("name")


LEAST = -(1 << 63)


@pytest.mark.parametrize("module", [standard, mmap])
def test_the_least_number_of_c(module: Any) -> None:
    m = module.mmap(-1, 100, flags=mmap.MAP_PRIVATE)
    with pytest.raises(ValueError, match="new size out of range"):
        m.resize(LEAST)
    with pytest.raises(OverflowError, match="too large"):
        m.resize(LEAST - 1)
    with pytest.raises(OverflowError, match="length must be positive"):
        module.mmap(-1, LEAST)
    with pytest.raises(OverflowError, match="offset must be positive"):
        module.mmap(-1, 100, offset=LEAST)


@pytest.mark.parametrize("module", [standard, mmap])
@pytest.mark.parametrize("kind", [mmap.MAP_SHARED, mmap.MAP_PRIVATE])
def test_anonymous_memory_with_a_descriptor(module: Any, kind: int, path: Path) -> None:
    """It has nothing of the file but its size, which `resize` changes."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    with open(path, "r+b") as file:
        m = module.mmap(file.fileno(), 0, flags=kind | mmap.MAP_ANON)
    assert (len(m), m.size(), m[:5]) == (3 * PAGE, 3 * PAGE, bytes(5))
    with open(path, "r+b") as file:
        file.truncate(PAGE)
    assert m.size() == PAGE
    m.resize(2 * PAGE)
    assert (len(m), m.size(), path.stat().st_size) == (2 * PAGE, 2 * PAGE, 2 * PAGE)
    m.close()
    with pytest.raises(ValueError, match="closed"):
        m.size()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("offset", [0, 54, PAGE + 1])
def test_advice_from_the_start_at_any_offset(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        m = mmap.mmap(file.fileno(), 0, offset=offset)
        private = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, offset=offset)
    content = path.read_bytes()
    for advice in (mmap.MADV_WILLNEED, mmap.MADV_RANDOM, mmap.MADV_NORMAL, mmap.MADV_DONTFORK):
        m.madvise(advice)
        m.madvise(advice, 0, 1)
        m.madvise(advice, 0, 0)
        m.madvise(advice, PAGE - offset % PAGE)
    private[0] ^= 255
    private.madvise(mmap.MADV_DONTNEED, 0, 0)
    assert private[0] == content[offset] ^ 255
    private.madvise(mmap.MADV_DONTNEED, 0, 1)
    assert private[0] == content[offset]
    with pytest.raises(OSError, match="Invalid") as caught:
        m.madvise(mmap.MADV_WILLNEED, 1)
    assert caught.value.errno == errno.EINVAL


def test_bytes_before_an_offset_are_not_removed() -> None:
    """To remove a page takes away the bytes of the file before the first that is mapped, too."""
    memory = os.memfd_create("removed")
    try:
        os.write(memory, b"x" * 3 * PAGE)
        m = mmap.mmap(memory, 0, offset=54)
        with pytest.raises(OSError, match="Invalid"):
            m.madvise(mmap.MADV_REMOVE)
        assert os.pread(memory, PAGE, 0) == b"x" * PAGE
        m.madvise(mmap.MADV_REMOVE, PAGE - 54)
        assert os.pread(memory, 3 * PAGE, 0) == b"x" * PAGE + bytes(2 * PAGE)
    finally:
        os.close(memory)


@pytest.mark.parametrize("flags", [5, 7, 8, -30])
def test_flags_that_no_flush_has(m: mmap.mmap, flags: int) -> None:
    with pytest.raises(OSError, match="Invalid argument: there is no flush of flags") as caught:
        m.flush(flags=flags)
    assert (type(caught.value), caught.value.errno) == (OSError, errno.EINVAL)


def test_a_flush_of_locked_pages(path: Path) -> None:
    with open(path, "r+b") as file:
        m = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED | mmap.MAP_LOCKED)
    m.flush()
    with pytest.raises(OSError, match="flush without it") as caught:
        m.flush(flags=mmap.MS_SYNC | mmap.MS_INVALIDATE)
    assert (type(caught.value), caught.value.errno) == (OSError, errno.EBUSY)


def test_an_object_that_the_class_itself_did_not_make(path: Path) -> None:
    """As with the standard class no way leads around `__new__` to one that is made in part."""
    for make in (lambda: mmap.mmap.__new__(mmap.mmap), lambda: object.__new__(mmap.mmap)):
        with pytest.raises(TypeError):
            make()
    with quire.map(path, sharing="private", protection="rw") as mapping:
        bare = quire.MappedFile.__new__(mmap.mmap, mapping)
        calls = (bare.size, lambda: bare.resize(PAGE), lambda: bare.set_name("a"))
        for call in calls:
            with pytest.raises(ValueError, match=r"not made by mmap\.mmap"):
                call()
        assert "mmap" in repr(bare)
        assert bare[:3] == b"\0\1\2"
        bare.close()
        assert repr(bare) == "<mmap.mmap closed=True>"
        for call in calls:
            with pytest.raises(ValueError, match="closed"):
                call()
