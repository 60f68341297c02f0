import dataclasses

import numpy as np
import pytest

import quire
from quire import _core
from quire.stats import Statistics
from quire.testing.pmaps import writable_pmaps
from quire.testing.waiting import wait_until


def test_fields_are_exactly_what_the_core_counts(rows_file):
    names = {field.name for field in dataclasses.fields(Statistics)}
    assert set(_core.statistics()) == names
    with quire.open(rows_file) as mapping:
        assert set(_core.MappingBase.statistics(mapping)) == names


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        quire.statistics().faults = 1


def test_every_field_is_documented():
    for field in dataclasses.fields(Statistics):
        assert field.name in Statistics.__doc__


def test_text_has_a_line_and_a_unit_for_each():
    values = {field.name: 2048 for field in dataclasses.fields(Statistics)}
    lines = str(Statistics(**values)).splitlines()
    assert len(lines) == len(values)
    assert "fault p50           2.0 us" in lines
    assert "room stall          2.0 us" in lines
    assert "fetched             2.0 KiB" in lines
    assert "faults              2,048" in lines
    assert len({line[:18] for line in lines}) == len(lines)


def test_a_mapping_without_a_budget_of_its_own_says_so(rows_file):
    with quire.open(rows_file, budget="1 MiB") as mapping:
        assert "budget              1.0 MiB" in str(mapping.statistics())
        mapping.set_budget(None)
        assert "budget              none of its own" in str(mapping.statistics())
    assert "none" not in str(quire.statistics())


def test_counts_of_a_mapping_and_of_the_process(rows_file, rows):
    before = quire.statistics()
    with quire.open(rows_file, budget="1 MiB", granule="64 KiB") as mapping:
        assert mapping.array.sum() == rows.sum()

        def all_counted() -> bool:
            return mapping.statistics().fill_bytes >= rows.nbytes

        wait_until(all_counted, "a page is counted a moment after it can be read")
        ours = mapping.statistics()
    after = quire.statistics()
    assert ours.faults > 0
    assert ours.fill_bytes >= rows.nbytes
    assert 0 < ours.resident_bytes <= ours.peak_resident_bytes <= ours.budget_bytes == 1 << 20
    assert ours.evictions > 0
    assert ours.errors == 0
    assert ours.fault_ns_p50 <= ours.fault_ns_p90 <= ours.fault_ns_p99 <= ours.fault_ns_max
    assert after.fills - before.fills >= ours.fills


def test_what_is_dirty(tmp_path):
    np.zeros(1 << 20, "u1").tofile(tmp_path / "content")
    before = quire.statistics().dirty_bytes
    for pmap in writable_pmaps():
        given = {"mode": "r+", "dtype": "u1", "granule": "64 KiB", "pmap": pmap}
        with quire.open(tmp_path / "content", **given) as mapping:
            assert np.array_equal(mapping.array, np.fromfile(tmp_path / "content", "u1"))
            assert mapping.statistics().dirty_bytes == 0
            mapping.array[[5, 400_000, 400_001]] = 1
            unit = 4096 if mapping.dirty_tracking == "wp-async" else 65536
            for _ in range(2):  # a look changes nothing
                assert mapping.statistics().dirty_bytes == 2 * unit
                assert quire.statistics().dirty_bytes == before + 2 * unit
            mapping.sync()
            assert mapping.statistics().dirty_bytes == 0
        assert mapping.statistics().dirty_bytes == 0


def test_a_slow_store_stalls():
    inner = _core.open_memory(bytes(1 << 20), "slow memory")
    slow = _core.open_faulty(inner, code="ok", offset=0, length=65536, delay_s=0.03)
    with quire.open(slow, dtype="u1", granule="64 KiB", retries=0) as mapping:
        mapping.advise("random")
        assert mapping.array[0] == mapping.array[300_000] == 0
        wait_until(lambda: mapping.statistics().faults == 2, "both are counted")
        counted = mapping.statistics()
    assert counted.store_stalls == 1
    assert 30_000_000 <= counted.store_stall_ns <= counted.fault_ns_max
    assert counted.room_stalls == counted.room_stall_ns == 0
    assert counted.stalls >= 1


def test_no_room_stalls():
    with quire.anonymous("4 MiB", budget="1 MiB") as mapping:
        for round_ in range(3):
            mapping.array[:] = round_
        counted = mapping.statistics()
    assert counted.room_stalls > 0
    assert counted.room_stall_ns > counted.room_stalls


def test_readahead_accuracy():
    values = {field.name: 0 for field in dataclasses.fields(Statistics)}
    assert Statistics(**values).readahead_accuracy is None
    assert (
        Statistics(**values | {"readahead_hits": 3, "readahead_wasted": 1}).readahead_accuracy
        == 0.75
    )
