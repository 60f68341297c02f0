import pytest

from quire.model import GEOMETRIES, Machine
from quire.model.page_table import PageTable
from quire.model.physical_memory import PhysicalMemory


@pytest.fixture(params=GEOMETRIES)
def table(request):
    geometry = GEOMETRIES[request.param]
    return PageTable(geometry, PhysicalMemory(geometry.page_size))


def test_walk_reads_one_entry_for_each_level(table):
    address = 0x1234_5678_0000 & -table.geometry.page_size
    table.map(address, 9, writable=True, executable=False)
    steps = list(table.steps(address))
    assert [step.index for step in steps] == list(table.geometry.indices(address))
    assert [step.level for step in steps] == list(reversed(range(table.geometry.levels)))
    assert steps[0].table == table.root
    leaf = table.leaf(address)
    assert table.frame(leaf, address) == 9
    assert leaf.size == table.geometry.page_size


def test_walk_ends_where_nothing_is(table):
    assert [step.level for step in table.steps(0)] == [table.geometry.levels - 1]
    assert table.leaf(0) is None


def test_empty_tables_are_freed(table):
    address = 77 * table.geometry.page_size
    table.map(address, 5, writable=False, executable=False)
    table.map(address + table.geometry.page_size, 6, writable=False, executable=False)
    assert len(table.table_frames()) == table.geometry.levels
    table.unmap(table.leaf(address))
    assert len(table.table_frames()) == table.geometry.levels
    table.unmap(table.leaf(address + table.geometry.page_size))
    assert table.table_frames() == {table.root}
    table.destroy()
    assert table.memory.used() == 0


def test_pages_far_apart_do_not_leak_tables(table):
    """gVisor's PageTableLeak: one page at a time over terabytes of strides."""
    for number in range(100):
        address = number * (12 << 30) & -table.geometry.page_size
        table.map(address, 5, writable=True, executable=True)
        table.unmap(table.leaf(address))
    assert table.table_frames() == {table.root}


def test_blocks(table):
    """2 MiB and 1 GiB with pages of 4 KiB; 32 MiB and 512 MiB with the larger granules of Arm."""
    geometry = table.geometry
    for level in geometry.leaf_levels[1:]:
        size = geometry.leaf_sizes[level]
        base, count = (4 * level + 3) * size, size // geometry.page_size
        table.map(base, 4 * count, writable=True, executable=False, level=level)
        inside = base + 7 * geometry.page_size + 5
        leaf = table.leaf(inside)
        assert (leaf.start, leaf.size, leaf.level) == (base, size, level)
        assert len(list(table.steps(inside))) == geometry.levels - level
        assert table.frame(leaf, inside) == 4 * count + 7
        with pytest.raises(AssertionError, match="block lies in the way"):
            table.map(inside, 1, writable=True, executable=False)
        table.unmap(leaf)
    assert table.table_frames() == {table.root}
    with pytest.raises(AssertionError, match="no leaf"):
        table.map(0, 0, writable=True, executable=False, level=geometry.leaf_levels[-1] + 1)


def test_leaves_of_a_range(table):
    page = table.geometry.page_size
    for number in (1, 5, 6, 1 << 20):
        table.map(number * page, number & 0xFF, writable=True, executable=False)
    everything = table.leaves(0, table.geometry.user_top)
    assert [leaf.start // page for leaf in everything] == [1, 5, 6, 1 << 20]
    assert [leaf.start // page for leaf in table.leaves(2 * page, 6 * page)] == [5]


def test_second_translation_of_a_page_is_refused(table):
    table.map(0, 1, writable=True, executable=False)
    with pytest.raises(AssertionError, match="already there"):
        table.map(0, 2, writable=True, executable=False)


def test_translations_do_not_outlive_their_table(table):
    table.map(0, 1, writable=True, executable=False)
    with pytest.raises(AssertionError, match="outlive"):
        table.destroy()


def test_tables_lie_in_simulated_frames():
    machine = Machine()
    table = PageTable(machine.geometry, machine.memory)
    table.map(0x1000, 42, writable=True, executable=False)
    last = list(table.steps(0x1000))[-1]
    raw = machine.memory.frames[last.table][8:16]
    assert int.from_bytes(raw, "little") == last.entry
    assert last.entry >> 12 & 0xFF == 42
