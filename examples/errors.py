"""What happens when the source fails: an exception in the thread that touched, not a crash."""

import os
import tempfile
from pathlib import Path

import numpy as np

import quire

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "shrinks.npy")
    np.save(path, np.ones(4_000_000))
    with quire.open(path, budget="8 MiB") as m:
        x = m.array
        print("before:", x[0])
        os.truncate(path, 1_000_000)
        try:
            print("after:", x.sum())
        except quire.TruncatedError as error:
            print("after:", type(error).__name__, error)
        print("failed:", m.failed is not None)
