"""The pmap ladder as found here is what the kernel allows, and says why when it is not."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

import quire
from quire import _core
from quire.testing import children
from quire.testing.pmaps import working_pmaps

LADDER = ["uffd", "inline", "guard", "mprotect", "soft"]
MADV_GUARD_INSTALL = 102
SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}[os.uname().machine]
UFFD_USER_MODE_ONLY = 1


def kernel_gives_userfaultfd(flags: int) -> bool:
    """Asks the kernel itself, by the bare system call."""
    descriptor = ctypes.CDLL(None).syscall(SYS_USERFAULTFD, flags | os.O_CLOEXEC)
    if descriptor >= 0:
        os.close(descriptor)
    return bool(descriptor >= 0)


def kernel_gives_guard_pages() -> bool:
    """Asks the kernel itself to guard a page of a memory file."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    descriptor = os.memfd_create("probe")
    try:
        os.ftruncate(descriptor, mmap.PAGESIZE)
        with mmap.mmap(descriptor, mmap.PAGESIZE) as page:
            holder = ctypes.c_char.from_buffer(page)
            address = ctypes.addressof(holder)
            del holder
            return bool(madvise(address, mmap.PAGESIZE, MADV_GUARD_INSTALL) == 0)
    finally:
        os.close(descriptor)


def test_what_the_kernel_allows_works() -> None:
    allowed = [("uffd", kernel_gives_userfaultfd(0))]
    allowed += [("inline", kernel_gives_userfaultfd(UFFD_USER_MODE_ONLY))]
    allowed += [("guard", kernel_gives_guard_pages()), ("mprotect", True)]
    assert working_pmaps() == [name for name, works in allowed if works]


def test_root_has_more_than_everybody() -> None:
    expected = ["uffd", "inline", "mprotect"] if os.geteuid() == 0 else ["inline", "mprotect"]
    assert set(working_pmaps()) >= set(expected)


def test_the_ladder_explains_itself() -> None:
    ladder = _core.probe()
    assert [rung["name"] for rung in ladder] == LADDER
    assert [rung["name"] for rung in ladder if rung["default"]] == working_pmaps()[:1]
    for rung in ladder:
        assert rung["reason"]
        assert rung["pointer"] is (rung["name"] != "soft")
        assert bool(rung["remedy"]) is not rung["works"]


def test_a_pmap_that_does_not_work_is_refused_with_its_reason(rows_file: Path) -> None:
    for rung in _core.probe():
        if not rung["works"]:
            with pytest.raises(quire.PmapError) as refused:
                quire.open(rows_file, pmap=str(rung["name"]))
            assert str(rung["remedy"]) in str(refused.value)
    own = "uffd, inline, guard, mprotect, soft"
    for asked in (quire.open, lambda path, pmap: quire.concatenate([path], pmap=pmap)):
        with pytest.raises(quire.PmapError, match=f"no pmap 'mmu'; there are: {own}, kernel"):
            asked(rows_file, pmap="mmu")
    with pytest.raises(quire.PmapError, match=f'no pmap "mmu"; there are: {own} '):
        quire.anonymous(4096, pmap="mmu")


def test_all_at_once(rows: np.ndarray, rows_file: Path) -> None:
    mappings = [quire.open(rows_file, pmap=pmap) for pmap in working_pmaps() * 2]
    for mapping in mappings:
        with mapping:
            assert np.array_equal(mapping.array, rows)


def takers_of_map_entries() -> list[tuple[str, str]]:
    """Pmaps, and modes in which their pages have protections of their own."""
    pairs = [("guard", "r+"), ("mprotect", "r"), ("mprotect", "r+")]
    return [pair for pair in pairs if pair[0] in working_pmaps()]


def child_runs_out_of_map_entries(pmap: str, mode: str, folder: str) -> None:
    """Nearly all map entries of the process are taken; every byte is right all the same."""
    path = Path(folder) / "content"
    model = np.random.default_rng(3).integers(0, 1 << 40, (1 << 23) // 8)
    model.tofile(path)
    free = 200
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    with quire.open(path, dtype="i8", mode=mode, pmap=pmap, granule="4 KiB") as mapping:
        array = mapping.array
        assert array[0] == model[0]
        taken = mmap.mmap(-1, limit * mmap.PAGESIZE, prot=mmap.PROT_READ)
        holder = np.frombuffer(taken, "u1")
        protect = ctypes.CDLL(None).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        used = len(Path("/proc/self/maps").read_text().splitlines())
        for number in range((limit - used - free) // 2):
            at = holder.ctypes.data + (2 * number + 1) * mmap.PAGESIZE
            assert protect(at, mmap.PAGESIZE, 0) == 0
        order = np.random.default_rng(4).permutation(len(model) // 512)
        for page in order:
            assert array[page * 512] == model[page * 512]
            if mode == "r+" and page % 2:
                array[page * 512] += 1
                model[page * 512] += 1
        assert np.array_equal(array, model)
        mapping.sync()
        assert mapping.failed is None
        assert mapping.statistics().errors == 0
        assert mapping.statistics().evictions > len(order) // 4
        del array
    assert np.array_equal(np.fromfile(path, "i8"), model)


@pytest.mark.parametrize(("name", "mode"), takers_of_map_entries())
def test_few_map_entries_are_left(name: str, mode: str, tmp_path: Path) -> None:
    children.run(child_runs_out_of_map_entries, name, mode, tmp_path).check()


def stray_write(mapping: quire.Mapping, offset: int) -> None:
    """By code that asks nobody."""
    ctypes.memset(mapping.address + offset, 1, 1)
    for _ in range(1000):
        mapping.statistics()


@pytest.mark.parametrize("warm", [True, False])
def test_a_stray_write_is_told(pmap: str, warm: bool, rows: np.ndarray, rows_file: Path) -> None:
    content = rows_file.read_bytes()
    with quire.open(rows_file, dtype="u1", shape=-1, pmap=pmap, granule="4 KiB") as mapping:
        ctypes.string_at(mapping.address, len(content) if warm else 1)
        with pytest.raises(quire.ProtectionError, match="read-only"):
            stray_write(mapping, len(content) // 2)
        assert mapping.failed is not None
    assert rows_file.read_bytes() == content


if __name__ == "__main__":
    children.main()
