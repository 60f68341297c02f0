"""What `import quire` costs a program that has already imported numpy.

Each sample is a new interpreter, which times the statement itself. `import quire` alone imports
little, so the second statement, which imports what opening an array needs, has the same target.
"""

from __future__ import annotations

import subprocess
import sys

from bench.result import Context, Topic, topic_main
from bench.timing import median, rounds_of

STATEMENTS = {
    "import quire": "import quire",
    "import quire; quire.open": "import quire; quire.open",
}
LIMIT_MS = 50.0
ROUND_COUNT_MIN = 9


def run(context: Context) -> Topic:
    """Median milliseconds of each statement, numpy being there already."""
    topic = Topic("import time")
    calls = {name: (lambda code=code: _import_ms(code)) for name, code in STATEMENTS.items()}
    times = rounds_of(calls, max(ROUND_COUNT_MIN, context.rounds), context.seed)
    topic.add(times, "ms", 1.0, "after import numpy")
    for statement, values in times.items():
        name = f"{statement} beyond import numpy"
        topic.want(name, median(values), LIMIT_MS, at_least=False, unit=" ms")
    return topic


def _import_ms(statement: str) -> float:
    code = (
        "import time, numpy\n"
        "began = time.perf_counter()\n"
        f"{statement}\n"
        "print((time.perf_counter() - began) * 1e3)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(said.stdout)


if __name__ == "__main__":
    topic_main(run)
