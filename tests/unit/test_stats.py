import dataclasses

import pytest

import quire
from quire import _core
from quire.stats import Statistics
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
    assert "fault ns p50         2.0 us" in lines
    assert "bytes fetched        2.0 KiB" in lines
    assert "faults               2,048" in lines


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
