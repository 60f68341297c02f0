import pytest

from quire.model import CallError, CounterDriver, OpenFile, Signalled
from quire.model import flags as f

PAGE = 4096


@pytest.fixture
def counter(world):
    w = world()
    w.driver = CounterDriver()
    w.at = w.mapped(OpenFile("counter", "device", w.machine.device("counter", w.driver)), 3)
    return w


def test_registers_are_computed_when_touched(counter):
    values = [counter.space.load(counter.at, 1)[0] for _ in range(3)]
    assert values == [1, 2, 3]


def test_stores_reach_the_driver(counter):
    counter.space.store(counter.at + PAGE, b"register")
    assert counter.driver.register == b"register"
    counter.space.store(counter.at + PAGE + 1, b"E")
    assert counter.space.load(counter.at + PAGE, 8) == b"rEgister"


def test_past_its_pages_is_sigbus(counter):
    with pytest.raises(Signalled, match="SIGBUS"):
        counter.space.load(counter.at + 2 * PAGE, 1)


def test_driver_knows_its_mappings(counter):
    assert counter.driver.mappings == 1
    child = counter.space.fork()
    assert counter.driver.mappings == 2
    child.exit()
    counter.space.munmap(counter.at, 3 * PAGE)
    assert counter.driver.mappings == 0


def test_what_a_device_cannot_do(counter):
    space, at = counter.space, counter.at
    for call, errno in (
        (lambda: space.madvise(at, PAGE, f.MADV["DONTNEED"]), "EINVAL"),
        (lambda: space.madvise(at, PAGE, f.MADV["REMOVE"]), "EOPNOTSUPP"),
        (lambda: space.madvise(at, PAGE, f.MADV["GUARD_INSTALL"]), "EINVAL"),
        (lambda: space.mremap(at, 3 * PAGE, 4 * PAGE, 1), "EFAULT"),
    ):
        with pytest.raises(CallError, match=errno):
            call()
