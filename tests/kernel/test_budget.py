"""Budgets over files that the kernel pages, also under a memory limit of a control group."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import quire
from quire.testing import children
from quire.testing.cgroups import MemoryGroup, NoGroupError, memory_group
from quire.testing.waiting import wait_until
from quire.tools.commands import doctor

PAGE = mmap.PAGESIZE
SIZE = 64 << 20
BUDGET = 8 << 20
GROUP_LIMIT = 128 << 20
GROUP_BUDGET = 64 << 20
# Page tables and what the interpreter itself takes meanwhile.
BESIDE = 4 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "large.bin"
    np.random.default_rng(3).integers(0, 1 << 60, SIZE // 8).tofile(found)
    with found.open("rb") as file:
        os.fsync(file.fileno())
    return found


@pytest.mark.parametrize("cache", ["keep", "drop"])
@pytest.mark.parametrize("protection", ["r", "rw"])
def test_a_budget_is_kept_and_nothing_is_lost(path: Path, cache: str, protection: str) -> None:
    model = np.fromfile(path, "i8")
    with quire.map(
        path, sharing="shared", protection=protection, dtype="i8", budget=BUDGET, cache=cache
    ) as mapping:
        assert mapping.budget_bytes == BUDGET
        array = mapping.array
        for _ in range(3):
            assert np.array_equal(array, model)
            if protection == "rw":
                array[::512] += 1
                model[::512] += 1
        wait_until(lambda: mapping.statistics().resident_bytes <= BUDGET, "it falls to the budget")
        if cache == "drop":
            wait_until(
                lambda: int(mapping.residency().count(1)) * PAGE <= BUDGET,
                "the page cache falls to the budget",
            )
        assert mapping.statistics().evicted_bytes >= SIZE - BUDGET
        assert np.array_equal(array, model)
    assert np.array_equal(np.fromfile(path, "i8"), model)


def test_a_budget_is_kept_while_threads_touch(path: Path) -> None:
    """A thread uses a part all the time, and another scans the rest."""
    with quire.map(path, sharing="shared", dtype="i8", budget=BUDGET) as mapping:
        array, stop = mapping.array, threading.Event()

        def use() -> None:
            while not stop.is_set():
                int(array[: (1 << 20) // 8].sum())

        user = threading.Thread(target=use)
        user.start()
        for _ in range(4):
            for first in range(len(array) // 2, len(array), 1 << 17):
                int(array[first : first + (1 << 17)].sum())
        wait_until(lambda: mapping.statistics().evicted_bytes > 0, "the scan is over the budget")
        wait_until(lambda: mapping.statistics().resident_bytes <= BUDGET, "it is kept")
        assert int(array[: (1 << 20) // 8].sum()) == int(np.fromfile(path, "i8", 1 << 17).sum())
        stop.set()
        user.join()


def test_what_has_no_other_home_has_no_budget(path: Path) -> None:
    with pytest.raises(ValueError, match="no other home"):
        quire.map(size=SIZE, sharing="private", budget=BUDGET)
    with pytest.raises(ValueError, match="no other home"):
        quire.map(path, sharing="private", protection="rw", budget=BUDGET)
    with quire.map(path, sharing="private", budget=BUDGET) as mapping:
        mapping.set_budget(None)
        with pytest.raises(ValueError, match='"keep" or "drop"'):
            mapping.set_budget(BUDGET, cache="clean")
        with pytest.raises(ValueError, match="some"):
            mapping.set_budget(0)


def test_private_pages_that_were_stored_to_are_not_bounded(path: Path) -> None:
    """Not even while they are protected: taking them away would lose what they hold."""
    with quire.map(path, sharing="private", protection="r", budget=BUDGET) as mapping:
        for part in (None, PAGE):
            with pytest.raises(ValueError, match="with a budget cannot be made writable"):
                mapping.protect("rw", 0, part)
        assert mapping.protection == "r"
        mapping.protect("none", 0, PAGE)
        mapping.set_budget(None)
        mapping.protect("rw", 0, PAGE)
        mapping.protect("r")
        with pytest.raises(ValueError, match="is or was writable"):
            mapping.set_budget(BUDGET)
    with quire.map(path, sharing="private", protection="rw") as mapping:
        mapping.array[:] = 9
        mapping.protect("r")
        rest = mapping.split(SIZE // 2)
        for half in (mapping, rest):
            with pytest.raises(ValueError, match="is or was writable"):
                half.set_budget(BUDGET)
            assert int((half.array != 9).sum()) == 0
        rest.close()


def test_both_halves_keep_the_budget(path: Path) -> None:
    mapping = quire.map(path, sharing="shared", budget=BUDGET, cache="drop")
    mapping.advise("sequential")
    with mapping, mapping.split(SIZE // 2) as rest:
        assert rest.budget_bytes == mapping.budget_bytes == BUDGET
        model = np.fromfile(path, "i8")[SIZE // 2 // 8 :]
        assert walk(rest.array.view("i8")) == total(model)
        wait_until(
            lambda: int(rest.residency().count(1)) * PAGE <= BUDGET,
            "the page cache falls to the budget",
        )
        assert rest.statistics().evicted_bytes > 0
        assert "sr" in flags_of(rest.address)  # the program's own advice


@pytest.fixture
def large_device(tmp_path: Path) -> Iterator[str]:
    """A block device of 32 MiB of fives."""
    image = tmp_path / "large-image"
    image.write_bytes(b"\5" * (32 << 20))
    command = ["losetup", "--find", "--show", str(image)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.parametrize("cache", ["keep", "drop"])
def test_a_block_device_has_a_budget(large_device: str, cache: str) -> None:
    with quire.map(
        large_device, sharing="shared", protection="rw", budget=BUDGET, cache=cache
    ) as mapping:
        array = mapping.array
        array[::PAGE] = 6
        assert int((array[::PAGE] != 6).sum()) == 0
        wait_until(lambda: mapping.statistics().resident_bytes <= BUDGET, "it falls to the budget")
        assert mapping.statistics().evicted_bytes > 0
        if cache == "drop":
            wait_until(
                lambda: int(mapping.residency().count(1)) * PAGE <= BUDGET,
                "the page cache falls to the budget",
            )
        assert int((array != 5).sum()) == len(array) // PAGE


def test_what_was_cached_before_the_budget_is_dropped_with_it(path: Path) -> None:
    """By the call itself: touches of what is cached bring 16 pages each, faster than looks."""
    with path.open("rb") as file:
        while file.read(1 << 20):
            pass
    with quire.map(path, sharing="shared", protection="rw") as mapping:
        mapping.array[:] = 3
        assert mapping.residency().count(1) * PAGE == SIZE
        mapping.set_budget(BUDGET, cache="drop")
        assert mapping.residency().count(1) * PAGE <= BUDGET
        assert int((mapping.array != 3).sum()) == 0


@pytest.mark.parametrize("cache", ["keep", "drop"])
def test_locked_pages_stay_and_the_rest_keeps_the_budget(path: Path, cache: str) -> None:
    """More is locked than the budget: what cannot be taken is not taken for gone, look by look."""
    with quire.map(path, sharing="shared", budget="4 MiB", cache=cache) as mapping:
        mapping.lock(0, 8 << 20)
        mapping.array.sum()
        trimmed = [-1]

        def is_settled() -> bool:
            trimmed.append(mapping.statistics().evicted_bytes)
            return len(trimmed) > 20 and trimmed[-20] == trimmed[-1]

        wait_until(is_settled, "nothing more is taken")
        assert 8 << 20 <= mapping.statistics().resident_bytes <= 12 << 20
        mapping.unlock(0, 8 << 20)
        mapping.array[::4096].sum()
        wait_until(lambda: mapping.statistics().resident_bytes <= 4 << 20, "all keeps the budget")


def test_memory_of_a_device_has_no_budget() -> None:
    with (
        quire.map("/dev/zero", BUDGET, sharing="private") as mapping,
        pytest.raises(ValueError, match="for this device"),
    ):
        mapping.set_budget(PAGE)


def child_without_pagemap_scan(path: str) -> None:
    """As on Linux before 6.7: refuses a budget, and leaves reading ahead as the kernel has it."""
    with quire.map(path, sharing="shared") as mapping:
        with pytest.raises(quire.PmapError, match="has no PAGEMAP_SCAN, which came with Linux"):
            mapping.set_budget(BUDGET)
        assert mapping.budget_bytes == (1 << 64) - 1
        assert int(mapping.array[0]) == Path(path).read_bytes()[0]
        flags = flags_of(mapping.address)
        assert "rr" not in flags, flags
    with pytest.raises(quire.PmapError, match="has no PAGEMAP_SCAN"):
        quire.map(path, sharing="shared", budget=BUDGET)
    assert "quire-kernel" not in names_of_threads()
    print(doctor.examine()["kernel_unwatched"])


def flags_of(address: int) -> list[str]:
    """The flags of the map entry at an address; "rr" is MADV_RANDOM (proc_pid_smaps(5))."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        entry = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if entry:
            here = int(entry[1], 16) <= address < int(entry[2], 16)
        elif here and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise LookupError(f"{address:x}")


def names_of_threads() -> set[str]:
    return {(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}


# Refuses one ioctl, for those who ask the C library.
OLDER = """
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <unistd.h>
int ioctl(int fd, unsigned long request, ...) {
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    if ((unsigned)request == 0xc0606610u) {
        errno = ENOTTY;
        return -1;
    }
    return syscall(SYS_ioctl, fd, request, argument);
}
"""


def test_without_pagemap_scan_nothing_is_promised(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, library = tmp_path / "older.c", tmp_path / "older.so"
    source.write_text(OLDER)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    ended = children.run(child_without_pagemap_scan, path)
    assert "Linux 6.7" in ended.check()


@pytest.fixture
def group_of() -> Iterator[Callable[[], MemoryGroup]]:
    """Makes control groups with a limit, which end with the test."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(memory_group(GROUP_LIMIT))
        except NoGroupError as error:
            pytest.skip(f"a real limit of memory cannot be had: {error}")
        yield lambda: stack.enter_context(memory_group(GROUP_LIMIT))


def child_reads_under_a_limit(path: str, folder: str, version: str, kind: str) -> None:
    """Reads all of a file and rows of it, in the group."""
    size = Path(path).stat().st_size
    MemoryGroup(Path(folder), int(version)).enter()
    if kind == "quire":
        array = quire.map(
            path, sharing="shared", dtype="i8", budget=GROUP_BUDGET, cache="drop"
        ).array
    else:
        array = np.asarray(np.memmap(path, "i8", "r"))
    found = walk(array)
    for row in np.random.default_rng(5).integers(0, size // 4096, 300):
        found += int(array[row * 512] & 1)
    print(found)


def test_a_group_never_has_more_than_the_budget(
    tmp_path: Path, group_of: Callable[[], MemoryGroup]
) -> None:
    """A file four times the group's limit: quire's part stays small, the memmap's fills it."""
    path = tmp_path / "four-times.bin"
    with path.open("wb") as file:
        piece = np.random.default_rng(1).integers(0, 1 << 60, 1 << 20)
        for _ in range(64):
            piece.tofile(file)
        os.fsync(file.fileno())
    found = {}
    for kind in ("quire", "memmap"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        group = group_of()
        ended = children.run(child_reads_under_a_limit, path, group.path, group.version, kind)
        found[kind] = int(ended.check()), group.peak_bytes
    assert found["quire"][0] == found["memmap"][0]
    assert found["memmap"][1] > 100 << 20
    assert found["quire"][1] <= GROUP_BUDGET + BESIDE, found


def test_files_in_memory_have_no_budget(small_disk: Path) -> None:
    path = small_disk / "in-memory.bin"
    path.write_bytes(b"\1" * PAGE)
    with pytest.raises(ValueError, match="no other home"):
        quire.map(path, sharing="shared", budget=PAGE)
    descriptor = os.memfd_create("quire-test")
    os.truncate(descriptor, SIZE)
    with pytest.raises(ValueError, match="no other home"):
        quire.map(descriptor, sharing="shared", budget=BUDGET, cache="drop")
    os.close(descriptor)


def total(array: np.ndarray) -> int:
    """The sum, without what does not fit."""
    return int(array.sum()) & 0xFFFF


def walk(array: np.ndarray) -> int:
    """As `total`, a piece after the other."""
    return sum(total(array[at : at + (1 << 15)]) for at in range(0, len(array), 1 << 15)) & 0xFFFF


def test_a_mapping_changes_under_a_budget_that_drops(path: Path) -> None:
    """Resized, with a hole, protected and split, while leashes have split its map entries."""
    model = np.fromfile(path, "i8")
    half = SIZE // 2
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    mapping = quire.map(path, half, sharing="shared", budget=BUDGET, cache="drop")
    assert walk(mapping.array.view("i8")) == total(model[: half // 8])
    mapping.resize(SIZE)
    array = mapping.array.view("i8")
    assert walk(array) == total(model)
    mapping.unmap(0, PAGE)
    mapping.protect("none", PAGE, PAGE)
    assert walk(array[2 * PAGE // 8 :]) == total(model[2 * PAGE // 8 :])
    with pytest.raises(quire.Error):
        int(array[0])
    del array
    rest = mapping.split(half)
    assert walk(rest.array.view("i8")) == total(model[half // 8 :])
    rest.close()
    mapping.close()


def test_a_file_truncated_under_a_budget_raises_and_heals(path: Path) -> None:
    model = np.fromfile(path, "i8")
    with quire.map(path, sharing="shared", dtype="i8", budget=BUDGET, cache="drop") as mapping:
        array = mapping.array
        assert walk(array) == total(model)
        os.truncate(path, SIZE // 4)
        with pytest.raises(quire.TruncatedError):
            walk(array)
        os.truncate(path, SIZE)
        assert walk(array) == total(model[: SIZE // 4 // 8])


def child_forks_under_a_budget(path: str) -> None:
    """A forked child walks on, within its budget, and its parent too."""
    expected = total(np.fromfile(path, "i8"))
    mapping = quire.map(path, sharing="shared", dtype="i8", budget=BUDGET, cache="drop")
    assert walk(mapping.array) == expected
    child = os.fork()
    assert walk(mapping.array) == expected
    wait_until(lambda: mapping.statistics().resident_bytes <= BUDGET, "it falls to the budget")
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_forked_child_keeps_the_budget(path: Path) -> None:
    children.run(child_forks_under_a_budget, path).check()


def fill(folder: Path) -> Path:
    """A file that takes all the room there is."""
    path = folder / "ballast"
    room = os.statvfs(folder)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize)
    return path


def stored_to_a_disk_that_refuses(
    disk: tuple[Path, Path], **budget: str | int
) -> tuple[quire.KernelMapping, Path]:
    """A mapping of 16 MiB of sevens of which a disk has taken nothing, and what fills the disk."""
    path = disk[0] / "stored.bin"
    with path.open("wb") as file:
        file.truncate(16 << 20)
        os.fsync(file.fileno())
    os.sync()
    ballast = fill(disk[1])
    mapping = quire.map(path, sharing="shared", protection="rw", **budget)
    array = mapping.array
    for at in range(0, len(array), 1 << 20):
        array[at : at + (1 << 20)] = 7
    return mapping, ballast


def sync_until_it_succeeds(mapping: quire.KernelMapping) -> None:
    """The kernel tells of what was before, up to once for each place in which it notes errors."""
    for _ in range(3):
        with contextlib.suppress(quire.SyncError):
            return mapping.sync()
    return mapping.sync()


def read_past_the_cache(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return np.fromfile(file, "u1")


def test_what_a_disk_refuses_is_kept_and_told(failing_disk: tuple[Path, Path]) -> None:
    """By the mapping, by every sync and by close, until the disk takes it."""
    mapping, ballast = stored_to_a_disk_that_refuses(failing_disk, budget="2 MiB", cache="drop")
    wait_until(lambda: mapping.failed, "writing back has failed")
    assert isinstance(mapping.failed, quire.SyncError)
    assert mapping.failed.errno in (errno.EIO, errno.ENOSPC)
    assert mapping.failed.offset < 16 << 20
    with pytest.raises(quire.SyncError):
        mapping.check()
    for asynchronous in (True, False, False):
        with pytest.raises(quire.SyncError, match="kept in memory") as caught:
            mapping.sync(asynchronous=asynchronous)
        assert caught.value.errno in (errno.EIO, errno.ENOSPC)
    with pytest.raises(quire.SyncError):
        mapping.close()
    ballast.unlink()
    sync_until_it_succeeds(mapping)
    assert mapping.failed is None
    wait_until(lambda: mapping.residency().count(1) * PAGE <= 2 << 20, "the budget is kept again")
    assert int((mapping.array != 7).sum()) == 0
    mapping.close()
    assert int((read_past_the_cache(failing_disk[0] / "stored.bin") != 7).sum()) == 0


def test_a_failure_that_nobody_asked_for_is_raised_once_more(
    failing_disk: tuple[Path, Path],
) -> None:
    """The first sync after it raises although the disk takes all by then."""
    mapping, ballast = stored_to_a_disk_that_refuses(failing_disk, budget="2 MiB", cache="drop")
    wait_until(lambda: mapping.failed, "writing back has failed")
    ballast.unlink()
    with pytest.raises(quire.SyncError):
        mapping.close()
    sync_until_it_succeeds(mapping)
    mapping.close()
    assert int((read_past_the_cache(failing_disk[0] / "stored.bin") != 7).sum()) == 0


@pytest.mark.parametrize("budget", [{}, {"budget": "2 MiB", "cache": "keep"}])
def test_a_sync_that_failed_can_be_repeated(
    failing_disk: tuple[Path, Path], budget: dict[str, str | int]
) -> None:
    """The kernel takes the pages for clean after the first one, and would write nothing."""
    mapping, ballast = stored_to_a_disk_that_refuses(failing_disk, **budget)
    for _ in range(2):
        with pytest.raises(quire.SyncError):
            mapping.sync()
    assert isinstance(mapping.failed, quire.SyncError)
    ballast.unlink()
    with contextlib.suppress(quire.SyncError):
        mapping.sync()
    mapping.sync()
    assert mapping.failed is None
    mapping.close()
    assert int((read_past_the_cache(failing_disk[0] / "stored.bin") != 7).sum()) == 0


def test_what_could_not_be_written_can_be_given_up(failing_disk: tuple[Path, Path]) -> None:
    mapping, _ = stored_to_a_disk_that_refuses(failing_disk)
    with pytest.raises(quire.SyncError):
        mapping.sync()
    with pytest.raises(quire.SyncError):
        mapping.close()
    assert not mapping.closed
    mapping.close(discard=True)
    assert mapping.closed


def test_threads_walk_and_write_under_a_budget_that_drops(path: Path) -> None:
    model = np.fromfile(path, "i8")
    with quire.map(
        path, sharing="shared", protection="rw", dtype="i8", budget=BUDGET, cache="drop"
    ) as mapping:
        parts, failed = np.split(mapping.array, 4), []

        def work(part: np.ndarray) -> None:
            try:
                for _ in range(2):
                    for first in range(0, len(part), 1 << 15):
                        part[first : first + (1 << 15) : 64] += 1
            except BaseException as error:
                failed.append(error)
                raise

        threads = [threading.Thread(target=work, args=(part,)) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        model[::64] += 2
        assert np.array_equal(mapping.array, model)
        del parts
    assert np.array_equal(np.fromfile(path, "i8"), model)


if __name__ == "__main__":
    children.main()
