"""`python -m quire.testing.replay --on model FILE...`: replays rows and compares outcomes.

Prints one JSON object with `--json`, else a summary and each mismatch. Exit code 0 only if all
agree; 1 with a mismatch; 2 for a file that cannot be read as rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from quire.model import GEOMETRIES
from quire.testing.replay.replay import Setting, replay
from quire.testing.replay.rows import RowError, read_rows

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m quire.testing.replay", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--on", choices=("model", "kernel"), default="model")
    parser.add_argument(
        "--frames", type=_frames, help="frames for pages; with it, swap without end"
    )
    parser.add_argument("--tlb", type=_entries, help="entries of the TLB (64), or off")
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), help="(x86-64)")
    parser.add_argument("--checked", action="store_true", help="invariants after every operation")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    given = parser.parse_args(arguments)
    of_the_model = ("frames", "tlb", "geometry", "checked")
    chosen = {name: value for name in of_the_model if (value := getattr(given, name)) is not None}
    if given.on == "kernel" and any(name != "checked" or value for name, value in chosen.items()):
        parser.error("--frames, --tlb, --geometry and --checked are of the model: not --on kernel")
    setting = Setting(on=given.on, **chosen)
    try:
        rows = [row for path in given.files for row in read_rows(path)]
    except RowError as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    total = replay(rows, setting)
    report = total.as_json()
    if given.json:
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        sys.stdout.write(f"{total.rows} rows, {total.ops} operations\n")
        for mismatch in total.mismatches:
            sys.stdout.write(f"mismatch: {json.dumps(mismatch)}\n")
        for reason, count in total.skipped.items():
            sys.stdout.write(f"skipped, {reason}: {count}\n")
    return 1 if total.mismatches else 0


def _frames(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of frames: 1 or more")
    return int(text)


def _entries(text: str) -> int:
    if text != "off" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of entries nor `off`")
    return 0 if text == "off" else int(text)


if __name__ == "__main__":
    sys.exit(main())
