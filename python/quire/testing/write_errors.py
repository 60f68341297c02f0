"""What a writable mapping does when its store cannot be written: nothing is lost."""

from __future__ import annotations

import errno
import functools
import gc
from abc import ABC, abstractmethod
from contextlib import closing
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest

import quire
from quire import _core
from quire._api import find_layout
from quire.creation import RawShape
from quire.testing.content import new_seed, random_content
from quire.testing.pmap_errors import call, in_thread
from quire.testing.pmaps import writable_pmaps
from quire.testing.write_model import same_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from quire.testing.touches import Array

__all__ = ["KIB", "PAGE", "WriteErrors", "dirty_unit", "written_by"]

KIB = 1 << 10
PAGE = _core.page_bytes()
TRIES_MAX = 400


def dirty_unit(mapping: quire.Mapping) -> int:
    """Bytes that one written byte makes dirty: with "wp-async" the kernel knows single pages."""
    return PAGE if mapping.dirty_tracking == "wp-async" else mapping.granule_bytes


def written_by(mapping: quire.Mapping) -> Callable[[], int]:
    """A function that says how many bytes were written back since it was called last."""
    seen = mapping.statistics().written_bytes

    def since() -> int:
        nonlocal seen
        before, seen = seen, mapping.statistics().written_bytes
        return seen - before

    return since


def assign(array: Array, where: slice, values: Array) -> None:
    """Writes; the loop lets a pending error arrive here."""
    array[where] = values
    for _ in range(10):
        pass


def persist(function: Callable[[], object]) -> list[quire.SyncError]:
    """Calls until no `SyncError` comes; returns those that came."""
    errors: list[quire.SyncError] = []
    while len(errors) < TRIES_MAX:
        try:
            function()
        except quire.SyncError as error:
            errors.append(error.with_traceback(None))
        else:
            return errors
    raise AssertionError(f"{TRIES_MAX} errors, the last: {errors[-1]}")


class WriteErrors(ABC):
    """Fixtures of `WriteContract`, and its tests of stores that fail."""

    content_bytes: ClassVar[int] = 1 << 20 | 1235
    """Of the source: it ends within a page, and is more than four times the budget."""

    @abstractmethod
    def open_writable(self, content: bytes, folder: Path) -> _core.Store:
        """A new writable store of ``content``; ``folder`` is empty and its own."""

    @pytest.fixture(params=writable_pmaps())
    def tracked_pmap(self, request: pytest.FixtureRequest) -> str:
        """A pmap and how it notices writes."""
        return str(request.param)

    @pytest.fixture(params=[PAGE, 64 * KIB], ids=["page", "64KiB"])
    def granule(self, request: pytest.FixtureRequest) -> int:
        """Bytes of a granule."""
        return int(request.param)

    @pytest.fixture
    def content(self) -> bytes:
        """What the source holds at first."""
        return random_content(self.content_bytes, new_seed())

    @pytest.fixture
    def store(self, content: bytes, tmp_path: Path) -> Iterator[_core.Store]:
        """The store under test, closed afterwards."""
        (tmp_path / "source").mkdir()
        with closing(self.open_writable(content, tmp_path / "source")) as opened:
            yield opened
            gc.collect()  # a mapping that an error's traceback keeps must end before its store

    @pytest.fixture
    def map_writable(self, tracked_pmap: str, granule: int) -> Callable[..., quire.Mapping]:
        """Maps a native store for writing, all bytes as "u1", with room for few pages."""

        def map_one(store: _core.Store, budget_bytes: int | None = None) -> quire.Mapping:
            return quire.Mapping(
                store,
                find_layout(store, RawShape("u1")),
                budget_bytes=budget_bytes or 4 * max(granule, 16 * KIB),
                granule_bytes=granule,
                pmap=tracked_pmap,
                mode="r+",
                retries=0,
            )

        return map_one

    def test_any_write_may_fail_once(
        self, content: bytes, map_writable: Callable[..., quire.Mapping], tmp_path: Path
    ) -> None:
        """Whichever write it is, by a sync or an eviction: nothing is lost.

        What a thread wrote whose page could not be had is written again by it, as told. An eviction
        that found another page to evict tells nobody: the page is dirty still, and written later.
        """
        for number in (0, 1, 2, 3, 5, 8, 13, 21, 34):
            code = (errno.EIO, errno.ENOSPC)[number % 2]
            (tmp_path / str(number)).mkdir()
            store = self.open_writable(content, tmp_path / str(number))
            faulty = _core.open_faulty(store, operation="write", first=number, count=1, errno=code)
            with closing(store), map_writable(faulty) as mapping:
                model = np.frombuffer(content, "u1").copy()
                told = self.write_randomly(mapping, model)
                assert len(told) <= 1
                assert [error.errno for error in told] == [code] * len(told)
                assert all(error.offset is not None for error in told)
                assert same_bytes(mapping.array, model)
                assert store.read(0, store.size) == model.tobytes()
                assert mapping.failed is None

    def write_randomly(self, mapping: quire.Mapping, model: Array) -> list[quire.SyncError]:
        """Writes, syncs, and tries again what failed; returns the errors met."""
        rng, array = np.random.default_rng(new_seed()), mapping.array
        told: list[quire.SyncError] = []
        for _ in range(12):
            length = len(model) >> int(rng.integers(3, 10))
            start = int(rng.integers(0, len(model) - length))
            where = slice(start, start + length)
            model[where] = np.frombuffer(rng.bytes(length), "u1")
            told += persist(functools.partial(assign, array, where, model[where]))
            if rng.random() < 0.5:
                told += persist(functools.partial(mapping.sync, start, length))
        return told + persist(mapping.sync)

    def test_a_sync_that_failed_is_done_again(
        self, store: _core.Store, map_writable: Callable[..., quire.Mapping]
    ) -> None:
        """Every sync fails as long as the store does; then the pages are written, all of them."""
        faulty = _core.open_faulty(store, operation="write", count=5, errno=errno.ENOSPC)
        with map_writable(faulty) as mapping:
            written, array = written_by(mapping), mapping.array
            array[10 * PAGE + 5] = 255
            errors = persist(mapping.sync)
            assert [error.errno for error in errors] == [errno.ENOSPC] * 5
            granule = mapping.granule_bytes
            pages = {None if error.offset is None else error.offset // granule for error in errors}
            assert pages == {10 * PAGE // granule}
            assert {error.source for error in errors} == {store.label}
            assert written() >= dirty_unit(mapping)
            assert store.read(10 * PAGE + 5, 1) == b"\xff"
            mapping.sync()
            assert written() == 0
            assert array[10 * PAGE + 5] == 255

    def test_closing_waits_for_a_store_that_works(
        self, store: _core.Store, map_writable: Callable[..., quire.Mapping]
    ) -> None:
        """`close` and `with` raise and leave the mapping open while it cannot be synced."""
        faulty = _core.open_faulty(store, operation="write", count=4, errno=errno.EIO)
        mapping = map_writable(faulty)
        mapping.array[3] = 255
        for _ in range(2):
            with pytest.raises(quire.SyncError):
                mapping.close()
            assert not mapping.closed
        with pytest.raises(quire.SyncError), mapping:
            pass
        assert not mapping.closed
        view = mapping.array
        with pytest.raises(ZeroDivisionError), mapping:  # leaves the closing to the view
            raise ZeroDivisionError
        with pytest.raises(quire.SyncError):
            mapping.sync()
        assert view[3] == 255
        mapping.sync()
        assert store.read(3, 1) == b"\xff"
        del view
        assert mapping.closed

    def test_all_is_written_again_after_a_failed_fsync(
        self, store: _core.Store, map_writable: Callable[..., quire.Mapping]
    ) -> None:
        """After fdatasync failed the kernel has forgotten: what it may have lost goes again.

        Pages that were evicted since the last good sync are of it.
        """
        faulty = _core.open_faulty(store, operation="sync", first=1, count=2, errno=errno.EIO)
        with map_writable(faulty) as mapping:
            array, unit = mapping.array, dirty_unit(mapping)
            array[5] ^= 1
            mapping.sync()  # good: this page is not of it
            written = written_by(mapping)
            pages = range(20 * 64 * KIB // 2, store.size, 64 * KIB)
            for place in range(64 * KIB, store.size, 64 * KIB):
                array[place] ^= 1
            expected = array.tobytes()  # evicts most of them
            before = written()
            assert before >= unit * len(pages)
            with pytest.raises(quire.SyncError) as caught:
                mapping.sync()
            assert caught.value.errno == errno.EIO
            total = before + written()
            with pytest.raises(quire.SyncError):
                mapping.sync(0, 64 * KIB)  # nothing of it is there, but no fsync counts
            assert written() == 0
            mapping.sync()
            assert total - PAGE < written() <= total + PAGE
            mapping.sync()
            assert written() == 0
            assert store.read(0, store.size) == expected == array.tobytes()

    @pytest.mark.parametrize("run", [call, in_thread])
    def test_no_room_and_no_way_to_make_it(
        self,
        run: Callable[[Callable[[], None]], None],
        store: _core.Store,
        content: bytes,
        map_writable: Callable[..., quire.Mapping],
    ) -> None:
        """A touch whose room cannot be made raises in its thread, until the store works again."""
        faulty = _core.open_faulty(store, operation="write", count=30, errno=errno.ENOSPC)
        with map_writable(faulty) as mapping:
            array = mapping.array
            model = np.frombuffer(content, "u1").copy()
            done = 0

            def work() -> None:
                nonlocal done
                for start in range(done, len(model), PAGE):
                    where = slice(start, min(start + PAGE, len(model)))
                    assign(array, where, model[where] ^ 1)
                    done = start + PAGE

            errors = persist(lambda: run(work))
            assert errors
            assert {type(error) for error in errors} == {quire.SyncError}
            assert {error.errno for error in errors} == {errno.ENOSPC}
            assert mapping.failed is None
            persist(mapping.sync)
            assert same_bytes(array, model ^ 1)
            assert store.read(0, store.size) == (model ^ 1).tobytes()
