import os

import numpy as np
import pytest

import quire
from quire import _core
from quire.store.abc import Store
from quire.store.resolve import pager_shape, resolve


def test_path_like_and_file_url(rows_file):
    for source in (rows_file, str(rows_file), rows_file.as_uri(), f"file://localhost{rows_file}"):
        resolved = resolve(source)
        assert resolved.store.size == rows_file.stat().st_size
        assert resolved.pickled == str(rows_file)
        assert resolved.container is None
        resolved.store.close()


def test_file_url_is_unquoted(tmp_path):
    path = tmp_path / "a b#1.bin"
    path.write_bytes(b"xyz")
    with quire.open(path.as_uri(), dtype="u1") as mapping:
        assert mapping.array.tobytes() == b"xyz"


def test_url_of_another_machine():
    with pytest.raises(quire.SourceError, match="another machine"):
        resolve("file://elsewhere/x.npy")


def test_nul_in_a_path():
    with pytest.raises(quire.SourceError, match="NUL"):
        resolve("/tmp/a\0b")


@pytest.mark.parametrize("source", [None, 7, np.zeros(3), [1], object()])
def test_what_is_no_source(source):
    with pytest.raises(TypeError, match="a source is a path, a URL"):
        resolve(source)


def test_unknown_scheme():
    with pytest.raises(quire.SourceError, match="no store reads nosuch"):
        resolve("nosuch://host/x")


def test_native_store_is_itself():
    store = _core.open_memory(bytes(10), "made up")
    resolved = resolve(store)
    assert resolved.store is store
    assert resolved.pickled is None


def test_compressed_bytes_are_decompressed(rows_file, tmp_path):
    quire.pack(rows_file, tmp_path / "no-such-suffix")
    resolved = resolve(tmp_path / "no-such-suffix")
    assert resolved.container is not None
    assert resolved.store.size == rows_file.stat().st_size
    assert resolved.store.bytes_fetched <= resolved.container.size
    resolved.store.close()


def test_skippable_frame_first(tmp_path):
    path = tmp_path / "odd"
    path.write_bytes(b"\x50\x2a\x4d\x18" + bytes(20))
    with pytest.raises(quire.FormatError) as caught:
        resolve(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("budget_bytes", [0, 1, 1 << 20, 7 << 20, 64 << 20, 1 << 40])
def test_pager_shape_is_a_part_of_the_budget(budget_bytes):
    slots, slot_bytes = pager_shape(budget_bytes)
    assert slots * slot_bytes <= max(budget_bytes // 8, 256 << 10)
    assert slot_bytes % 4096 == 0
    assert 4 <= slots <= 32


class Squares(Store):
    """A store of a user: byte `i` is `i * i % 251`."""

    def __init__(self, size: int, version: str | None = "1") -> None:
        self._size, self._version = size, version

    @property
    def size(self) -> int:
        return self._size

    @property
    def label(self) -> str:
        return "squares"

    @property
    def version(self) -> str | None:
        return self._version

    def read_into(self, offset: int, buffer: memoryview) -> None:
        at = np.arange(offset, offset + len(buffer), dtype="u8")
        buffer[:] = (at * at % 251).astype("u1").tobytes()


def test_store_of_a_user(monkeypatch):
    at = np.arange(300_000, dtype="u8")
    with quire.open(Squares(300_000), dtype="u1", budget="8 MiB") as mapping:
        assert mapping.source == "squares"
        assert mapping.version == "1"
        assert np.array_equal(mapping.array, (at * at % 251).astype("u1"))


class Refusing(Squares):
    def read_into(self, offset: int, buffer: memoryview) -> None:
        raise PermissionError(13, os.strerror(13))


def test_store_of_a_user_that_refuses():
    with pytest.raises(quire.PageIOError) as caught:
        quire.open(Refusing(100), dtype="u1")
    assert caught.value.errno == 13
    assert caught.value.source == "squares"


def test_store_that_cannot_be_sent():
    store = Squares(10)
    store.lock = open(os.devnull)
    try:
        with pytest.raises(quire.SourceError, match="cannot be sent to its pager process"):
            quire.open(store, dtype="u1")
    finally:
        store.lock.close()
