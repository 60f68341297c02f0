"""Block devices, and pages that a disk refuses."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

import quire
from quire.testing.touches import touch

PAGE = mmap.PAGESIZE


def touch_pages(array: np.ndarray, count: int) -> None:
    for page in range(count):
        touch(array, page * PAGE, 1)


def test_a_block_device_says_how_long_it_is(loop_device: tuple[str, Path]) -> None:
    device, image = loop_device
    with quire.map(device, sharing="shared", protection="rw") as mapping:
        assert len(mapping) == 1 << 20
        assert int(mapping.array.sum()) == 3 << 20
        mapping.array[5] = 9
        mapping.sync()
        assert image.read_bytes()[:7] == b"\3\3\3\3\3\x09\3"
    with quire.map(device, sharing="private", offset=(1 << 20) - 10) as mapping:
        assert mapping.read() == b"\3" * 10
    with pytest.raises(ValueError, match="has 1048576 bytes"):
        quire.map(device, sharing="shared", offset=(1 << 20) + 1)


def test_beyond_the_end_of_a_device_is_an_exception(loop_device: tuple[str, Path]) -> None:
    with quire.map(loop_device[0], (1 << 20) + PAGE, sharing="shared") as mapping:
        assert touch(mapping.array, (1 << 20) - 1) == 3
        with pytest.raises(quire.PageIOError) as caught:
            touch(mapping.array, 1 << 20)
        assert caught.value.offset == 1 << 20
        assert caught.value.source == loop_device[0]


def test_an_error_of_the_disk_is_an_exception(loop_device: tuple[str, Path]) -> None:
    """What is behind the device goes: reads that are not cached fail with EIO."""
    device, image = loop_device
    with quire.map(device, sharing="shared") as mapping:
        array = mapping.array
        os.truncate(image, 1 << 18)
        subprocess.run(["blockdev", "--flushbufs", device], check=True)
        with pytest.raises(quire.PageIOError, match="file or device") as caught:
            touch(array, 1 << 19)
        assert caught.value.errno == errno.EIO
        with pytest.raises(quire.PageIOError):
            mapping.read(1 << 19, 1)
        assert touch(array, 5) == 3
        os.truncate(image, 1 << 20)
        assert touch(array, 1 << 19) == 0
        assert mapping.failed is None


def test_a_hole_on_a_full_disk_is_an_exception(small_disk: Path) -> None:
    path, ballast = small_disk / "sparse", small_disk / "ballast"
    with path.open("wb") as file:
        file.truncate(4 << 20)
    with quire.map(path, sharing="shared", protection="rw") as mapping:
        array = mapping.array
        assert touch(array, 0, 1) == 1
        ballast.write_bytes(bytes((1 << 20) - 2 * PAGE))
        with pytest.raises(quire.PageIOError, match="no room for this page") as caught:
            touch_pages(array, 16)
        assert caught.value.errno == errno.ENOSPC
        assert isinstance(mapping.failed, quire.PageIOError)
        ballast.unlink()
        assert mapping.failed is None
        assert touch(array, 9 * PAGE, 8) == 8
    assert path.read_bytes()[9 * PAGE] == 8


def test_a_full_disk_is_named_where_the_page_itself_could_be_had(small_ext4: Path) -> None:
    """A store has blocks for all of a large folio, and one page of it may still have room."""
    path, size = small_ext4 / "sparse", 64 << 20
    path.touch()
    os.truncate(path, size)
    with quire.map(path, sharing="shared", protection="rw") as mapping:
        for _ in range(3):
            with pytest.raises(quire.PageIOError, match="no room for this page") as caught:
                mapping.write(b"x" * size)
            assert caught.value.errno == errno.ENOSPC
            os.truncate(path, 0)
            os.truncate(path, size)
            assert mapping.failed is None


def test_noexec_is_named(small_disk: Path) -> None:
    path = small_disk / "code"
    path.write_bytes(bytes(PAGE))
    subprocess.run(["mount", "-o", "remount,noexec", str(small_disk)], check=True)
    with pytest.raises(quire.Error, match="mounted noexec") as caught:
        quire.map(path, sharing="private", protection="rx")
    assert caught.value.errno == errno.EPERM


def test_a_mapping_at_address_zero_is_none_of_others(loop_device: tuple[str, Path]) -> None:
    """What is closed has no address, not that one."""
    _, image = loop_device
    lowest = Path("/proc/sys/vm/mmap_min_addr")
    before = lowest.read_text()
    lowest.write_text("0")
    try:
        mapping = quire.map(size=4096, sharing="private", address=0, flags=quire.MapFlag.FIXED)
        mapping.write(b"\5\5", 0)
        other = quire.map(image, sharing="shared")
        other.close()
        assert other.closed
        assert other.size_bytes == 0
        del other
        assert not mapping.closed
        assert mapping.read(0, 2) == b"\5\5"
        mapping.close()
    finally:
        lowest.write_text(before)
