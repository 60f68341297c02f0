import random

import pytest

from quire.model import CallError
from quire.model import flags as f
from quire.model.vma import Lineage, Vma
from quire.model.vma_set import VmaSet

PAGE = 4096
RW = f.READ | f.WRITE


class NoSpace:
    """Anonymous VMAs ask nothing of their space."""


def make(limit=1000):
    return VmaSet(NoSpace(), 12, 512, limit)


def area(first, last, flags=RW, lineage=None):
    return Vma(first * PAGE, last * PAGE, flags, first, lineage=lineage)


def shape(vmas):
    return [(vma.start // PAGE, vma.end // PAGE, vma.flags) for vma in vmas]


def test_neighbours_merge_on_either_side():
    vmas = make()
    vmas.add(area(0, 1))
    vmas.add(area(2, 3))
    vmas.add(area(1, 2))
    assert shape(vmas) == [(0, 3, RW)]


def test_what_keeps_neighbours_apart():
    vmas = make()
    vmas.add(area(0, 1))
    vmas.add(area(1, 2, f.READ))
    vmas.add(Vma(2 * PAGE, 3 * PAGE, f.READ, 77))
    assert len(vmas) == 3


def test_families_of_private_pages():
    own, other, inherited = Lineage(), Lineage(), Lineage(inherited=True)
    for left, right, count in (
        (own, None, 1),
        (None, own, 1),
        (own, own, 1),
        (own, other, 2),
        (inherited, None, 2),
        (inherited, inherited, 1),
    ):
        vmas = make()
        vmas.add(area(0, 1, lineage=left))
        vmas.add(area(1, 2, lineage=right))
        assert len(vmas) == count, (left, right)


def test_change_of_the_middle_and_back():
    vmas = make()
    vmas.add(area(0, 5))
    middle = vmas.change(vmas.find(2 * PAGE), 2 * PAGE, 3 * PAGE, f.READ)
    assert shape(vmas) == [(0, 2, RW), (2, 3, f.READ), (3, 5, RW)]
    assert middle.offset == 2
    vmas.change(middle, 2 * PAGE, 3 * PAGE, RW)
    assert shape(vmas) == [(0, 5, RW)]


def test_change_at_the_limit():
    vmas = make(limit=2)
    vmas.add(area(0, 3))
    vmas.add(area(3, 6, f.READ))
    with pytest.raises(CallError, match="ENOMEM"):
        vmas.change(vmas.find(0), PAGE, 2 * PAGE, f.EXEC)
    vmas.change(vmas.find(0), 2 * PAGE, 3 * PAGE, f.READ)  # the border moves; nothing is cut
    assert shape(vmas) == [(0, 2, RW), (2, 6, f.READ)]


def test_lookups():
    vmas = make()
    vmas.add(area(2, 4))
    vmas.add(area(6, 7))
    first, second = vmas
    assert vmas.find(PAGE) is None
    assert vmas.find(2 * PAGE) is first
    assert vmas.find(4 * PAGE) is None
    assert vmas.at_or_after(0) is first
    assert vmas.at_or_after(4 * PAGE) is second
    assert vmas.at_or_after(7 * PAGE) is None
    assert (vmas.before(first), vmas.after(first)) == (None, second)
    assert vmas.overlapping(3 * PAGE, 6 * PAGE) == [first]
    assert vmas.overlapping(0, 100 * PAGE) == [first, second]
    assert list(vmas.gaps(0, 10 * PAGE)) == [
        (7 * PAGE, 10 * PAGE),
        (4 * PAGE, 6 * PAGE),
        (0, 2 * PAGE),
    ]


def test_resize_reaches_a_neighbour():
    vmas = make()
    vmas.add(area(0, 2))
    vmas.add(area(3, 4))
    vmas.resize(vmas.find(0), 0, 3 * PAGE)
    assert shape(vmas) == [(0, 4, RW)]


@pytest.mark.parametrize("seed", range(10))
def test_random_changes_against_one_flag_for_each_page(seed):
    rng = random.Random(seed)
    vmas, pages = make(), {}
    for _ in range(200):
        first = rng.randrange(30)
        last = rng.randrange(first + 1, 32)
        for vma in vmas.overlapping(first * PAGE, last * PAGE):
            vmas.cut(vma, max(vma.start, first * PAGE), min(vma.end, last * PAGE))
        for page in range(first, last):
            pages.pop(page, None)
        if rng.random() < 0.7:
            flags = rng.choice([f.READ, RW])
            vmas.add(area(first, last, flags))
            pages.update(dict.fromkeys(range(first, last), flags))
        runs = []
        for page in sorted(pages):
            if runs and runs[-1][1] == page and runs[-1][2] == pages[page]:
                runs[-1] = (runs[-1][0], page + 1, pages[page])
            else:
                runs.append((page, page + 1, pages[page]))
        assert shape(vmas) == runs
