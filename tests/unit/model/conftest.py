import pytest

from quire.model import AddressSpace, Machine, OpenFile
from quire.model import flags as f
from quire.model.invariants import check

PAGE = 4096
RW = f.PROT_READ | f.PROT_WRITE
PRIVATE, SHARED, ANON = f.MAP["PRIVATE"], f.MAP["SHARED"], f.MAP["ANON"]


class World:
    """A machine with one process, and short ways to say what the tests say often."""

    def __init__(self, **options):
        self.machine = Machine(**options)
        self.space = AddressSpace(self.machine)

    def anonymous(self, pages, prot=RW, flags=PRIVATE, space=None):
        return (space or self.space).mmap(0, pages * PAGE, prot, flags | ANON)

    def file(self, name, content, *, on_disk=True):
        return OpenFile(name, "regular", self.machine.file(name, content, on_disk=on_disk))

    def mapped(self, file, pages, prot=RW, flags=SHARED, space=None):
        return (space or self.space).mmap(0, pages * PAGE, prot, flags, file)

    def traced(self, action):
        self.machine.trace.on = True
        self.machine.trace.take()
        try:
            action()
        finally:
            self.machine.trace.on = False
        return self.machine.trace.take()

    def faults(self, action):
        return [e.facts["by"] for e in self.traced(action) if e.kind == "fault"]


@pytest.fixture
def world():
    """Makes machines; each must be in order when its test ends, and empty after its processes."""
    made = []

    def make(**options):
        made.append(World(**options))
        return made[-1]

    yield make
    for one in made:
        check(one.machine)
        for space in list(one.machine.spaces):
            space.exit()
        check(one.machine)
        assert one.machine.memory.tables == set()
        assert all(p is None or p.owner is not None for p in one.machine.memory.pages)
        assert all(page.owner is not None for page in one.machine.swap.owners.values())
