"""The measured process: `python -m quire.tools.demo.measure ORDER.json`.

It imports numpy and quire and nothing else that the work does not need, so the growth of its
memory is what a user's program would see. `messages.py` says how it answers.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import quire
from quire.tools.demo import messages, workload
from quire.tools.demo.watch import Watch, start_counting


def measure(order: dict[str, Any]) -> dict[str, Any]:
    """Opens the source, works on it, and says what it took.

    Keys of the order: source, budget_bytes, pmap, folder, work.
    """
    folder = Path(order["folder"])
    # numpy's matrix product sets up its threads and buffers at its first call: not quire's memory.
    warm = np.ones((512, 512), dtype=np.float32)
    workload.scores_of(warm, warm[0])
    del warm
    base_bytes = start_counting()
    began = time.monotonic()
    mapping = quire.open(order["source"], budget=order["budget_bytes"], pmap=order["pmap"])
    with Watch(mapping, base_bytes) as watch:
        open_seconds = time.monotonic() - began
        work = workload.Work(**order["work"])
        outcome = workload.run(mapping.array, work, folder, "quire", messages.step)
    watch.save(folder / "watch.npz")
    return {
        "outcome": asdict(outcome),
        "statistics": asdict(mapping.statistics()),
        "array": {
            "shape": list(mapping.shape),
            "dtype": str(mapping.dtype),
            "order": mapping.order,
            "bytes": mapping.array.nbytes,
        },
        "pmap": mapping.pmap,
        "granule_bytes": mapping.granule_bytes,
        "open_seconds": open_seconds,
        "began_s": began,
        "base_rss_bytes": watch.base_bytes,
        "peak_rss_growth_bytes": watch.peak_growth_bytes,
        "pager_process_peak_rss_bytes": watch.children_peak_bytes,
    }


if __name__ == "__main__":
    sys.exit(messages.answer(sys.argv[1], measure))
