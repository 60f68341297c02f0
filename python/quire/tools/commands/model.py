"""`quire model`: a session with the machine of `quire.model`, in which every step is shown."""

from __future__ import annotations

import json as json_format
import sys
from contextlib import nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from quire.model.session import Session, SessionError
from quire.tools.parameters import Flag

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from contextlib import AbstractContextManager

__all__ = ["model"]


def model(script: Path | None = None, /, *, command: str = "", json: Flag = False) -> int:
    r"""Run SCRIPT on a simulated machine and show each step; without one, read lines.

    The machine has an MMU with a TLB and page tables in physical frames, a page cache, swap, a
    disk, and Linux's system calls of memory mapping. Each line is one step: `mmap 4p rw as=heap`,
    `store heap+1p hello`, `fork child`, `translate 0x7f1234567890`, `faults 3 fifo,lru,opt 1 2 3 4
    1 2`. The line `help` lists them all. Shown are the VMA chosen, TLB hits and misses, the index
    at each level, the kind of fault, the frame, the victim, and what is read from and written to
    disk and swap.

    Parameters
    ----------
    script
        A file of lines; without one they come from standard input.
    command
        Lines given here, separated by semicolons.
    json
        Print one JSON object for each step.
    """
    session = Session()
    interactive = script is None and not command and sys.stdin.isatty()
    failed = False
    with _lines(script, command) as lines:
        for line in _typed() if interactive else lines:
            try:
                step = session.do(line)
            except SessionError as error:
                sys.stdout.flush()
                sys.stderr.write(f"quire: {error}\n")
                failed = True
                if interactive:
                    continue
                break
            if step.events or step.result or step.error:
                text = json_format.dumps(step.as_json()) if json else str(step)
                sys.stdout.write(text + "\n")
    return 2 if failed and not interactive else 0


def _lines(script: Path | None, command: str) -> AbstractContextManager[Iterable[str]]:
    if command:
        return nullcontext(command.split(";"))
    if script is None:
        return nullcontext(sys.stdin)
    try:
        return script.open()
    except OSError as error:
        raise SessionError(f"{script} cannot be read: {error.strerror}") from None


def _typed() -> Iterator[str]:
    """Asks for each line; where Python has readline, it can be edited and called back."""
    with suppress(ImportError):
        import_module("readline")
    while True:
        try:
            yield input("quire model> ")
        except EOFError:
            sys.stdout.write("\n")
            return
