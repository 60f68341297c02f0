"""What the processes of the demonstration say to each other: one JSON object a line.

`{"step": name, "done": n, "total": n}` while work goes on, then `{"result": {...}}`, or
`{"error": text}` and exit code 1. Nothing here imports anything large, because the measured
process uses it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def say(message: dict[str, Any]) -> None:
    """Writes one message to standard output."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def step(name: str, done: int, total: int) -> None:
    """Tells the conducting process how far the work is."""
    say({"step": name, "done": done, "total": total})


def answer(order_path: str, work: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """Reads the order, does the work, says the result or the error; the exit code."""
    order = json.loads(Path(order_path).read_text())
    try:
        result = work(order)
    except Exception as error:  # noqa: BLE001  (the conducting process tells it, whatever it is)
        say({"error": str(error) or type(error).__name__, "kind": type(error).__name__})
        return 1
    say({"result": result})
    return 0
