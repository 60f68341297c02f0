"""The `quire` command: finds the verb, runs it, and turns errors into messages and exit codes.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a `quire.Error`, or what the system refused (OSError): one message, no traceback |
| 2 | wrong usage |
| 130 | ended by Ctrl-C |

With `QUIRE_TRACEBACK=1` in the environment errors show where they arose.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import quire

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cyclopts import App

__all__ = ["main"]

VERBS = {
    "demo": "Show quire's main job on real data, check every answer, and draw a picture of it.",
    "pack": "Compress FILE into the Zstandard seekable format, which quire maps and zstd reads.",
    "info": "Describe SOURCE: its store, size and version, its compression, and the array in it.",
    "model": "Run SCRIPT on a simulated machine and show each step; without one, read lines.",
    "doctor": "Show which pmaps (ways of catching page faults) work here, and how to get better.",
}
"""Each verb and the first line of its help: verbs are not imported to list them."""
FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code. Takes `sys.argv` when None is given."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app = build_app(is_list=not VERBS.keys() & set(given[:1]))
    except ImportError as error:
        _say(f"the command line needs {error.name}: run `pip install 'quire[cli]'`")
        return FAILED
    from cyclopts import CycloptsError

    try:
        status = app(given, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except CycloptsError as error:
        _say(f"{error} Try `quire --help`.")
        return WRONG_USAGE
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has seen enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except ImportError as error:
        if _wants_traceback() or (error.name or "").startswith("quire"):
            raise
        _say(f"this verb needs {error.name}: run `pip install 'quire[all]'`")
        return FAILED
    except quire.Error as error:
        if _wants_traceback():
            raise
        _say(str(error))
        return FAILED
    except OSError as error:
        if _wants_traceback():
            raise
        _say(f"{error.filename or 'the system'}: {error.strerror or error}; {_remedy(error)}")
        return FAILED
    except ValueError as error:
        if _wants_traceback():
            raise
        _say(str(error))
        return WRONG_USAGE
    return status if isinstance(status, int) else 0


def build_app(*, is_list: bool) -> App:
    """The application; a verb's module is imported when the verb is used.

    With ``is_list`` the verbs carry their first line only, for the help of the whole.
    """
    from cyclopts import App

    app = App(
        name="quire",
        help="Virtual memory for Python: compressed and remote arrays within a memory budget.",
        version=lambda: str(quire.__version__),
        suppress_keyboard_interrupt=False,
    )
    for verb, summary in VERBS.items():
        app.command(
            f"quire.tools.commands.{verb}:{verb}", name=verb, help=summary if is_list else None
        )
    return app


def _remedy(error: OSError) -> str:
    """What to do next."""
    if isinstance(error, PermissionError):
        return f"user {os.geteuid()} may not do that: name a file or folder of your own"
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return "check the path"
    return "QUIRE_TRACEBACK=1 shows where"


def _wants_traceback() -> bool:
    return os.environ.get("QUIRE_TRACEBACK", "") not in ("", "0")


def _say(words: str) -> None:
    sys.stderr.write(f"quire: {words}\n")


if __name__ == "__main__":
    sys.exit(main())
