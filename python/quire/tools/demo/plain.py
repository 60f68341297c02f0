"""The other side: the same work without quire: `python -m quire.tools.demo.plain ORDER.json`.

Keys of the order: source, folder, work, array (what quire said of it), in_ram. With `in_ram` the
`.npy` file is read into memory first and the work is timed on it. Otherwise the answers are
computed from a stream of the source (see `independent.py`), and there is nothing to time.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from quire.tools.demo import independent, messages, workload


def compute(order: dict[str, Any]) -> dict[str, Any]:
    """The answers of plain numpy, kept in the folder beside quire's."""
    folder, work = Path(order["folder"]), workload.Work(**order["work"])
    if not order["in_ram"]:
        return independent.compute(order["source"], order["array"], work, folder, messages.step)
    messages.step("read", 0, 1)
    began = time.monotonic()
    array = np.load(order["source"])
    load_seconds = time.monotonic() - began
    messages.step("read", 1, 1)
    outcome = workload.run(array, work, folder, "numpy", messages.step)
    how = "plain numpy on the uncompressed .npy file in RAM, in another process"
    return {"outcome": asdict(outcome), "load_seconds": load_seconds, "how": how}


if __name__ == "__main__":
    sys.exit(messages.answer(sys.argv[1], compute))
