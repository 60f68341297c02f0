"""Many files as one array, without copying.

Writes shards as a training run would, and maps them as one array; then raw files of whole pages,
which the operating system maps side by side.
"""

import tempfile
from pathlib import Path

import numpy as np

import quire

with tempfile.TemporaryDirectory() as folder:
    rows = np.random.default_rng(1).random((100_000, 16), dtype=np.float32)
    shards = []
    for number, part in enumerate(np.array_split(rows, 40)):
        shards.append(Path(folder, f"shard-{number:02}.npy"))
        np.save(shards[-1], part)

    with quire.concatenate(shards, budget="1 MiB") as m:
        print(m)
        assert np.array_equal(m.array[49_990:50_010], rows[49_990:50_010])
        assert np.allclose(m.array.sum(axis=0), rows.sum(axis=0))
        print(f"at most {m.statistics().peak_resident_bytes:,} bytes resident")

    other = Path(folder, "other.npy")
    np.save(other, rows[:10].astype("f8"))
    try:
        quire.concatenate([*shards, other])
    except quire.FormatError as error:
        print(f"refused: {error}")

    days = []
    for number in range(7):
        days.append(Path(folder, f"day-{number}.raw"))
        np.full(65_536, number, "i8").tofile(days[-1])
    with quire.concatenate(days, dtype="i8") as week:
        print(f"pmap {week.pmap}: {week.array[::65_536].tolist()}")
