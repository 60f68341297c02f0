"""`quire demo`: the main job on real data."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

import quire
from quire.tools.demo import report
from quire.tools.demo.progress import Bars
from quire.tools.demo.run import run
from quire.tools.demo.settings import MIB, QUERIES, DemoError, Settings
from quire.tools.parameters import Flag, Size

__all__ = ["demo"]

SIZE_BYTES_MIN = MIB


def demo(
    *,
    source: str | None = None,
    size: Size = 400 * MIB,
    budget: Size = 64 * MIB,
    pmap: str | None = None,
    query: Annotated[list[str] | None, Parameter(negative=())] = None,
    out: Path = Path("demo-out"),
    keep: Path | None = None,
    seed: int = 1,
    json: Flag = False,
) -> int:
    """Show quire's main job on real data, check every answer, and draw a picture of it.

    Lines of the Python sources of this installation become a matrix of hashed character n-grams,
    which is stored as seekable zstd and served by a local HTTP server. The array is then opened
    within a memory budget: several nearest-line searches multiply the whole of it by a vector,
    and 10,000 look-ups read rows at random. Plain numpy does the same on the plain file, in
    another process, and every answer is compared.

    Exit code 1 when an answer is wrong, the budget did not hold, or the source cannot be used.

    Parameters
    ----------
    source
        Use your own array instead: a path or an address (.npy, .npy.zst, http(s)://, s3://).
        It must hold numbers; look-ups and one scan are made and checked.
    size
        Least size of the matrix to make, 400 MiB when not given; for example 2GiB.
    budget
        Memory that quire may use for pages and buffers, 64 MiB when not given.
    pmap
        How faults are caught: `uffd`, `inline`, `guard` or `mprotect`. Chosen by
        quire when not given.
    query
        A line to look for; may be given several times.
    out
        Folder for the picture and report.json, and for the data while the demonstration runs.
    keep
        Folder to leave the data in. They are removed at the end when this is not given.
    seed
        Decides which sources, rows and queries are taken.
    json
        Print one JSON object instead of tables.
    """
    if size < SIZE_BYTES_MIN:
        raise DemoError(f"a matrix of {size} bytes shows nothing: choose a --size of 1 MiB or more")
    if (pmap or os.environ.get("QUIRE_PMAP")) == "soft":
        raise DemoError(
            'pmap "soft" gives no array, which the demonstration is about: choose another --pmap '
            "(`quire doctor` says which work here)"
        )
    if pmap is not None:
        quire.anonymous(1, pmap=pmap).close()  # refused before any data are made
    settings = Settings(
        size_bytes=size,
        budget_bytes=budget,
        out=out,
        source=source,
        keep=keep,
        pmap=pmap,
        seed=seed,
        queries=tuple(query) if query else QUERIES,
    )
    with Bars(quiet=True if json else None) as bars:
        values, tables = run(settings, bars)
    if json:
        print(report.as_json(values))
    elif sys.stdout.isatty():
        console = Console()
        report.show(tables, console)
        console.print(*report.closing(values), sep="\n", markup=False)
    else:
        print(report.as_text(tables), *report.closing(values), sep="\n")
    return 0 if values["correct"] and values["budget_held"] else 1
