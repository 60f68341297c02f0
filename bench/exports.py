"""What watching numpy's exports costs arrays that have nothing to do with quire.

Where a pmap cannot have the kernel touch its pages, quire watches the exports of `numpy.ndarray`,
so that system calls on cold pages work. Each sample is a new interpreter, watching or not.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench import data
from bench.result import Context, Topic, ratio, topic_main
from bench.timing import rounds_of

WAYS = {
    "memoryview(array)": ("memoryview(array)", 20_000),
    "array.tofile(file), 4 KiB": ("array.tofile(file)", 2_000),
    "file.write(array), 4 KiB": ("file.write(array)", 20_000),
}
LIMIT = 1.1
ROUND_COUNT_MIN = 9


def run(context: Context) -> Topic:
    """Nanoseconds of each way, watched and not."""
    topic = Topic("exports")
    path = data.plain_path(Path(context.data))
    for name, (code, number) in WAYS.items():
        calls = {
            who: (lambda who=who, code=code, number=number: _ns(code, number, who, path))
            for who in ("not watched", "watched")
        }
        times = rounds_of(calls, max(ROUND_COUNT_MIN, context.rounds), context.seed)
        topic.add(times, "ns", 1.0, name)
        slower = ratio(times, "watched", "not watched")
        topic.want(f"{name} of a plain array, exports watched", slower, LIMIT, at_least=False)
    return topic


def _ns(code: str, number: int, who: str, path: Path) -> float:
    opened = f"kept = quire.open({str(path)!r}, dtype='u1', pmap='mprotect').array\n"
    program = (
        "import timeit, numpy as np, quire\n"
        "array, file = np.zeros(4096, 'u1'), open('/dev/null', 'wb', buffering=0)\n"
        f"{opened if who == 'watched' else ''}"
        f"times = timeit.repeat({code!r}, globals=globals(), number={number}, repeat=7)\n"
        f"print(sorted(times)[3] / {number} * 1e9)"
    )
    argv = [sys.executable, "-c", program]
    return float(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    topic_main(run)
