"""`python -m quire.compat script.py [argument...]`, or `-m module`, or `-`: runs it patched.

The program has the arguments, the first entry of `sys.path` and the `__main__` that it has without
it, to the end of the process. A folder or a zip file with a `__main__.py` is a program too, and "-"
is what comes by standard input.
"""

from __future__ import annotations

import io
import os
import pkgutil
import runpy
import sys
import types
from importlib.machinery import SourceFileLoader
from typing import TYPE_CHECKING

from quire.compat.patch import patch_for_good

if TYPE_CHECKING:
    from types import CodeType

USAGE = "usage: python -m quire.compat (script.py | -m module | -) [argument...]"
WRONG_USAGE = 2
STDIN = "-"


def main(arguments: list[str]) -> int:
    """Runs what the arguments name; it ends the process itself unless it just comes to its end."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"{USAGE}\n\n{__doc__}")
        return 0
    as_module = arguments[:1] == ["-m"]
    program = arguments[1:] if as_module else arguments
    if not program or (not as_module and program[0].startswith("-") and program[0] != STDIN):
        print(USAGE, file=sys.stderr)
        return WRONG_USAGE
    name = program[0]
    if not as_module and name != STDIN and not os.path.exists(name):  # noqa: PTH110 (as given)
        print(f"there is no file {name!r} to run; {USAGE}", file=sys.stderr)
        return WRONG_USAGE
    patch_for_good()
    sys.argv = program
    if as_module:
        sys.argv[0] = "-m"  # until it is found
        _run_module(name)
    elif name == STDIN:
        _set_first_path("")
        code = compile(sys.stdin.buffer.read(), "<stdin>", "exec", dont_inherit=True)
        _run(code, __file__="<stdin>")
    elif pkgutil.get_importer(name) is not None:  # a folder or a zip file
        _set_first_path(os.path.abspath(name))  # noqa: PTH100
        _run_module(None)
    else:
        _set_first_path(os.path.dirname(os.path.realpath(name)))  # noqa: PTH120
        path = os.path.join(os.getcwd(), name)  # noqa: PTH109, PTH118 (as the interpreter does)
        _run(_code_of(path), __file__=path, __loader__=SourceFileLoader("__main__", path))
    return 0


def _set_first_path(path: str) -> None:
    if not sys.flags.safe_path:
        sys.path[0] = path


def _code_of(path: str) -> CodeType:
    with io.open_code(path) as file:
        compiled: CodeType | None = pkgutil.read_code(file)  # of a .pyc file
    if compiled is not None:
        return compiled
    with io.open_code(path) as file:
        return compile(file.read(), path, "exec", dont_inherit=True)


def _new_main(**variables: object) -> types.ModuleType:
    """A `__main__` for the program, which stays when it has come to its end."""
    made = types.ModuleType("__main__")
    vars(made).update(variables, __builtins__=sys.modules["builtins"])
    sys.modules["__main__"] = made
    return made


def _run(code: CodeType, **variables: object) -> None:
    exec(code, vars(_new_main(__cached__=None, **variables)))  # noqa: S102 (what is asked for)


def _run_module(name: str | None) -> None:
    """What the interpreter does for ``-m``, and for a folder: None for the `__main__` in it."""
    _new_main()
    run = runpy._run_module_as_main  # type: ignore[attr-defined]
    run(name or "__main__", alter_argv=name is not None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
