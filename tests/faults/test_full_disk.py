"""A disk that is really full: an error says so, nothing is lost, and with room all is written."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import quire
from quire.testing import children
from quire.testing.cleaning import cleaner
from quire.testing.pmaps import writable_pmaps

MIB = 1 << 20
DISK = 16 * MIB
SIZE = 8 * MIB
BUDGET = MIB
GRANULE = 16 << 10
BLOCK = GRANULE // 8
ROOM = 2 * MIB  # on the full disk: enough for some of the pages
KINDS = ("tmpfs", "ext4", "limit")
CLEAN_MOUNT = 'umount --lazy "$1"'  # it ends with the last open file


@dataclass
class Disk:
    """A folder that takes little more until `free` is called; the errno of its refusals."""

    folder: Path
    errno: int
    free: Callable[[], object]


@contextmanager
def mounted(folder: Path, kind: str) -> Iterator[Disk]:
    """A file system of its own, nearly all of which a ballast takes."""
    point = folder / "disk"
    point.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", point]
    if kind == "ext4":
        image = folder / "image"
        image.touch()
        os.truncate(image, 2 * DISK)  # the file system's own tables and journal take some of it
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
        argv = ["mount", "-o", "loop", image, point]
    subprocess.run(argv, check=True)
    with cleaner(CLEAN_MOUNT, point):
        ballast = point / "ballast"
        free = os.statvfs(point).f_bavail * os.statvfs(point).f_bsize
        ballast.write_bytes(bytes(free - ROOM))
        yield Disk(point, errno.ENOSPC, ballast.unlink)


@contextmanager
def limited(folder: Path) -> Iterator[Disk]:
    """What an ordinary user can have: no file may grow past a limit (setrlimit(2))."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, hard))
    lift = (soft, hard)
    yield Disk(folder, errno.EFBIG, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, lift))


def disk_of(kind: str, folder: str) -> AbstractContextManager[Disk]:
    return limited(Path(folder)) if kind == "limit" else mounted(Path(folder), kind)


def numbers(block: int) -> np.ndarray:
    return np.arange(BLOCK) * 1_000_003 + block + 1


def write_until_full(
    array: np.ndarray, kind: type[quire.Error], start: int = 0
) -> tuple[int, quire.Error | None]:
    """Writes block after block; the number that are in the array, and what stopped it."""
    for block in range(start, len(array) // BLOCK):
        try:
            array[block * BLOCK : (block + 1) * BLOCK] = numbers(block)
            for _ in range(10):  # where a pending error arrives
                pass
        except kind as error:
            return block, error.with_traceback(None)
    return len(array) // BLOCK, None


def check_blocks(array: np.ndarray, count: int) -> None:
    for block in range(count):
        assert (array[block * BLOCK : (block + 1) * BLOCK] == numbers(block)).all(), block


def child_fills_store(folder: str, kind: str, pmap: str) -> None:
    with disk_of(kind, folder) as disk:
        path = disk.folder / "sparse.bin"
        make_sparse(path)
        with quire.open(
            path, mode="r+", dtype="i8", pmap=pmap, budget=BUDGET, granule=GRANULE
        ) as mapping:
            array = mapping.array
            done, error = write_until_full(array, quire.SyncError)
            assert error is not None
            assert done > BUDGET // GRANULE // 2, "as much as the budget holds goes without writing"
            for _ in range(3):
                assert (error.errno, error.source) == (disk.errno, str(path))
                assert error.offset is not None
                assert 0 <= error.offset < SIZE
                with pytest.raises(quire.SyncError) as caught:
                    mapping.sync()
                error = caught.value
            disk.free()
            mapping.sync()
            check_blocks(array, done)
            done, error = write_until_full(array, quire.SyncError, done)
            assert error is None
            del array
        written = np.fromfile(path, "i8")
        assert len(written) == SIZE // 8
        check_blocks(written, done)


def make_sparse(path: Path) -> None:
    """A file without blocks. Its length may be past the limit, which is for what grows."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits[1], limits[1]))
    path.touch()
    os.truncate(path, SIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def child_fills_swap(folder: str, kind: str, pmap: str) -> None:
    with disk_of(kind, folder) as disk:
        swap = quire.Swap(folder=str(disk.folder))
        mapping = quire.anonymous(SIZE, budget=BUDGET, granule=GRANULE, pmap=pmap, swap=swap)
        array = mapping.array.view("i8")
        done, error = write_until_full(array, quire.SwapFullError)
        assert error is not None
        assert error.errno == errno.ENOSPC
        assert "no room left" in error.message
        assert str(disk.folder) in error.message
        assert done > BUDGET // GRANULE
        disk.free()
        check_blocks(array, done)
        done, error = write_until_full(array, quire.SwapFullError, done)
        assert error is None
        check_blocks(array, done)
        assert mapping.failed is None
        del array
        mapping.close()


def pmaps_of(kind: str) -> list[str]:
    """Those of which no file grows: a memfd is one for setrlimit too."""
    names = writable_pmaps()
    return [name for name in names if kind != "limit" or name.startswith(("uffd", "inline"))]


@pytest.mark.parametrize(
    ("kind", "pmap"), [(kind, pmap) for kind in KINDS for pmap in pmaps_of(kind)]
)
@pytest.mark.parametrize("what", [child_fills_store, child_fills_swap])
def test_nothing_is_lost_on_a_full_disk(
    what: Callable[..., None], kind: str, pmap: str, tmp_path: Path
) -> None:
    if kind != "limit" and os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root; the limit of a file's length does not")
    children.run(what, tmp_path, kind, pmap).check()


if __name__ == "__main__":
    children.main()
