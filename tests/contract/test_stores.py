"""Every kind of store with every pmap."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import quire
from quire import _core
from quire.store.resolve import Source
from quire.testing import PmapContract, PythonStoreContract, StoreContract
from quire.testing.stores import BytesStore
from quire.tools.range_server import RangeServer


def write_seekable(
    path: Path, content: bytes, frame_lengths: list[int], *, checksums: bool
) -> None:
    """Writes ``content`` in frames of these lengths, the last one repeated."""
    entries, at = [], 0
    with path.open("wb") as file:
        while at < len(content):
            length = frame_lengths[min(len(entries), len(frame_lengths) - 1)]
            part = content[at : at + length]
            frame, checksum = _core.compress_frame(part, 3)
            entries.append((len(frame), len(part), checksum if checksums else None))
            file.write(frame)
            at += len(part)
        file.write(_core.encode_seek_table(entries))


class TestFile(StoreContract, PmapContract):
    def make_source(self, content: bytes, folder: Path) -> Source:
        (folder / "content.bin").write_bytes(content)
        return folder / "content.bin"


class TestMemory(StoreContract, PmapContract):
    def make_source(self, content: bytes, folder: Path) -> Source:
        return _core.open_memory(content, "memory of a test")


class TestZstd(StoreContract, PmapContract):
    """Frames of one size, with checksums."""

    def make_source(self, content: bytes, folder: Path) -> Source:
        (folder / "plain").write_bytes(content)
        quire.pack(folder / "plain", folder / "packed.zst", frame="16 KiB")
        return folder / "packed.zst"


class TestZstdOddFrames(StoreContract, PmapContract):
    """Frames of every length, none a multiple of a page, without checksums."""

    def make_source(self, content: bytes, folder: Path) -> Source:
        lengths = [1, 2, 4095, 4097, 3, 12_289, 777, 65_537, 9_999]
        write_seekable(folder / "odd.zst", content, lengths, checksums=False)
        return folder / "odd.zst"


class TestZstdInMemory(StoreContract, PmapContract):
    """Frames smaller than a page over a store without a path, with checksums."""

    def make_source(self, content: bytes, folder: Path) -> Source:
        write_seekable(folder / "small.zst", content, [1000], checksums=True)
        return _core.open_memory((folder / "small.zst").read_bytes(), "packed memory")


class TestPythonStore(PythonStoreContract, StoreContract, PmapContract):
    def make_source(self, content: bytes, folder: Path) -> quire.Store:
        return BytesStore(content)


class TestHttp(StoreContract, PmapContract):
    @pytest.fixture(autouse=True)
    def _server(self, tmp_path: Path) -> Iterator[None]:
        with RangeServer(tmp_path) as server:
            self.served, self.url = tmp_path, server.url
            yield

    def make_source(self, content: bytes, folder: Path) -> Source:
        (folder / "content.bin").write_bytes(content)
        return f"{self.url}/{(folder / 'content.bin').relative_to(self.served)}"


class TestHttpZstd(TestHttp):
    """Remote and compressed."""

    def make_source(self, content: bytes, folder: Path) -> Source:
        write_seekable(folder / "content.zst", content, [30_000], checksums=True)
        return f"{self.url}/{(folder / 'content.zst').relative_to(self.served)}"


class TestConcat(StoreContract, PmapContract):
    """A file after its header, compressed frames, nothing, and memory, one behind the other."""

    def make_source(self, content: bytes, folder: Path) -> Source:
        first, second = len(content) // 3, 2 * len(content) // 3
        (folder / "file").write_bytes(b"a header" + content[:first])
        write_seekable(folder / "part.zst", content[first:second], [30_000], checksums=True)
        packed = _core.open_zstd(_core.open_file(folder / "part.zst"))
        parts = [
            (_core.open_file(folder / "file"), 8, first),
            (packed, 0, second - first),
            (_core.open_memory(b"", "nothing"), 0, 0),
            (_core.open_memory(content[second:] + b"more", "the rest"), 0, len(content) - second),
        ]
        return _core.open_concat(parts, "parts of a test", None)


class TestFaulty(StoreContract, PmapContract):
    """A store in which nothing goes wrong but time: all its reads are late."""

    def make_source(self, content: bytes, folder: Path) -> Source:
        inner = _core.open_memory(content, "late memory")
        return _core.open_faulty(inner, code="ok", delay_s=0.000_2)
