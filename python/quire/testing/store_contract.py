"""What every store does: gives the right bytes at any offset, refuses, ends waits, names errors."""

from __future__ import annotations

import errno
import pickle
import threading
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, ClassVar

import pytest

import quire
from quire import _core
from quire.store.resolve import Source, resolve
from quire.testing.content import new_seed, random_content, random_ranges

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["PythonStoreContract", "SourceMaker", "StoreContract"]

MIB = 1 << 20
THREADS = 8
CLOSE_LIMIT_S = 10.0


class SourceMaker(ABC):
    """How the contracts come by the source under test."""

    @abstractmethod
    def make_source(self, content: bytes, folder: Path) -> Source:
        """Something that `quire.open` takes and whose (decompressed) bytes are ``content``.

        ``folder`` is empty and the source's own. May be called several times in one test.
        """

    def open_store(self, content: bytes, folder: Path, **options: float) -> _core.Store:
        """The native store of a new source."""
        folder.mkdir()
        return resolve(self.make_source(content, folder), **options).store  # type: ignore[arg-type]


class StoreContract(SourceMaker):
    """Reads of a store, without any mapping."""

    store_content_bytes: ClassVar[int] = 70_001

    @pytest.fixture
    def store_content(self) -> bytes:
        """What the store holds."""
        return random_content(self.store_content_bytes, new_seed())

    @pytest.fixture
    def store(self, store_content: bytes, tmp_path: Path) -> Iterator[_core.Store]:
        """The store under test, closed afterwards."""
        with closing(self.open_store(store_content, tmp_path / "source")) as opened:
            yield opened

    def test_facts(self, store: _core.Store, store_content: bytes) -> None:
        """Size, label, grain and version are of the right kind."""
        assert store.size == len(store_content)
        assert store.label
        assert store.label.isprintable()
        assert store.grain >= 1
        assert store.version is None or store.version.isprintable()
        assert isinstance(store.is_slow, bool)
        assert store.describe()

    def test_every_alignment(self, store: _core.Store, store_content: bytes) -> None:
        """Reads that begin and end around pages, frames and the middle give the content."""
        size, page = len(store_content), _core.page_bytes()
        grain = min(store.grain, size)
        borders = {0, page, 2 * page, grain, 2 * grain, size // 2, size}
        offsets = {border + shift for border in borders for shift in (-2, -1, 0, 1, 2, 3, 64)}
        lengths = {0, 1, 2, 3, 7, 64, page - 1, page, page + 1, grain - 1, grain, grain + 1}
        for offset in sorted(at for at in offsets if 0 <= at <= size):
            for length in sorted(length for length in lengths if offset + length <= size):
                got = store.read(offset, length)
                assert got == store_content[offset : offset + length], (offset, length)

    def test_the_ends(self, store: _core.Store, store_content: bytes) -> None:
        """First byte, last byte, nothing, all."""
        size = len(store_content)
        assert store.read(0, 1) == store_content[:1]
        assert store.read(size - 1, 1) == store_content[-1:]
        assert store.read(size, 0) == b""
        assert store.read(0, size) == store_content

    def test_past_the_end_is_refused(self, store: _core.Store, store_content: bytes) -> None:
        """No byte outside of the store is ever asked for; a refusal does no harm."""
        size = len(store_content)
        for offset, length in [(size, 1), (size - 1, 2), (0, size + 1), (1 << 63, 1)]:
            with pytest.raises(ValueError, match="past the end"):
                store.read(offset, length)
        for offset, length in [(-1, 1), (0, -1), (1 << 64, 1)]:
            with pytest.raises(OverflowError):
                store.read(offset, length)
        assert store.read(size - 1, 1) == store_content[-1:]

    def test_concurrent_reads(self, store: _core.Store, store_content: bytes) -> None:
        """Threads read at once and get what one would."""
        seed = new_seed()

        def read_some(number: int) -> None:
            for offset, length in random_ranges(len(store_content), 60, seed + number):
                assert store.read(offset, length) == store_content[offset : offset + length]

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(read_some, range(THREADS)))

    def test_bytes_fetched_grow_with_reading(self, store: _core.Store) -> None:
        """What came from the disk or the network is counted."""
        before = store.bytes_fetched
        store.read(0, store.size)
        assert store.bytes_fetched > before

    def test_an_empty_store(self, tmp_path: Path) -> None:
        """No bytes can be read from, in the only way there is."""
        with closing(self.open_store(b"", tmp_path / "empty")) as store:
            assert store.size == 0
            assert store.read(0, 0) == b""
            with pytest.raises(ValueError, match="past the end"):
                store.read(0, 1)

    def test_close_ends_a_read_that_waits(self, store: _core.Store) -> None:
        """Closing does not wait for a read that hangs; that read raises."""
        stalled = _core.open_faulty(store, code="ok", delay_s=60.0)
        begun = threading.Event()
        caught: list[BaseException] = []

        def read() -> None:
            begun.set()
            try:
                stalled.read(0, 1)
            except quire.Error as error:
                caught.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        begun.wait()
        stalled.close()
        reader.join(CLOSE_LIMIT_S)
        assert not reader.is_alive()
        assert [type(error) for error in caught] == [quire.PageIOError]
        assert "close" in str(caught[0])

    def test_a_closed_store_refuses(self, store: _core.Store) -> None:
        """Closing twice is as closing once; a read afterwards raises."""
        store.close()
        store.close()
        with pytest.raises(quire.Error, match="closed"):
            store.read(0, 1)

    def test_errors_are_named(self, store: _core.Store, store_content: bytes) -> None:
        """An error says which source, where, and what the system said."""
        bad = _core.open_faulty(store, offset=5000, length=10, code="io", errno=errno.EIO)
        assert bad.read(0, 5000) == store_content[:5000]
        assert bad.read(5010, 100) == store_content[5010:5110]
        with pytest.raises(quire.PageIOError) as caught:
            bad.read(4990, 30)
        assert caught.value.source == store.label
        assert caught.value.offset == 4990
        assert caught.value.errno == errno.EIO
        assert "EIO" in str(caught.value)


class PythonStoreContract(SourceMaker):
    """What `quire.Store` asks of a class written in Python, called in this process."""

    @abstractmethod
    def make_source(self, content: bytes, folder: Path) -> quire.Store:
        """The object under test."""

    @pytest.fixture
    def python_content(self) -> bytes:
        """What the store holds."""
        return random_content(20_011, new_seed())

    @pytest.fixture
    def python_store(self, python_content: bytes, tmp_path: Path) -> Iterator[quire.Store]:
        """The object under test."""
        with closing(self.make_source(python_content, tmp_path)) as made:
            yield made

    def test_it_travels(self, python_store: quire.Store, python_content: bytes) -> None:
        """Its pickled copy is as good."""
        again: quire.Store = pickle.loads(pickle.dumps(python_store))
        for name in ("size", "label", "version"):
            assert getattr(again, name) == getattr(python_store, name)
        buffer = bytearray(len(python_content))
        again.read_into(0, memoryview(buffer))
        assert buffer == python_content
        again.close()

    def test_it_fills_all_of_the_buffer_and_no_more(
        self, python_store: quire.Store, python_content: bytes
    ) -> None:
        """Bytes beside the buffer stay as they were."""
        for offset, length in random_ranges(len(python_content), 100, new_seed()):
            around = bytearray(length + 16)
            python_store.read_into(offset, memoryview(around)[8 : 8 + length])
            assert around[8 : 8 + length] == python_content[offset : offset + length]
            assert around[:8] + around[8 + length :] == bytes(16)
