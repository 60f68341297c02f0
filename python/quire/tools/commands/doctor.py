"""`quire doctor`: which pmaps work here, why others do not, and how to enable the better ones."""

from __future__ import annotations

import json as json_format
import os
import platform
import sys
from pathlib import Path
from typing import Any

import quire
from quire import _core, shared_names
from quire.errors import SourceError
from quire.sizes import format_size
from quire.tools.parameters import Flag

__all__ = ["doctor"]

SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")
DEVICE = Path("/dev/userfaultfd")
STATUS = Path("/proc/self/status")
SECCOMP_WORDS = {"0": "none", "1": "strict", "2": "a filter, as in containers"}


def doctor(*, json: Flag = False) -> int:
    """Show which pmaps (ways of catching page faults) work here, and how to get better.

    Exit code 1 when none works.

    Parameters
    ----------
    json
        Print one JSON object instead of a table.
    """
    facts = examine()
    if json:
        sys.stdout.write(json_format.dumps(facts) + "\n")
    else:
        sys.stdout.write("\n".join(_text(facts)) + "\n")
    return 0 if any(row["works"] for row in facts["pmaps"]) else 1


def examine() -> dict[str, Any]:
    """What matters to quire on this machine, fit for JSON; takes stale names away."""
    return {
        "pmaps": _core.probe(),
        "exports_unwatched": _core.watch_exports(),
        "kernel_unwatched": _core.kernel_unwatched(),
        "quire": quire.__version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "user": os.geteuid(),
        "page_bytes": _core.page_bytes(),
        "budget_bytes": _core.budget(),
        "unprivileged_userfaultfd": _read_word(SYSCTL),
        "userfaultfd_device": _device(),
        "shared_names": _shared_names(),
        "seccomp": SECCOMP_WORDS.get(_status("Seccomp"), "unknown"),
    }


def advice(facts: dict[str, Any]) -> list[str]:
    """What would make a better pmap work, best first; empty when the best one works.

    >>> advice({"pmaps": [{"name": "uffd", "works": True, "remedy": "-"}]})
    []
    """
    better = []
    for row in facts["pmaps"]:
        if row["works"]:
            break
        if row["remedy"]:
            better.append(f"{row['name']}: {row['remedy']}")
    return better


def _text(facts: dict[str, Any]) -> list[str]:
    yes = {True: "yes", False: "no"}
    header = ("pmap", "works", "default", "pointer", "system calls", "why not")
    quires = "by quire" if facts["exports_unwatched"] is None else "no"
    rows = [
        (
            row["name"],
            yes[row["works"]],
            yes[row["default"]],
            yes[row["pointer"]],
            "yes" if row["system_calls"] else quires if row["pointer"] else "no",
            "" if row["works"] else row["reason"],
        )
        for row in facts["pmaps"]
    ]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    named = [
        ("quire", f"{facts['quire']}, Python {facts['python']}"),
        ("kernel", f"{facts['kernel']} on {facts['machine']}, user {facts['user']}"),
        ("page", format_size(facts["page_bytes"])),
        ("budget", f"{format_size(facts['budget_bytes'])} for all mappings together"),
        ("vm.unprivileged_userfaultfd", facts["unprivileged_userfaultfd"] or "not there"),
        (str(DEVICE), facts["userfaultfd_device"]),
        ("seccomp", facts["seccomp"]),
        ("pmap kernel", _kernel(facts["kernel_unwatched"])),
        ("system calls by quire", _exports(facts["exports_unwatched"])),
        ("shared memory", facts["shared_names"]),
    ]
    width = max(len(name) for name, _ in named)
    lines += ["", *(f"{name:<{width}}  {value}" for name, value in named), ""]
    better = advice(facts)
    if better:
        lines += ["To enable a better pmap:", *(f"  {line}" for line in better)]
    else:
        lines.append("The best pmap works here.")
    return lines


def _kernel(reason: str | None) -> str:
    """What there is of the pmap that is no rung of the ladder, as the operating system has it."""
    means = "default of plain local files, and quire.map"
    if reason is None:
        return f"{means}; with budgets, and advice that follows what is touched"
    return f"{means}; without budgets and advice of quire's, as {reason}"


def _exports(reason: str | None) -> str:
    """Whether pages are brought in for them where the kernel cannot."""
    if reason is None:
        return "an array's pages are brought in before them, up to 64 MiB; pin what is longer"
    return f"not here, pin what they use: {reason}"


def _shared_names() -> str:
    try:
        held, gone = shared_names.sweep()
    except SourceError as error:
        return str(error)
    return f"{held} names are held; {gone} that nobody held were removed"


def _device() -> str:
    if not DEVICE.exists():
        return "not there"
    usable = os.access(DEVICE, os.R_OK | os.W_OK)
    mode = DEVICE.stat().st_mode & 0o777
    return f"mode {mode:04o}, {'usable' if usable else 'not usable by this user'}"


def _read_word(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _status(name: str) -> str:
    """The value of a line of /proc/self/status, or an empty text."""
    lines = (_read_word(STATUS) or "").splitlines()
    return next((line.split()[1] for line in lines if line.startswith(f"{name}:")), "")
