import pytest

from quire.model import GEOMETRIES, Access, PageFault
from quire.model.mmu import Mmu, NonCanonicalAddress
from quire.model.page_table import PageTable
from quire.model.physical_memory import PhysicalMemory
from quire.model.tlb import Tlb
from quire.model.trace import Trace

PAGE = 0x40_0000_0000


@pytest.fixture(params=GEOMETRIES)
def table(request):
    geometry = GEOMETRIES[request.param]
    return PageTable(geometry, PhysicalMemory(geometry.page_size))


@pytest.fixture
def mmu():
    return Mmu(Tlb(4, 2), Trace(on=True))


def test_translation_by_walk_and_then_by_tlb(table, mmu):
    table.map(PAGE, 3, writable=True, executable=False)
    physical = 3 * table.geometry.page_size + 5
    assert mmu.translate(table, 1, PAGE + 5, Access.READ) == physical
    kinds = [event.kind for event in mmu.trace.take()]
    assert kinds == ["tlb miss"] + ["walk"] * table.geometry.levels
    assert mmu.translate(table, 1, PAGE + 5, Access.READ) == physical
    assert [event.kind for event in mmu.trace.take()] == ["tlb hit"]


@pytest.mark.parametrize(
    ("access", "absent", "forbidden"),
    [
        (Access.READ, 0b00100, None),
        (Access.WRITE, 0b00110, 0b111),
        (Access.EXECUTE, 0b10100, 0b10101),
    ],
)
def test_error_codes(table, mmu, access, absent, forbidden):
    with pytest.raises(PageFault) as fault:
        mmu.translate(table, 1, PAGE, access)
    assert (fault.value.error_code, fault.value.address) == (absent, PAGE)
    table.map(PAGE, 3, writable=False, executable=False)
    if forbidden is None:
        mmu.translate(table, 1, PAGE, access)
        return
    for _ in range(2):  # the second time with the page in the TLB
        with pytest.raises(PageFault) as fault:
            mmu.translate(table, 1, PAGE, access)
        assert fault.value.error_code == forbidden
        mmu.translate(table, 1, PAGE, Access.READ)


def test_accessed_and_dirty_bits(table, mmu):
    form = table.format
    table.map(PAGE, 3, writable=True, executable=False)
    leaf = table.leaf(PAGE)
    table.update(leaf, leaf.entry & ~form.accessed)
    mmu.translate(table, 1, PAGE, Access.READ)
    entry = table.leaf(PAGE).entry
    assert entry & form.accessed
    assert not entry & form.dirty
    mmu.translate(table, 1, PAGE, Access.WRITE)  # known to the TLB as clean: walks again
    assert table.leaf(PAGE).entry & form.dirty


def test_a_stale_tlb_is_what_a_flush_prevents(table, mmu):
    table.map(PAGE, 3, writable=True, executable=False)
    first = mmu.translate(table, 1, PAGE, Access.READ)
    table.unmap(table.leaf(PAGE))
    assert mmu.translate(table, 1, PAGE, Access.READ) == first
    mmu.tlb.flush(1, PAGE >> table.geometry.page_bits, 1)
    with pytest.raises(PageFault):
        mmu.translate(table, 1, PAGE, Access.READ)


def test_kernel_half_and_holes(table, mmu):
    with pytest.raises(PageFault):
        mmu.translate(table, 1, (1 << 64) - table.geometry.page_size, Access.READ)
    with pytest.raises(NonCanonicalAddress):
        mmu.translate(table, 1, 1 << 62, Access.READ)


def test_no_trace_when_it_is_off(table):
    mmu = Mmu(Tlb(0), Trace())
    table.map(PAGE, 3, writable=True, executable=False)
    mmu.translate(table, 1, PAGE, Access.READ)
    assert mmu.trace.take() == []
