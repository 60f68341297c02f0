"""How large should a granule be? Random rows and the sum, by granule, for each kind of source.

Run by hand (`python -m bench.granule`); the defaults in `crates/quire-core/src/mapping.rs` and
`store/zstd.rs` are chosen from what it prints: the smallest granule past which the sum gains
little, as a random row pays for all of its granule. (Over a real network a request costs far more
than on the loopback that is measured here; hence 256 KiB for remote sources.)
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

import quire
from quire.tools.range_server import RangeServer

KIB = 1 << 10
GRANULES = [4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, 1024 * KIB]
ROWS, COLUMNS = 32_768, 1024
LOOKUPS = 400
ROUNDS = 5
SEED = 1


def measure(source: str, granule: int) -> tuple[float, float] | None:
    """Median microseconds of a random 4 KiB row and MiB/s of the sum; None where refused."""
    rng = np.random.default_rng(SEED)
    rows_us, sums = [], []
    try:
        with quire.open(source, budget="32 MiB", granule=granule) as m:
            x = m.array
            for _ in range(ROUNDS):
                chosen = rng.integers(0, ROWS, LOOKUPS).tolist()
                started = time.perf_counter()
                for row in chosen:
                    x[row].max()
                rows_us.append((time.perf_counter() - started) / LOOKUPS * 1e6)
                started = time.perf_counter()
                x.sum()
                sums.append(x.nbytes / (time.perf_counter() - started) / (1 << 20))
    except quire.BudgetError:
        return None
    return statistics.median(rows_us), statistics.median(sums)


def main() -> None:
    """Prints a table a source."""
    noise = np.random.default_rng(SEED).integers(0, 8, (ROWS, COLUMNS), dtype=np.int32)
    with tempfile.TemporaryDirectory() as folder, RangeServer(folder) as server:
        plain = Path(folder, "rows.npy")
        np.save(plain, noise)
        for name, checksum in (("checked.zst", True), ("unchecked.zst", False)):
            quire.pack(plain, Path(folder, name), frame="1 MiB", checksum=checksum)
        sources = {
            "file": str(plain),
            "HTTP": f"{server.url}/rows.npy",
            "zstd, frames of 1 MiB, checksums": str(Path(folder, "checked.zst")),
            "zstd, frames of 1 MiB, none": str(Path(folder, "unchecked.zst")),
        }
        print(f"{ROWS * COLUMNS * 4 >> 20} MiB, budget 32 MiB, seed {SEED}, {ROUNDS} rounds")
        for name, source in sources.items():
            print(f"\n{name}\n{'granule':>10} {'row, µs':>10} {'sum, MiB/s':>11}")
            for granule in GRANULES:
                found = measure(source, granule)
                if found is not None:
                    print(f"{granule // KIB:>6} KiB {found[0]:>10.1f} {found[1]:>11.0f}")


if __name__ == "__main__":
    main()
