import pytest

from quire.model import CallError, CounterDriver, DiskError, OpenFile, Signalled
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


class Listener(CounterDriver):
    """Notes what it is told; fails, and answers too much, on demand."""

    def __init__(self):
        super().__init__()
        self.told = []
        self.broken = False
        self.content = b""

    def open(self):
        self.told.append("open")

    def close(self):
        self.told.append("close")

    def fault(self, index):
        return self.content

    def sync(self, index, content):
        if self.broken:
            raise DiskError("EIO", "the device is broken")


@pytest.fixture
def listener(world):
    w = world()
    w.driver = Listener()
    w.at = w.mapped(OpenFile("listener", "device", w.machine.device("listener", w.driver)), 2)
    w.driver.told.clear()
    return w


def test_driver_is_told_of_mappings_alone(listener):
    space, told = listener.space, listener.driver.told
    space.mprotect(listener.at, 2 * PAGE, f.PROT_READ)
    assert told == []  # it was changed, not unmapped
    space.mprotect(listener.at, PAGE, 3)
    assert told == ["open"]  # cut in two
    space.munmap(listener.at + PAGE, PAGE)
    assert told == ["open", "close"]
    space.mremap(listener.at, PAGE, PAGE, 3, 0x10_0000)
    assert told == ["open", "close"] * 2


def test_store_that_the_driver_refuses_is_sigbus(listener):
    listener.driver.broken = True
    with pytest.raises(Signalled, match="SIGBUS BUS_OBJERR"):
        listener.space.store(listener.at, b"x")
    assert listener.space.load(listener.at, 1) == b"\0"


def test_driver_gives_a_page_at_most(listener):
    listener.driver.content = b"a" * (PAGE + 1)
    with pytest.raises(ValueError, match="4097 bytes"):
        listener.space.load(listener.at, 1)
    listener.driver.content = b"a"
    assert listener.space.load(listener.at, 2) == b"a\0"


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


def test_a_store_that_the_driver_refuses_tells_what_was_stored_before(counter, monkeypatch):
    def refuse(index, content):
        if index == 1:
            raise DiskError("EIO", "the register is broken")

    monkeypatch.setattr(counter.driver, "sync", refuse)
    with pytest.raises(Signalled, match="BUS_OBJERR") as caught:
        counter.space.store(counter.at + PAGE - 2, b"wxyz")
    assert (caught.value.address, caught.value.done) == (counter.at + PAGE, 2)
