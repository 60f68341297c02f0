"""A compressed array as a numpy array, within a memory budget.

Packs an array of 64 MB into seekable zstd, maps it with 16 MiB of memory, and uses it as any array.
"""

import tempfile
from pathlib import Path

import numpy as np

import quire

with tempfile.TemporaryDirectory() as folder:
    plain = Path(folder, "walk.npy")
    packed = Path(folder, "walk.npy.zst")
    steps = np.random.default_rng(1).integers(-1, 2, (1_000_000, 16), dtype=np.int32)
    walk = np.cumsum(steps, axis=0, dtype=np.int32)
    np.save(plain, walk)
    quire.pack(plain, packed, frame="256 KiB")
    print(f"packed {plain.stat().st_size:,} bytes into {packed.stat().st_size:,}")

    with quire.open(packed, budget="16 MiB") as m:
        x = m.array
        print(type(x), x.shape, x.dtype)
        assert np.array_equal(x[123_456], walk[123_456])
        assert (x.max(axis=0) == walk.max(axis=0)).all()
        statistics = m.statistics()
        print(
            f"{statistics.faults} faults, at most {statistics.peak_resident_bytes:,} bytes resident"
        )
