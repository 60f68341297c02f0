"""Budgets hold when they change, beside pins and between mappings: nothing hangs or leaks."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import quire
from quire import _core
from quire._api import find_layout
from quire.creation import RawShape
from quire.testing import children
from quire.testing.write_errors import persist

MIB = 1 << 20
SIZE = 16 * MIB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "numbers.bin"
    np.arange(SIZE // 8).tofile(path)
    return path


@pytest.fixture(autouse=True)
def budget_of_the_process() -> Iterator[None]:
    """Whatever a test sets is taken back."""
    yield
    quire.set_budget(None)


def open_numbers(path: Path, pmap: str, **how: object) -> quire.Mapping:
    return quire.open(path, dtype="i8", pmap=pmap, **how)  # type: ignore[arg-type]


def checked(function: object) -> object:
    """Calls; the loop lets a pending error arrive."""
    value = function()  # type: ignore[operator]
    for _ in range(10):
        pass
    return value


def test_pages_that_are_read_by_calls_go_with_the_others(pmap: str, path: Path) -> None:
    """`readinto` holds a page for a moment: an eviction in that moment must not forget it."""
    with open_numbers(path, pmap, budget=4 * SIZE, granule="64 KiB") as mapping:
        stop = threading.Event()

        def read(seed: int) -> None:
            random, into = np.random.default_rng(seed), bytearray(64 << 10)
            while not stop.is_set():
                mapping.readinto(into, int(random.integers(0, SIZE >> 16)) << 16)

        readers = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
        for reader in readers:
            reader.start()
        for _ in range(30):
            mapping.prefetch().result(60)
            mapping.set_budget("2 MiB")
            mapping.set_budget(4 * SIZE)
        stop.set()
        for reader in readers:
            reader.join()
        mapping.evict()
        assert not mapping.resident().any()
        mapping.set_budget("1 MiB")
        assert mapping.statistics().resident_bytes <= MIB
        assert int(mapping.array[::512].sum()) == sum(range(0, SIZE // 8, 512))


def test_a_budget_does_not_go_below_what_is_pinned(pmap: str, path: Path) -> None:
    with open_numbers(path, pmap, budget="12 MiB", granule="64 KiB") as mapping:
        with mapping.pin(np.s_[:MIB]):
            for lower in (mapping.set_budget, quire.set_budget):
                with pytest.raises(
                    quire.BudgetError, match=r"pinned.*at least \d+ bytes are needed"
                ):
                    lower("4 MiB")
            assert int(mapping.array[-1]) == SIZE // 8 - 1
        mapping.set_budget("4 MiB")
        assert int(mapping.array.sum()) == (SIZE // 8) * (SIZE // 8 - 1) // 2
        assert mapping.statistics().resident_bytes <= 4 * MIB


def test_a_lowered_budget_takes_pages_that_were_just_touched(pmap: str, path: Path) -> None:
    """CLOCK spares the pages of a small circle once, when all of them are new."""
    with open_numbers(path, pmap, budget="192 KiB", granule=16384) as mapping:
        mapping.advise("random")
        mapping.array[:: 16384 // 8].sum()
        assert mapping.statistics().resident_bytes > 96 << 10
        mapping.set_budget("96 KiB")
        assert mapping.statistics().resident_bytes <= 96 << 10


def test_pins_of_all_mappings_fit_the_budget_of_the_process(pmap: str, path: Path) -> None:
    with (
        open_numbers(path, pmap, granule="64 KiB") as one,
        open_numbers(path, pmap, granule="64 KiB") as two,
    ):
        quire.set_budget("12 MiB")
        with one.pin(np.s_[:MIB]):
            with pytest.raises(quire.BudgetError, match=r"cannot be pinned.*pin less, or raise"):
                two.pin(np.s_[:MIB])
            assert int(two.array.sum()) == (SIZE // 8) * (SIZE // 8 - 1) // 2
            assert quire.statistics().resident_bytes <= 12 * MIB
        two.pin(np.s_[:MIB]).release()


def test_a_mapping_without_a_budget_follows_that_of_the_process(pmap: str, path: Path) -> None:
    quire.set_budget("4 MiB")
    with open_numbers(path, pmap) as mapping:
        mapping.array.sum()
        assert mapping.statistics().evictions > 0
        quire.set_budget("1 GiB")
        mapping.prefetch().result(60)
        assert mapping.resident().all()
        quire.set_budget("4 MiB")
        assert quire.statistics().resident_bytes <= 4 * MIB


def test_an_error_names_the_mapping_that_stands_in_the_way(pmap: str, path: Path) -> None:
    """The process is over its budget, and the pages of another mapping cannot be written back."""
    other = path.with_name("other.bin")
    np.zeros(SIZE, "u1").tofile(other)
    store = _core.open_file(str(other), True)
    faulty = _core.open_faulty(store, operation="write", count=390, errno=errno.ENOSPC)
    layout = find_layout(faulty, RawShape("u1"))
    dirty = quire.Mapping(faulty, layout, mode="r+", pmap=pmap, granule_bytes=65536, retries=0)
    dirty.array.fill(7)
    with open_numbers(path, pmap, granule="64 KiB", budget=SIZE // 4) as healthy:
        healthy.prefetch().result(60)
        assert healthy.evict() > 0
        quire.set_budget(dirty.statistics().resident_bytes // 2)

        def touch() -> None:
            for start in range(0, SIZE // 8, 8192):
                checked(lambda at=start: healthy.array[at])

        with pytest.raises(quire.SyncError) as caught:
            touch()
        assert f"pages of {other} must be written back first" in str(caught.value)
        assert caught.value.source == str(path)
        assert caught.value.errno == errno.ENOSPC
        assert healthy.failed is None
    assert persist(dirty.close)
    assert (np.fromfile(other, "u1") == 7).all()


def test_calls_in_a_forked_child_do_not_pretend(pmap: str, path: Path) -> None:
    """What is the parent's cannot be synced, pinned, filled or evicted by its child."""
    with open_numbers(path, pmap, mode="r+", budget="12 MiB") as mapping:
        mapping.array[0] = 5

        def child() -> None:
            for call in (mapping.sync, mapping.pin, mapping.evict, mapping.prefetch().result):
                with pytest.raises(quire.Error, match="parent"):
                    call()

        assert children.in_fork(child) == ""
