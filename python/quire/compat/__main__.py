"""`python -m quire.compat script.py [argument...]`, or `-m module`: runs it patched.

The program sees the arguments, the first entry of `sys.path` and the `__main__` that it has without
it.
"""

from __future__ import annotations

import os
import runpy
import sys

from quire.compat.patch import patch_for_good

USAGE = "usage: python -m quire.compat (script.py | -m module) [argument...]"
WRONG_USAGE = 2


def main(arguments: list[str]) -> int:
    """Runs what the arguments name; it ends the process itself unless it just comes to its end."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"{USAGE}\n\n{__doc__}")
        return 0
    as_module = arguments[:1] == ["-m"]
    program = arguments[1:] if as_module else arguments
    if not program or (not as_module and program[0].startswith("-")):
        print(USAGE, file=sys.stderr)
        return WRONG_USAGE
    sys.argv = program
    patch_for_good()
    if as_module:
        runpy.run_module(program[0], run_name="__main__", alter_sys=True)
        return 0
    if not os.path.exists(program[0]):  # noqa: PTH110 (as it was given)
        print(f"there is no file {program[0]!r} to run; {USAGE}", file=sys.stderr)
        return WRONG_USAGE
    sys.path[0] = os.path.dirname(os.path.realpath(program[0]))  # noqa: PTH120
    runpy.run_path(program[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
