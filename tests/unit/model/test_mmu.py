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
    *steps, last = mmu.trace.take()
    assert [event.kind for event in steps] == ["tlb miss"] + ["walk"] * table.geometry.levels
    page = PAGE >> table.geometry.page_bits
    assert (last.kind, last.facts) == (
        "tlb insert",
        {"asid": 1, "page": page, "frame": 3, "writable": False},
    )
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


def test_hits_are_those_that_spare_a_walk(table, mmu):
    table.map(PAGE, 3, writable=True, executable=False)
    mmu.translate(table, 1, PAGE, Access.READ)
    mmu.translate(table, 1, PAGE, Access.READ)
    mmu.translate(table, 1, PAGE, Access.WRITE)  # known as clean: walks again
    mmu.translate(table, 1, PAGE, Access.WRITE)
    kinds = [event.kind for event in mmu.trace.take()]
    assert (mmu.tlb.hits, mmu.tlb.misses) == (2, 2)
    assert (kinds.count("tlb hit"), kinds.count("tlb miss")) == (2, 2)


def test_pages_of_the_kernel_alone(table, mmu):
    table.map(PAGE, 3, writable=True, executable=False)
    leaf = table.leaf(PAGE)
    table.update(leaf, leaf.entry & ~table.format.user)
    for _ in range(2):  # the second time with the page in the TLB
        with pytest.raises(PageFault) as fault:
            mmu.translate(table, 1, PAGE, Access.READ)
        assert fault.value.error_code == 0b101
        mmu.translate(table, 1, PAGE, Access.WRITE, user=False)
    with pytest.raises(PageFault) as fault:
        mmu.translate(table, 1, PAGE, Access.EXECUTE, user=False)
    assert fault.value.error_code == 0b10001


@pytest.mark.parametrize("level", [1, 2, 3])
def test_every_table_of_x86_can_limit_rights(mmu, level):
    geometry = GEOMETRIES["x86-64"]
    form, table = geometry.entries, PageTable(geometry, PhysicalMemory(geometry.page_size))
    table.map(PAGE, 3, writable=True, executable=True)
    step = next(step for step in table.steps(PAGE) if step.level == level)
    for entry, access, code in (
        (step.entry & ~form.writable, Access.WRITE, 0b111),
        (step.entry & ~form.user, Access.READ, 0b101),
        (step.entry | form.no_execute, Access.EXECUTE, 0b10101),
    ):
        table.update(step, entry)
        with pytest.raises(PageFault) as fault:
            mmu.translate(table, 1, PAGE, access)
        assert fault.value.error_code == code
    table.update(step, step.entry)
    for access in Access:
        mmu.translate(table, 1, PAGE, access)


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
