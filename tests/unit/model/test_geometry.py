import pytest

from quire.model import GEOMETRIES

SHAPES = {
    "x86-64": (4096, 4, 48, 2 << 20),
    "x86-64-5level": (4096, 5, 57, 2 << 20),
    "aarch64-4k": (4096, 4, 48, 2 << 20),
    "aarch64-16k": (16384, 4, 48, 32 << 20),
    "aarch64-64k": (65536, 3, 48, 512 << 20),
}


BLOCKS = {
    "x86-64": (4 << 10, 2 << 20, 1 << 30),
    "x86-64-5level": (4 << 10, 2 << 20, 1 << 30),
    "aarch64-4k": (4 << 10, 2 << 20, 1 << 30),
    "aarch64-16k": (16 << 10, 32 << 20),
    "aarch64-64k": (64 << 10, 512 << 20),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_sizes_of_leaves(name):
    geometry = GEOMETRIES[name]
    assert tuple(geometry.leaf_sizes[level] for level in geometry.leaf_levels) == BLOCKS[name]
    assert geometry.leaf_sizes[-1] == 1 << geometry.address_bits


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    geometry = GEOMETRIES[name]
    shape = (geometry.page_size, geometry.levels, geometry.address_bits, geometry.block_size)
    assert shape == SHAPES[name]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_indices_and_offset_make_the_address(name):
    geometry = GEOMETRIES[name]
    address = 0x0000_1234_5678_9ABC
    rebuilt = address & geometry.page_size - 1
    for index, shift in zip(geometry.indices(address), geometry.shifts, strict=True):
        rebuilt |= index << shift
    assert rebuilt == address


@pytest.mark.parametrize(("name", "entry"), [("x86-64", 0x27), ("aarch64-4k", 0x443)])
def test_leaves_have_the_bits_of_the_architecture(name, entry):
    """Valid, for programs, accessed; writable on x86; a page on Arm."""
    assert GEOMETRIES[name].entries.leaf(0x5000, 0, True, True) == 0x5000 | entry


def test_canonical_addresses():
    x86 = GEOMETRIES["x86-64"]
    assert x86.canonical((1 << 47) - 1)
    assert not x86.canonical(1 << 47)
    assert x86.canonical((1 << 64) - (1 << 47))
    assert not x86.canonical((1 << 64) - (1 << 47) - 1)
    assert GEOMETRIES["aarch64-4k"].canonical((1 << 48) - 1)


def test_lengths_wrap_in_64_bits():
    geometry = GEOMETRIES["x86-64"]
    assert geometry.page_up(1) == 4096
    assert geometry.page_up(4096) == 4096
    assert geometry.page_up((1 << 64) - 1) == 0


@pytest.mark.parametrize("name", ["x86-64", "aarch64-4k"])
@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("executable", [False, True])
def test_entries_keep_their_rights(name, writable, executable):
    form = GEOMETRIES[name].entries
    entry = form.leaf(0x5000, 0, writable, executable)
    assert (form.may_write(entry), form.may_execute(entry)) == (writable, executable)
    assert entry & form.address == 0x5000
    assert form.is_leaf(entry, 0)
    other = form.with_protection(entry, not writable, not executable)
    assert (form.may_write(other), form.may_execute(other)) == (not writable, not executable)
    assert other & form.address == 0x5000
    assert form.is_leaf(form.leaf(0x20_0000, 1, writable, executable), 1)
    assert not form.is_leaf(form.valid | form.table | 0x6000, 1)
