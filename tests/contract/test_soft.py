"""Reads and writes by calls: all that pmap "soft" has, and what every pmap has beside its array."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import quire
from quire import _core
from quire.testing import children
from quire.testing.content import new_seed, random_content, random_ranges
from quire.testing.pmaps import working_pmaps

SIZE = (4 << 20) + 77
BUDGET = "1 MiB"


@pytest.fixture(params=[*working_pmaps(), "soft"])
def any_pmap(request: pytest.FixtureRequest) -> str:
    """Every pmap, also the one without a pointer."""
    return str(request.param)


@pytest.fixture
def content() -> bytes:
    """What the file holds."""
    return random_content(SIZE, new_seed())


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    """The file."""
    (tmp_path / "content").write_bytes(content)
    return tmp_path / "content"


def test_reads_equal_the_model(any_pmap: str, path: Path, content: bytes) -> None:
    with quire.open(path, dtype="u1", budget=BUDGET, pmap=any_pmap) as mapping:
        for offset, length in random_ranges(SIZE, 200, new_seed()):
            assert mapping.read(offset, length) == content[offset : offset + length]
        assert mapping.read() == content
        buffer = bytearray(1000)
        assert mapping.readinto(buffer, SIZE - 1000) == 1000
        assert bytes(buffer) == content[-1000:]
        statistics = mapping.statistics()
        assert 0 < statistics.peak_resident_bytes <= 1 << 20
        assert statistics.evictions > 0


@pytest.mark.parametrize("mode", ["r+", "c"])
def test_writes_equal_the_model(any_pmap: str, path: Path, content: bytes, mode: str) -> None:
    model, rng = bytearray(content), np.random.default_rng(new_seed())
    with quire.open(path, dtype="u1", mode=mode, budget=BUDGET, pmap=any_pmap) as mapping:
        for offset, length in random_ranges(SIZE, 200, new_seed()):
            data = rng.bytes(length)
            assert mapping.write(data, offset) == length
            model[offset : offset + length] = data
        assert mapping.read() == bytes(model)
        mapping.sync()
        assert path.read_bytes() == (bytes(model) if mode == "r+" else content)


def test_threads_that_write_by_calls(any_pmap: str, path: Path) -> None:
    """Parts that share pages, under a budget of which each thread's part is many times the size."""
    with quire.open(path, dtype="u1", mode="r+", budget=BUDGET, pmap=any_pmap) as mapping:

        def write(number: int) -> None:
            for offset in range(number * 1000, SIZE - 1000, 8000):
                mapping.write(bytes([number]) * 1000, offset)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, range(8)))
        got = np.frombuffer(mapping.read(), "u1")[: SIZE // 8000 * 8000].reshape(-1, 8, 1000)
        assert (got == np.arange(8, dtype="u1")[:, None]).all()


def test_what_is_outside_is_refused(any_pmap: str, path: Path) -> None:
    with quire.open(path, dtype="u1", budget=BUDGET, pmap=any_pmap) as mapping:
        with pytest.raises(ValueError, match="do not lie in"):
            mapping.read(SIZE - 3, 4)
        with pytest.raises(quire.ModeError, match='"r"'):
            mapping.write(b"x")
        with pytest.raises(BufferError, match="writable"):
            mapping.readinto(bytes(3))
        assert mapping.read(SIZE, 0) == b""


def test_an_error_is_raised_by_the_call(any_pmap: str, content: bytes) -> None:
    inner = _core.open_memory(content, "bad memory")
    store = _core.open_faulty(inner, offset=2 << 20, length=1, errno=5)
    with quire.open(store, dtype="u1", budget=BUDGET, pmap=any_pmap, retries=0) as mapping:
        assert mapping.read(0, 1 << 20) == content[: 1 << 20]
        with pytest.raises(quire.PageIOError) as caught:
            mapping.read(2 << 20, 10)
        assert caught.value.errno == 5
        assert isinstance(mapping.failed, quire.PageIOError)


def test_soft_has_no_pointer(path: Path) -> None:
    with quire.open(path, dtype="u1", pmap="soft") as mapping:
        assert not mapping.has_pointer
        with pytest.raises(quire.PmapError, match="use read"):
            _ = mapping.array
        with pytest.raises(BufferError, match="no pointer"):
            memoryview(mapping)


def test_a_child_reads_by_calls(any_pmap: str, path: Path, content: bytes) -> None:
    with quire.open(path, dtype="u1", budget=BUDGET, pmap=any_pmap) as mapping:
        assert mapping.read(0, 10) == content[:10]

        def compare() -> None:
            assert mapping.read() == content

        assert children.in_fork(compare) == ""
        assert mapping.read() == content


def test_a_child_is_refused_a_writable_mapping(any_pmap: str, path: Path, content: bytes) -> None:
    with quire.open(path, dtype="u1", mode="r+", budget=BUDGET, pmap=any_pmap) as mapping:
        mapping.write(b"parent")

        def touch() -> None:
            with pytest.raises(quire.Error, match="open it again"):
                mapping.read(0, 10)

        assert children.in_fork(touch) == ""
        assert mapping.read(0, 6) == b"parent"
    assert path.read_bytes() == b"parent" + content[6:]
