"""What changes a kernel mapping, and what it must leave alone: neighbours, holes, files."""

from __future__ import annotations

import contextlib
import errno
import mmap
import resource
import threading
from pathlib import Path

import numpy as np
import pytest

import quire
from quire.testing import children
from quire.testing.touches import touch

PAGE = mmap.PAGESIZE
PLACE = 0x2000_0000_0000
FIXED = quire.MapFlag.FIXED


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "pages.bin"
    found.write_bytes(b"".join(bytes([number]) * PAGE for number in range(1, 5)))
    return found


def test_fixed_never_takes_another_mapping(path: Path) -> None:
    with quire.map(size=PAGE, sharing="private", address=PLACE + PAGE, flags=FIXED) as other:
        other.array[:] = 7
        for size, offset in ((PAGE, 1), (PAGE + 1, 0), (2 * PAGE, PAGE)):
            with pytest.raises(quire.Error) as caught:
                quire.map(path, size, sharing="shared", offset=offset, address=PLACE, flags=FIXED)
            assert caught.value.errno == errno.EEXIST
        with quire.map(path, PAGE - 1, sharing="shared", offset=1, address=PLACE, flags=FIXED) as m:
            assert m.read(0, 2) == b"\1\1"
        assert (other.array == 7).all()


def child_forks_beside_fixed(path: str) -> None:
    """Forks while another thread maps at a place; ends when neither waits for the other."""
    held = [quire.map(path, sharing="shared") for _ in range(500)]
    done = threading.Event()

    def places() -> None:
        while not done.is_set():
            quire.map(size=PAGE, sharing="private", address=PLACE, flags=FIXED).close()

    placing = threading.Thread(target=places)
    placing.start()
    for _ in range(200):
        children.in_fork(lambda: None)
    done.set()
    placing.join()
    print(len(held))


def test_forks_beside_fixed(path: Path) -> None:
    ended = children.run(child_forks_beside_fixed, path, flags=("-W", "ignore"))
    assert ended.check().strip() == "500"


def test_what_was_unmapped_stays_so(path: Path) -> None:
    with quire.map(path, sharing="shared", protection="rw") as mapping:
        mapping.unmap(PAGE, PAGE)
        mapping.protect("r")
        mapping.protect("rw")
        mapping.protect("rw", 0, 2 * PAGE)
        with pytest.raises(quire.PageIOError, match="unmapped"):
            mapping.read(PAGE, 1)
        assert mapping.read(2 * PAGE, 1) == b"\3"
        mapping.write(b"x", 0)
    assert path.read_bytes()[0] == ord("x")


def test_a_refused_growth_leaves_the_file_alone(path: Path) -> None:
    with quire.map(path, sharing="shared", protection="rw") as mapping:
        array = mapping.array
        with pytest.raises(BufferError):
            mapping.resize("1 TiB")
        assert path.stat().st_size == 4 * PAGE
        assert array.shape == (4 * PAGE,)
        del array
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 * PAGE, hard))
        try:
            with pytest.raises(quire.Error) as caught:
                mapping.resize(9 * PAGE)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.errno == errno.EFBIG
        assert (mapping.size_bytes, path.stat().st_size) == (4 * PAGE, 4 * PAGE)
        assert mapping.read(3 * PAGE, 1) == b"\4"
        mapping.resize(9 * PAGE)
        mapping.write(b"end", 9 * PAGE - 3)
    assert path.read_bytes()[-3:] == b"end"


@pytest.mark.parametrize("source", [None, "/dev/zero"])
@pytest.mark.parametrize("sharing", ["shared", "private"])
def test_memory_of_no_file_grows_again_and_again(source: str | None, sharing: str) -> None:
    expected = np.zeros(0, "u1")
    with quire.map(source, PAGE, sharing=sharing, protection="rw") as mapping:
        # Something behind it now and then: it has to move.
        behind = []
        for pages in range(1, 40):
            mapping.resize(pages * PAGE)
            new = np.full(PAGE, pages % 251, "u1")
            mapping.write(new, (pages - 1) * PAGE)
            expected = np.concatenate([expected, new])
            if pages % 3 == 0:
                behind.append(quire.map(size=PAGE, sharing="private"))
            assert mapping.read() == expected.tobytes()
        mapping.resize(2 * PAGE + 5)
        mapping.resize(4 * PAGE)
        assert mapping.read(0, 2 * PAGE) == expected[: 2 * PAGE].tobytes()
        assert mapping.read(3 * PAGE) == bytes(PAGE)


def test_parts_move_with_shared_memory() -> None:
    with quire.map(size=4 * PAGE, sharing="shared") as mapping:
        mapping.array[:] = 7
        mapping.resize(6 * PAGE)
        mapping.protect("r", PAGE, PAGE)
        mapping.unmap(3 * PAGE, PAGE)
        start = mapping.address
        behind = start + mapping.size_bytes  # taken, by this or by what is there already
        with contextlib.suppress(quire.Error):
            held = quire.map(
                size=PAGE,
                sharing="private",
                address=behind,
                flags=quire.MapFlag.FIXED_NOREPLACE,
            )
        mapping.resize(2000 * PAGE)
        assert mapping.address != start
        assert mapping.read(2 * PAGE, 1) == b"\7"
        assert mapping.write(b"\3", 1999 * PAGE) == 1
        for offset, error in ((PAGE, quire.ProtectionError), (3 * PAGE, quire.PageIOError)):
            with pytest.raises(error):
                mapping.write(b"x", offset)
        assert mapping.read(PAGE, 1) == b"\7"
        held.close()


def test_what_is_cut_off_takes_its_holes_along() -> None:
    with quire.map(size=8 * PAGE, sharing="private") as mapping:
        mapping.array[:] = 5
        mapping.unmap(6 * PAGE, PAGE)
        mapping.protect("r", 7 * PAGE, PAGE)
        mapping.resize(4 * PAGE)
        mapping.resize(8 * PAGE)
        assert mapping.read(4 * PAGE) == bytes(4 * PAGE)
        assert touch(mapping.array, 7 * PAGE + 1, 9) == 9


if __name__ == "__main__":
    children.main()
