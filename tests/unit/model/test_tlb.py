import pytest

from quire.model import Machine
from quire.model.tlb import Tlb, TlbEntry


def entry(frame):
    return TlbEntry(frame, True, False)


def test_least_recently_used_of_a_set_gives_way():
    tlb = Tlb(size=4, ways=2)  # two sets: even and odd pages
    for page in (0, 2):
        tlb.insert(1, page, entry(page))
    assert tlb.lookup(1, 0)
    tlb.insert(1, 4, entry(4))
    assert tlb.lookup(1, 2) is None
    assert tlb.lookup(1, 0) == entry(0)
    tlb.insert(1, 1, entry(1))
    assert tlb.lookup(1, 4)


def test_address_spaces_do_not_see_each_other():
    tlb = Tlb(8, 2)
    tlb.insert(1, 3, entry(5))
    tlb.insert(2, 3, entry(6))
    assert (tlb.lookup(1, 3), tlb.lookup(2, 3)) == (entry(5), entry(6))
    tlb.flush(1, 0, 1 << 40)
    assert tlb.lookup(1, 3) is None
    assert tlb.lookup(2, 3) == entry(6)


@pytest.mark.parametrize("count", [1, 100])
def test_flush_of_a_range(count):
    tlb = Tlb(16, 4)
    for page in range(8):
        tlb.insert(1, page, entry(page))
    tlb.flush(1, 4, count)
    left = {page for _, page, _ in tlb.entries()}
    assert left == set(range(8)) - set(range(4, 4 + count))


def test_no_tlb_at_all():
    tlb = Tlb(0)
    tlb.insert(1, 1, entry(1))
    assert tlb.lookup(1, 1) is None
    tlb.flush(1, 0, 10)
    assert list(tlb.entries()) == []


@pytest.mark.parametrize(("size", "ways"), [(0, 0), (1, 1), (6, 3), (7, 1), (64, 4)])
def test_machine_divides_its_tlb(size, ways):
    assert Machine(tlb=size).mmu.tlb.ways == ways


def test_ways_must_divide_the_size():
    with pytest.raises(ValueError, match="divide"):
        Tlb(5, 2)
