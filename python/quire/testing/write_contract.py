"""What a writable mapping of any store does with any pmap, and with every way to notice writes."""

from __future__ import annotations

import itertools
import threading
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
import pytest

import quire
from quire import _core
from quire.testing.content import new_seed
from quire.testing.write_errors import KIB, PAGE, WriteErrors, dirty_unit, written_by
from quire.testing.write_model import WriteModel, same_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from quire.testing.touches import Array

__all__ = ["WriteContract"]


class WriteContract(WriteErrors):
    """Mappings of one kind of store that can be written.

    The native stores must read what was written to them.
    """

    def test_random_writes_equal_the_model(
        self, store: _core.Store, content: bytes, map_writable: Callable[..., quire.Mapping]
    ) -> None:
        """Whatever is written in any order shows in the array, and after a sync in the source."""
        with map_writable(store) as mapping:
            least = 4 * mapping.granule_bytes
            model = WriteModel(
                mapping,
                np.frombuffer(content, "u1").copy(),
                lambda: store.read(0, store.size),
                [least, 2 * least, len(content) // 4, 2 * len(content)],
                np.random.default_rng(new_seed()),
            )
            model.run(60)
            assert mapping.failed is None
            assert mapping.statistics().errors == 0
            mapping.set_budget(least)  # the model may have chosen large ones all the time
            assert mapping.array.any()
            assert int(mapping.array.sum(dtype="u8")) > 0
            assert mapping.statistics().evictions > 0

    def test_it_says_how(
        self, tracked_pmap: str, store: _core.Store, map_writable: Callable[..., quire.Mapping]
    ) -> None:
        """The mapping is the one that was asked for."""
        with map_writable(store) as mapping:
            assert f"{mapping.pmap}:{mapping.dirty_tracking}" == tracked_pmap
            assert mapping.mode == "r+"
            assert mapping.writable
            assert mapping.array.flags.writeable
            with memoryview(mapping) as view:
                assert not view.readonly

    def test_exactly_the_dirty_pages_are_written(
        self, store: _core.Store, content: bytes, map_writable: Callable[..., quire.Mapping]
    ) -> None:
        """One element costs a page where the kernel is exact, else a granule; and only once."""
        with map_writable(store, 2 * len(content)) as mapping:
            written = written_by(mapping)
            array, unit = mapping.array, dirty_unit(mapping)
            mapping.sync()
            assert array[::PAGE].any()
            mapping.sync()
            assert written() == 0
            array[5 * PAGE + 17] ^= 1
            mapping.sync()
            assert written() == unit
            mapping.sync()
            assert written() == 0
            array[5 * PAGE] ^= 1
            array[6 * PAGE - 1] ^= 1
            array[9 * 64 * KIB] ^= 1
            mapping.sync()
            assert written() == 2 * unit
            assert store.read(9 * 64 * KIB, 1)[0] == array[9 * 64 * KIB]

    def test_a_range_is_synced_alone(
        self, store: _core.Store, content: bytes, map_writable: Callable[..., quire.Mapping]
    ) -> None:
        """Pages outside of the range stay dirty; a range means the pages that it touches."""
        with map_writable(store, 2 * len(content)) as mapping:
            written = written_by(mapping)
            array, unit = mapping.array, dirty_unit(mapping)
            places = [0, 3 * 64 * KIB, 7 * 64 * KIB]
            for place in places:
                array[place] = 255
            mapping.sync(places[1] + 10, 1)
            assert written() == unit
            assert [store.read(place, 1) == b"\xff" for place in places] == [False, True, False]
            mapping.sync(places[1], 64 * KIB)
            assert written() == 0
            mapping.sync(places[0], 1)
            assert written() == unit
            mapping.sync()
            assert written() == unit
            assert store.read(places[2], 1) == b"\xff"
            mapping.sync(store.size + 5, 10)
            mapping.sync(0, 0)
            for wrong in ((-1, 5), (0, -1)):
                with pytest.raises(ValueError, match="negative"):
                    mapping.sync(*wrong)

    def test_writes_go_in_order_and_in_long_runs(
        self, content: bytes, map_writable: Callable[..., quire.Mapping], tmp_path: Path
    ) -> None:
        """Pages side by side are one write; the offsets of the writes only grow.

        The k-th write of the same work is made to fail, for every k: the error says its offset.
        """
        runs = [(12 * 64 * KIB, 13 * 64 * KIB), (0, PAGE), (2 * 64 * KIB, 6 * 64 * KIB)]
        offsets: list[int | None] = []
        for number in itertools.count():
            (tmp_path / str(number)).mkdir()
            store = self.open_writable(content, tmp_path / str(number))
            faulty = _core.open_faulty(store, operation="write", first=number, count=1, errno=5)
            with closing(store), map_writable(faulty, 2 * len(content)) as mapping:
                for start, end in runs:
                    mapping.array[start:end] = 255
                try:
                    mapping.sync()
                except quire.SyncError as error:
                    offsets.append(error.offset)
                else:
                    break
        assert offsets == sorted(start for start, _ in runs)

    def test_what_lies_past_the_end_is_not_written(
        self, store: _core.Store, content: bytes, map_writable: Callable[..., quire.Mapping]
    ) -> None:
        """The source keeps its length, and its last bytes are written."""
        with map_writable(store) as mapping:
            mapping.array[-3:] = 255
            mapping.sync()
            assert store.size == len(content)
            assert store.read(0, store.size) == content[:-3] + b"\xff" * 3

    def test_it_reads_again_what_was_evicted(
        self, store: _core.Store, content: bytes, map_writable: Callable[..., quire.Mapping]
    ) -> None:
        """A pass of writes under a small budget writes each page back, and reads it again."""
        with map_writable(store) as mapping:
            array: Array = mapping.array
            array += 1
            statistics = mapping.statistics()
            assert statistics.written_bytes > len(content) // 2
            assert statistics.peak_resident_bytes <= statistics.budget_bytes
            assert same_bytes(array, np.frombuffer(content, "u1") + np.uint8(1))

    def test_sync_sees_the_write_before_it(
        self, store: _core.Store, map_writable: Callable[..., quire.Mapping]
    ) -> None:
        """A write is in the source at once after a sync, though its fault may not be over yet."""
        rng = np.random.default_rng(new_seed())
        with map_writable(store) as mapping:
            array = mapping.array
            for number in range(300):
                place, value = int(rng.integers(0, store.size)), 1 + number % 255
                if number % 2:
                    assert array[place] >= 0  # the page is there, and clean
                array[place] = value
                mapping.sync(place, 1)
                assert store.read(place, 1)[0] == value

    def test_sync_beside_evictions(
        self, store: _core.Store, map_writable: Callable[..., quire.Mapping]
    ) -> None:
        """Whoever writes a page back, an eviction or the sync: it is in the source afterwards."""
        stop = threading.Event()
        with map_writable(store) as mapping:
            array = mapping.array
            half = len(array) // 2

            def crowd() -> None:
                while not stop.is_set():
                    assert array[half::PAGE].any()

            thread = threading.Thread(target=crowd)
            thread.start()
            try:
                for value in range(1, 25):
                    written = slice(3 + PAGE * (value % 2), half, 2 * PAGE)  # parts of granules
                    array[written] = value
                    mapping.sync(0, half)
                    there = np.frombuffer(store.read(0, half), "u1")[written]
                    assert (there == value).all(), value
            finally:
                stop.set()
                thread.join()
            assert mapping.failed is None
