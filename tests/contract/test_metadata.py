"""What quire knows of pages counts in budgets, and makes no touch wait for ever."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import quire
from quire.testing import children

MIB = 1 << 20
SPARSE_BYTES = 1 << 40
# Scattered touches have `guard` mark all of a file, at 8 bytes of the kernel's for each 4 KiB.
SPARSE_BYTES_GUARD = 1 << 36
MARKS_SHARE = 512
BUDGET = 64 * MIB
TOUCHES = 20_000
# Beside the budget: the allocator's and the interpreter's own, kept buffers, and what marks chunks.
ALLOWANCE = 8 * MIB


def sparse(tmp_path: Path, size_bytes: int = SPARSE_BYTES) -> Path:
    """A file without any data."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:"))) << 10


def child_touches(path: str, pmap: str, granule: str) -> None:
    size_bytes = Path(path).stat().st_size
    with quire.open(path, dtype="u1", pmap=pmap, budget=BUDGET, granule=granule or None) as mapping:
        mapping.advise("random")
        places = np.random.default_rng(5).integers(0, size_bytes, TOUCHES)
        out = bytearray(1)
        mapping.readinto(out, 0)
        before = status_bytes("VmRSS")
        for place in places.tolist():
            mapping.readinto(out, place)
        grown = status_bytes("VmRSS") - before
        counted = mapping.statistics()
        # The page tables of the kernel are its own: up to one page for each page touched.
        kernel = status_bytes("VmPTE")
    assert counted.evictions > 0, "the budget was used up"
    held = counted.resident_bytes + counted.metadata_bytes
    assert counted.metadata_bytes > MIB
    assert held <= BUDGET, f"{held / MIB:.1f} MiB are held"
    assert grown <= BUDGET + ALLOWANCE, f"{grown / MIB:.1f} MiB of pages"
    most = size_bytes // MARKS_SHARE if pmap == "guard" else TOUCHES * 4096
    assert kernel <= most + ALLOWANCE, f"{kernel / MIB:.1f} MiB of the kernel's page tables"
    after = quire.statistics()
    assert (after.resident_bytes, after.metadata_bytes) == (0, 0)


@pytest.mark.parametrize("granule", ["", "4 KiB"])
def test_scattered_touches_keep_the_budget(pmap: str, tmp_path: Path, granule: str) -> None:
    path = sparse(tmp_path, SPARSE_BYTES_GUARD if pmap == "guard" else SPARSE_BYTES)
    children.run(child_touches, path, pmap, granule, timeout_s=100).check()


def test_the_least_budget_is_enough_for_scattered_touches(pmap: str, tmp_path: Path) -> None:
    path = sparse(tmp_path)
    with pytest.raises(quire.BudgetError) as refused:
        quire.open(path, dtype="u1", pmap=pmap, budget=1, granule="4 KiB")
    least = int(str(refused.value).split("at least ")[1].split()[0])
    with quire.open(path, dtype="u1", pmap=pmap, budget=least, granule="4 KiB") as mapping:
        mapping.advise("random")
        out = bytearray(1)
        for place in range(0, SPARSE_BYTES, SPARSE_BYTES // 200):
            mapping.readinto(out, place)
        counted = mapping.statistics()
    assert counted.resident_bytes <= least
    assert counted.faults + counted.fills > 0


def test_what_is_pinned_leaves_room_for_loads(pmap: str, tmp_path: Path) -> None:
    """Pins up to the limit, then pages whose tables take more than what the pins have left."""
    path = sparse(tmp_path)
    with quire.open(path, dtype="u1", pmap=pmap, budget="1 MiB", granule="4 KiB") as mapping:
        mapping.advise("random")
        with mapping.pin(np.s_[: MIB - 64 * 1024]):
            out = bytearray(1)
            for place in range(0, SPARSE_BYTES, SPARSE_BYTES // 200):
                mapping.readinto(out, place)
            assert mapping.resident(np.s_[: MIB - 64 * 1024]).all()


@pytest.mark.parametrize("policy", ["clock", "s3fifo", "sieve", "2q", "fifo", "lru"])
def test_metadata_follows_what_is_resident(tmp_path: Path, policy: str) -> None:
    path = tmp_path / "dense"
    np.zeros(32 * MIB, "u1").tofile(path)
    # Entries of the table, and what the policy keeps: of pages that came together it may be one.
    with quire.open(path, dtype="u1", granule="4 KiB", policy=policy, mode="r+") as mapping:
        assert mapping.statistics().metadata_bytes == 0
        mapping.prefetch().result(30)
        full = mapping.statistics().metadata_bytes
        pages = 32 * MIB // 4096
        assert pages * 4 < full <= pages * (4 + 64)
    assert mapping.statistics().metadata_bytes == 0


def test_the_table_of_swap_slots_counts(tmp_path: Path) -> None:
    swap = quire.Swap(folder=tmp_path)
    with quire.anonymous("16 MiB", budget="1 MiB", granule="4 KiB", swap=swap) as mapping:
        mapping.array[:] = 7
        counted = mapping.statistics()
        pages = 16 * MIB // 4096
        assert counted.metadata_bytes >= pages * 15
        assert counted.resident_bytes + counted.metadata_bytes <= 1 * MIB
        assert (mapping.array == 7).all()


if __name__ == "__main__":
    children.main()
