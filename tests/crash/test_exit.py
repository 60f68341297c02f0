"""An interpreter that ends with dirty mappings writes them back, or says why not."""

from __future__ import annotations

import errno
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

import quire
from quire import _core
from quire._api import find_layout
from quire.creation import RawShape
from quire.testing import children
from quire.testing.pmaps import writable_pmaps

SIZE = 1 << 20
KEPT: list[object] = []


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of zeros."""
    (tmp_path / "array.bin").write_bytes(bytes(SIZE))
    return tmp_path / "array.bin"


@pytest.fixture(params=writable_pmaps())
def pmap(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def open_array(path: str, pmap: str) -> quire.Mapping:
    """Maps with room for a quarter."""
    return quire.open(path, mode="r+", dtype="u4", pmap=pmap, budget="256 KiB", granule="16 KiB")


def fill(mapping: quire.Mapping) -> None:
    """Writes all of it."""
    array = mapping.array
    array[:] = np.arange(1, len(array) + 1)


def check_filled(path: Path) -> None:
    """All that `fill` wrote is in the file."""
    assert np.array_equal(np.fromfile(path, "u4"), np.arange(1, SIZE // 4 + 1))


def child_ends(path: str, pmap: str) -> None:
    """Holds its mapping, and a view of it, to the end."""
    mapping = open_array(path, pmap)
    fill(mapping)
    KEPT.extend([mapping, mapping.array[5:]])


def child_raises(path: str, pmap: str) -> None:
    """Ends by an exception that nobody catches."""
    child_ends(path, pmap)
    raise ZeroDivisionError("made up")


def child_leaves(path: str, pmap: str) -> None:
    """Leaves by `sys.exit` within a `with` block, while another thread reads."""
    with open_array(path, pmap) as mapping:
        fill(mapping)
        threading.Thread(target=mapping.array.sum, daemon=True).start()
        raise SystemExit(3)


def child_interrupted(path: str, pmap: str) -> None:
    """Ends by Ctrl-C."""
    child_ends(path, pmap)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("child", "status", "said"),
    [
        (child_ends, 0, ""),
        (child_raises, 1, "ZeroDivisionError: made up"),
        (child_leaves, 3, ""),
        (child_interrupted, -signal.SIGINT, "KeyboardInterrupt"),
    ],
)
def test_it_writes_back(child, status: int, said: str, path: Path, pmap: str) -> None:
    ended = children.run(child, path, pmap)
    assert ended.status == status, ended.errors
    assert said in ended.errors
    assert "SyncError" not in ended.errors
    assert "Exception ignored" not in ended.errors
    check_filled(path)


def child_view_goes_last(path: str, pmap: str) -> None:
    """The mapping is left while a view lives; its end writes back."""
    with open_array(path, pmap) as mapping:
        view = mapping.array
    view[:] = np.arange(1, len(view) + 1)
    assert not mapping.closed
    del view
    assert mapping.closed
    check_filled(Path(path))
    with open_array(path, pmap) as mapping:
        view = mapping.array
    del mapping
    view[:] = 7
    del view
    assert (np.fromfile(path, "u4") == 7).all()
    nameless = open_array(path, pmap).array
    nameless[:] = 8
    del nameless
    assert (np.fromfile(path, "u4") == 8).all()


def test_the_last_view_writes_back(path: Path, pmap: str) -> None:
    children.run(child_view_goes_last, path, pmap).check()


def map_faulty(path: str, pmap: str, **plan: object) -> quire.Mapping:
    """A mapping of a file that cannot be written, and its first byte written."""
    store = _core.open_faulty(_core.open_file(path, True), code="io", **plan)  # type: ignore[arg-type]
    mapping = quire.Mapping(
        store, find_layout(store, RawShape("u4")), pmap=pmap, mode="r+", granule_bytes=4096
    )
    mapping.array[0] = 9
    return mapping


def child_cannot_sync(path: str, other: str, pmap: str) -> None:
    """One of its mappings cannot be synced at the end, the other can."""
    KEPT.append(map_faulty(path, pmap, operation="write", errno=errno.ENOSPC))
    good = open_array(other, pmap)
    fill(good)
    KEPT.append(good)


def test_what_cannot_be_written_is_told_at_exit(path: Path, pmap: str, tmp_path: Path) -> None:
    other = tmp_path / "other.bin"
    other.write_bytes(bytes(SIZE))
    ended = children.run(child_cannot_sync, path, other, pmap)
    assert ended.status == 0, ended.errors
    assert "quire.errors.SyncError" in ended.errors or "quire.SyncError" in ended.errors
    assert "ENOSPC" in ended.errors
    assert str(path) in ended.errors
    assert "Fatal" not in ended.errors
    check_filled(other)


def child_last_view_cannot_write(path: str, pmap: str) -> None:
    """Nobody can be told but `sys.unraisablehook`."""
    with map_faulty(path, pmap, operation="write", count=3, errno=errno.ENOSPC) as mapping:
        view = mapping.array
        for _ in range(2):
            try:
                mapping.sync()
            except quire.SyncError as error:
                print(error.errno == errno.ENOSPC)
        try:
            mapping.sync()
        except quire.SyncError:
            print("third")
    view[0] = 10
    del view
    print(mapping.closed, np.fromfile(path, "u4")[0])


def test_an_end_after_failures_writes_back(path: Path, pmap: str) -> None:
    output = children.run(child_last_view_cannot_write, path, pmap).check()
    assert output == "True\nTrue\nthird\nTrue 10\n"


def child_view_of_a_store_that_fails(path: str, pmap: str) -> None:
    """The data are lost, which is said."""
    mapping = map_faulty(path, pmap, operation="write", errno=errno.EIO)
    view = mapping.array
    mapping.unmap_when_idle()
    del view
    print(mapping.closed)


def test_a_view_that_goes_over_a_store_that_fails_is_told(path: Path, pmap: str) -> None:
    ended = children.run(child_view_of_a_store_that_fails, path, pmap)
    assert (ended.status, ended.output) == (0, "True\n"), ended.errors
    assert "SyncError" in ended.errors
    assert "EIO" in ended.errors


if __name__ == "__main__":
    children.main()
