"""Evicted pages of slow sources stand by: touched again before they are dropped, they come back."""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import quire
from quire import _core
from quire.store.resolve import Source
from quire.testing import children
from quire.testing.content import new_seed, random_content
from quire.testing.pmaps import writable_pmaps
from quire.testing.stores import DistantStore
from quire.testing.waiting import wait_until

GRANULE = 16 << 10
FRAMES = 64
PAGES = 6 * FRAMES
HOT = FRAMES // 2
CONTENT = random_content(PAGES * GRANULE, 11)
MODEL = np.frombuffer(CONTENT, "u1").reshape(PAGES, GRANULE)
DELAY_S = 0.0005
"""Of each read: far more than a page costs that stands by, whatever else the machine does."""


def slow(store: _core.Store, **faults: object) -> _core.Store:
    """The store, as far away as a disk."""
    given = {"code": "ok", "delay_s": DELAY_S} | faults
    return _core.open_faulty(store, **given)  # type: ignore[arg-type]


def slow_memory() -> _core.Store:
    return slow(_core.open_memory(CONTENT, "slow memory"))


def map_pages(source: Source, pmap: str, **options: object) -> quire.Mapping:
    """Rows of one granule each, touched at random, in a budget of a sixth."""
    given = {"granule": GRANULE, "budget": FRAMES * GRANULE} | options
    mapping = quire.open(source, dtype="u1", shape=MODEL.shape, pmap=pmap, **given)  # type: ignore[arg-type]
    mapping.advise("random")
    return mapping


def skewed() -> Iterator[int]:
    """Pages of a hot set of half the budget, each many times, between those of one long scan."""
    for cold in range(HOT, PAGES):
        yield cold
        for step in range(8):
            yield (cold * 8 + step) % HOT


def fifo_loads(pages: Iterator[int], frames: int) -> int:
    """How many loads a cache takes that sees no hits."""
    held: deque[int] = deque(maxlen=frames)
    loads = 0
    for page in pages:
        if page not in held:
            held.append(page)
            loads += 1
    return loads


def touch_all(rows: np.ndarray, pages: Iterator[int]) -> None:
    for page in pages:
        at = page * 37 % GRANULE
        assert rows[page, at] == MODEL[page, at]


def slow_source(kind: str, folder: Path) -> Source:
    """The content, behind a pager that takes its time."""
    if kind == "python":
        return DistantStore(CONTENT, delay_s=DELAY_S)
    if kind == "zstd":
        (folder / "raw").write_bytes(CONTENT)
        quire.pack(folder / "raw", folder / "raw.zst", frame=GRANULE)
        return slow(_core.open_zstd(_core.open_file(folder / "raw.zst")))
    return slow_memory()


@pytest.mark.parametrize("kind", ["memory", "python", "zstd"])
def test_a_hot_set_outlives_a_scan(pmap: str, kind: str, tmp_path: Path) -> None:
    with map_pages(slow_source(kind, tmp_path), pmap, budget="16 MiB") as mapping:
        budget = mapping.statistics().buffer_bytes + FRAMES * GRANULE
    with map_pages(slow_source(kind, tmp_path), pmap, budget=budget) as mapping:
        touch_all(mapping.array, skewed())

        def all_counted() -> bool:
            counted = mapping.statistics()
            return counted.fills + counted.second_chance_hits == counted.faults

        wait_until(all_counted, "the last fault is counted after its thread went on")
        statistics = mapping.statistics()
        needed = len(set(skewed()))
        lost_by_fifo = fifo_loads(skewed(), FRAMES) - needed
        assert lost_by_fifo > 4 * HOT
        # The hot set is lost once at most, before the first pages stand by.
        assert statistics.fills <= needed + 2 * HOT < needed + lost_by_fifo // 2
        assert statistics.second_chance_hits > HOT
        assert statistics.peak_resident_bytes <= statistics.budget_bytes


def test_a_fast_source_gives_none(pmap: str, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(CONTENT)
    with map_pages(tmp_path / "raw", pmap) as mapping:
        touch_all(mapping.array, iter(range(PAGES)))  # what the first loads took is forgotten
        before = mapping.statistics().second_chance_hits
        touch_all(mapping.array, skewed())
        assert mapping.statistics().second_chance_hits == before


def test_what_stands_by_is_resident_until_it_is_evicted(pmap: str) -> None:
    with map_pages(slow_memory(), pmap) as mapping:
        rows = mapping.array
        touch_all(rows, iter(range(PAGES)))
        wait_until(lambda: mapping.statistics().faults == PAGES, "the last fault is over")
        pages = np.flatnonzero(mapping.resident().reshape(PAGES, -1).all(axis=1))
        assert FRAMES // 2 < len(pages) <= FRAMES
        before = mapping.statistics()
        touch_all(rows, iter([int(pages[0])]))  # the oldest: the next to be dropped
        wait_until(lambda: mapping.statistics().faults == PAGES + 1, "this one is over, too")
        after = mapping.statistics()
        assert after.second_chance_hits == before.second_chance_hits + 1
        assert after.fills == before.fills
        assert mapping.evict() == len(pages) * GRANULE
        assert not mapping.resident().any()
        assert mapping.statistics().resident_bytes < FRAMES * GRANULE // 4  # empty frames
        touch_all(rows, iter(range(PAGES)))
        smaller = 8 * GRANULE
        mapping.set_budget(smaller)
        assert mapping.statistics().resident_bytes <= smaller
        touch_all(rows, skewed())
        assert mapping.statistics().resident_bytes <= smaller
        del rows


def test_pins_take_the_room_of_what_stands_by(pmap: str) -> None:
    with map_pages(slow_memory(), pmap) as mapping:
        touch_all(mapping.array, skewed())
        count = FRAMES - 4  # all that two loads leave
        with mapping.pin(np.s_[PAGES - count :]) as part:
            assert np.array_equal(part, MODEL[PAGES - count :])
            touch_all(mapping.array, iter(range(PAGES)))
            assert mapping.resident(np.s_[PAGES - count :]).all()
            del part
        touch_all(mapping.array, skewed())


def test_a_child_has_its_own(pmap: str) -> None:
    with map_pages(slow_memory(), pmap) as mapping:
        rows = mapping.array
        touch_all(rows, skewed())

        def compare() -> None:
            for _ in range(2):
                touch_all(rows, skewed())
            assert mapping.statistics().peak_resident_bytes <= FRAMES * GRANULE

        assert children.in_fork(compare) == ""
        hits = mapping.statistics().second_chance_hits
        touch_all(rows, skewed())
        assert mapping.statistics().second_chance_hits > hits


def test_a_failed_mapping_shows_nothing_that_stood_by(pmap: str) -> None:
    last = (PAGES - 1) * GRANULE
    store = _core.open_faulty(slow_memory(), offset=last, length=1, errno=errno.EIO)
    with map_pages(store, pmap, retries=0) as mapping:
        rows = mapping.array
        touch_all(rows, iter(range(PAGES - 1)))
        pages = np.flatnonzero(mapping.resident().reshape(PAGES, -1).all(axis=1))
        with pytest.raises(quire.PageIOError):
            rows[PAGES - 1].sum()
        with pytest.raises(quire.PageIOError):
            rows[int(pages[0])].sum()
        del rows


@pytest.mark.parametrize("granule", [_core.page_bytes(), GRANULE])
@pytest.mark.parametrize("tracked_pmap", writable_pmaps())
def test_no_increment_is_lost(granule: int, tracked_pmap: str, tmp_path: Path) -> None:
    """Four threads increment elements of their own in the same pages, most of them in a hot set."""
    path, pages, threads, seed = tmp_path / "counts", 96, 4, new_seed()
    path.write_bytes(bytes(pages * granule))
    store = slow(_core.open_file(path, True), delay_s=0.0002)
    shape = (pages, granule // 4)
    models = np.zeros((threads, *shape), "u4")
    with quire.open(
        store, mode="r+", dtype="u4", shape=shape, pmap=tracked_pmap, granule=granule,
        budget=32 * granule,
    ) as mapping:  # fmt: skip
        rows = mapping.array
        raised: list[BaseException] = []

        def add(number: int) -> None:
            rng = np.random.default_rng(seed + number)
            try:
                for page in np.where(rng.random(600) < 0.7, 16, pages) * rng.random(600):
                    part = np.s_[int(page), number::threads]
                    rows[part] += 1
                    models[number][part] += 1
            except BaseException as error:
                raised.append(error)

        adders = [threading.Thread(target=add, args=(number,)) for number in range(threads)]
        for adder in adders:
            adder.start()
        while any(adder.is_alive() for adder in adders):
            mapping.sync()
            adders[0].join(0.02)
        assert not raised
        assert np.array_equal(rows, models.sum(axis=0))
        statistics = mapping.statistics()
        assert statistics.second_chance_hits > 50
        assert statistics.peak_resident_bytes <= statistics.budget_bytes
        mapping.sync()
    assert np.array_equal(np.fromfile(path, "u4").reshape(shape), models.sum(axis=0))


@pytest.mark.parametrize("tracked_pmap", writable_pmaps())
def test_what_a_failed_sync_lost_is_written_again(tracked_pmap: str, tmp_path: Path) -> None:
    path, expected = tmp_path / "pages", MODEL[::-1]
    path.write_bytes(CONTENT)
    store = slow(_core.open_file(path, True))
    store = _core.open_faulty(store, operation="sync", first=0, count=1, errno=errno.EIO)
    with map_pages(store, tracked_pmap, mode="r+") as mapping:
        rows = mapping.array
        rows[:] = expected
        with pytest.raises(quire.SyncError):
            mapping.sync()
        assert mapping.resident().any()
        before = mapping.statistics().written_bytes
        mapping.sync()
        assert mapping.statistics().written_bytes == before + len(CONTENT)
        assert np.array_equal(rows, expected)
        del rows
    assert path.read_bytes() == expected.tobytes()


@pytest.mark.parametrize("tracked_pmap", writable_pmaps())
def test_private_pages_come_back_as_they_were_written(tracked_pmap: str) -> None:
    rng = np.random.default_rng(new_seed())
    with map_pages(slow_memory(), tracked_pmap, mode="c") as mapping:
        rows, model = mapping.array, MODEL.copy()
        for page in np.concatenate([np.array(list(skewed())), rng.integers(0, PAGES, 500)]):
            at = int(rng.integers(0, GRANULE - 8))
            assert np.array_equal(rows[page], model[page])
            if rng.random() < 0.3:
                rows[page, at : at + 8] = model[page, at : at + 8] = rng.integers(0, 256, 8, "u1")
        assert mapping.statistics().second_chance_hits > HOT
        assert np.array_equal(rows, model)
        del rows
