"""What a program asks of residency: prefetch, pin, evict, resident; policies and budgets."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest

import quire
from quire import _core
from quire.testing.waiting import wait_until

COUNT = 1 << 20
BUDGET = "4 MiB"
POLICIES = ["clock", "s3fifo", "sieve", "2q", "fifo", "lru"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Eight mebibytes."""
    np.arange(COUNT).tofile(tmp_path / "numbers")
    return tmp_path / "numbers"


def open_numbers(path: Path, pmap: str, **options: object) -> quire.Mapping:
    """Maps it under a budget of half its size."""
    given = {"budget": BUDGET, "granule": "16 KiB"} | options
    return quire.open(path, dtype="i8", pmap=pmap, **given)  # type: ignore[arg-type]


def test_prefetched_pages_cost_no_fault(pmap: str, path: Path) -> None:
    with open_numbers(path, pmap) as mapping:
        array, part = mapping.array, np.s_[1000:200_000]
        assert mapping.prefetch(part).result(20) is None
        assert mapping.resident(part).all()
        assert not mapping.resident(np.s_[300_000:]).any()
        assert mapping.statistics().faults == 0
        assert np.array_equal(array[part], np.arange(1000, 200_000))
        assert mapping.statistics().faults == 0
        del array


def test_a_prefetch_tells_of_errors(pmap: str) -> None:
    inner = _core.open_memory(bytes(1 << 20), "bad memory")
    store = _core.open_faulty(inner, offset=700_000, length=1, errno=5)
    with quire.open(store, dtype="u1", pmap=pmap, granule="16 KiB", retries=0) as mapping:
        mapping.prefetch(np.s_[:600_000]).result(20)
        with pytest.raises(quire.PageIOError) as caught:
            mapping.prefetch().result(20)
        assert caught.value.errno == 5


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_what_is_pinned_stays(pmap: str, path: Path, mode: str) -> None:
    with open_numbers(path, pmap, mode=mode) as mapping:
        array, part = mapping.array, np.s_[50_000:150_000]
        pin = mapping.pin(part)
        for _ in range(2):
            assert np.array_equal(array, np.arange(COUNT))
            assert mapping.resident(part).all()
        again = mapping.pin(np.s_[100_000])
        pin.release()
        pin.release()
        assert mapping.evict() > 0
        assert mapping.resident(np.s_[100_000:100_001]).all()
        again.release()

        def none_left() -> bool:
            mapping.evict()
            return not mapping.resident().any()

        wait_until(none_left, "readahead that was on its way has come and gone")
        assert mapping.statistics().peak_resident_bytes <= 4 << 20
        del array


def test_pinned_pages_are_safe_for_system_calls(pmap: str, path: Path, tmp_path: Path) -> None:
    with open_numbers(path, pmap, mode="r+") as mapping:
        with mapping.pin(np.s_[10_000:20_000]) as part:
            ours, theirs = socket.socketpair()
            with ours, theirs, (tmp_path / "out").open("wb", buffering=0) as out:
                assert ours.send(part[:1000].data) == 8000
                assert np.array_equal(np.frombuffer(theirs.recv(8000), "i8"), part[:1000])
                assert out.write(part.data) == 80_000
            part[:1000].tofile(tmp_path / "few")
            np.full(10_000, 7).tofile(tmp_path / "in")
            with (tmp_path / "in").open("rb", buffering=0) as source:
                assert source.readinto(part.data) == 80_000
            del part
        assert (mapping.array[10_000:20_000] == 7).all()
    assert np.array_equal(np.fromfile(tmp_path / "out", "i8"), np.arange(10_000, 20_000))
    assert (np.fromfile(path, "i8")[10_000:20_000] == 7).all()


def test_pins_that_do_not_fit(pmap: str, path: Path) -> None:
    with open_numbers(path, pmap) as mapping:
        with pytest.raises(quire.BudgetError, match="pin less"):
            mapping.pin()
        with mapping.pin(np.s_[:1000]):
            pass
        with pytest.raises(TypeError, match="makes a copy"):
            mapping.pin([1, 2, 3])
        with pytest.raises(IndexError):
            mapping.prefetch(COUNT)


def gone(mapping: quire.Mapping, where: slice) -> bool:
    mapping.evict(where)
    return not mapping.resident(where).any()


def test_evicted_pages_are_written_first(pmap: str, path: Path) -> None:
    with open_numbers(path, pmap, mode="r+") as mapping:
        array = mapping.array
        array[:1000] = -1
        # A page whose thread goes on already may still be on its way: it would be left.
        wait_until(lambda: mapping.resident(np.s_[:1000]).all(), "the pages are there")
        wait_until(lambda: gone(mapping, np.s_[:90_000]), "the pages are evicted")
        assert (array[:1000] == -1).all()
        assert (np.fromfile(path, "i8")[:1000] == -1).all()
        del array


def test_advice(pmap: str, path: Path) -> None:
    with open_numbers(path, pmap, budget="64 MiB") as mapping:
        array = mapping.array
        mapping.advise("random")
        assert int(array[:100_000].sum()) == 100_000 * 99_999 // 2
        assert mapping.statistics().readahead_fills == 0
        mapping.advise("dontneed", np.s_[:100_000])
        assert not mapping.resident(np.s_[:90_000]).any()
        mapping.advise("sequential")
        assert int(array[0]) == 0
        wait_until(lambda: mapping.statistics().readahead_fills > 0, "the first touch fills ahead")
        mapping.advise("normal")
        mapping.advise("willneed", np.s_[500_000:600_000])
        wait_until(lambda: mapping.resident(np.s_[500_000:600_000]).all(), "it is filled")
        with pytest.raises(ValueError, match="whole mapping"):
            mapping.advise("random", np.s_[:5])
        with pytest.raises(ValueError, match="willneed"):
            mapping.advise("hugepage")
        del array


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_the_right_data(pmap: str, path: Path, policy: str) -> None:
    rng = np.random.default_rng(3)
    with open_numbers(path, pmap, policy=policy, budget="1 MiB") as mapping:
        array = mapping.array
        for _ in range(5):
            picked = rng.integers(0, COUNT, 500)
            assert np.array_equal(array[picked], picked)
            assert np.array_equal(array[:50_000], np.arange(50_000))
        assert mapping.statistics().evictions > 0
        del array
    with pytest.raises(ValueError, match="no replacement policy"):
        open_numbers(path, pmap, policy="mru")


def test_the_page_daemon_keeps_some_free(pmap: str, path: Path) -> None:
    """Only where the mapping exceeds its budget: one that fits is full without harm."""
    np.zeros(4 * COUNT).tofile(path)
    with open_numbers(path, pmap, budget="16 MiB") as mapping:
        assert mapping.array.sum() == 0

        def some_free() -> bool:
            statistics = mapping.statistics()
            return statistics.resident_bytes < statistics.budget_bytes * 31 / 32

        wait_until(some_free, "the daemon works in the background")
        assert mapping.statistics().daemon_rounds > 0
    with open_numbers(path, pmap, budget="40 MiB") as mapping:
        assert mapping.array.sum() == 0
        wait_until(lambda: mapping.resident().all(), "all of it fits")
        assert mapping.statistics().evictions == 0


def test_a_smaller_budget_evicts_at_once(pmap: str, path: Path) -> None:
    with open_numbers(path, pmap, budget="64 MiB", mode="r+") as mapping:
        mapping.array[:] += 1
        mapping.set_budget("2 MiB")  # what is on its way just then goes a moment later
        wait_until(lambda: mapping.statistics().resident_bytes <= 2 << 20, "it is smaller")
        mapping.set_budget("64 MiB")
        assert mapping.array[-1] == COUNT
        mapping.prefetch().result(20)
        try:
            quire.set_budget("3 MiB")
            wait_until(lambda: quire.statistics().resident_bytes <= 3 << 20, "all are smaller")
        finally:
            quire.set_budget(None)
        assert np.array_equal(mapping.array, np.arange(1, COUNT + 1))


def test_an_automatic_budget(pmap: str, path: Path) -> None:
    quire.set_budget("auto")
    try:
        with open_numbers(path, pmap) as mapping:
            wait_until(lambda: 16 << 20 <= quire.budget() < 1 << 50, "it follows the machine")
            assert np.array_equal(mapping.array, np.arange(COUNT))
    finally:
        quire.set_budget(None)
    before = quire.budget()
    quire.set_budget("1 GiB")
    assert quire.budget() == 1 << 30
    assert before > 0
    quire.set_budget(None)
