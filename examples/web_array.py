"""An array on a web server, by range requests: only what is touched is fetched."""

import tempfile
from pathlib import Path

import numpy as np

import quire
from quire.tools.range_server import RangeServer

with tempfile.TemporaryDirectory() as folder:
    table = np.arange(8_000_000, dtype=np.float64).reshape(-1, 8)
    np.save(Path(folder, "table.npy"), table)
    with RangeServer(folder) as server, quire.open(f"{server.url}/table.npy", budget="32 MiB") as m:
        x = m.array
        rows = [3, 500_000, 999_999]
        assert np.array_equal(x[rows], table[rows])
        fetched = m.statistics().bytes_fetched
        print(f"{len(rows)} rows of {x.nbytes:,} bytes: {fetched:,} bytes fetched")
