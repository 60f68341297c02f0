"""`quire pack`: writes the Zstandard seekable format."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from quire.packing import FRAME_BYTES, PackResult
from quire.packing import pack as pack_file
from quire.sizes import format_size
from quire.tools.parameters import Flag, Size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quire.packing import Progress

__all__ = ["pack"]


def pack(
    source: Annotated[str, Parameter(name="FILE", allow_leading_hyphen=True)],
    *,
    output: Annotated[str | None, Parameter(name=("--output", "-o"))] = None,
    frame: Size = FRAME_BYTES,
    level: Annotated[int, Parameter(allow_leading_hyphen=True)] = 3,
    threads: int | None = None,
    checksum: bool = True,
    quiet: Annotated[bool, Parameter(name=("--quiet", "-q"), negative=())] = False,
    json: Flag = False,
) -> None:
    """Compress FILE into the Zstandard seekable format, which quire maps and zstd reads.

    The new file appears under its name when it is complete and on the disk.

    Parameters
    ----------
    source
        A .npy or any other file; one compressed by zstd is packed again; - is standard input.
    output
        Name of the new file; FILE with ".zst" when not given.
    frame
        Bytes in a frame: small ones make random touches fast, large ones compress better.
        256 KiB when not given.
    level
        Compression level of zstd, up to 22.
    threads
        Threads that compress; one for each CPU when not given.
    checksum
        Store a checksum of each frame, verified when it is read.
    quiet
        Show no progress and print no words.
    json
        Print one JSON object about the new file.
    """
    target = output or _default_output(source)
    from_stdin = source == "-"
    with _bar(from_stdin=from_stdin, quiet=quiet or json) as progress:
        result = pack_file(
            sys.stdin.buffer if from_stdin else source,
            target,
            frame=frame,
            level=level,
            threads=threads,
            checksum=checksum,
            progress=progress,
        )
    if json:
        sys.stdout.write(_as_json(result, target) + "\n")
    elif not quiet:
        sys.stderr.write(_in_words(result, target) + "\n")


def _default_output(source: str) -> str:
    if source == "-" or source.endswith((".zst", ".zstd")):
        raise ValueError("name the new file: -o NEW.zst")
    return f"{source}.zst"


@contextmanager
def _bar(*, from_stdin: bool, quiet: bool) -> Iterator[Progress | None]:
    """A progress bar on standard error, when a person looks at it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    columns: tuple[Any, ...] = ("{task.description}", BarColumn(), DownloadColumn(True))
    remaining = () if from_stdin else (TimeRemainingColumn(),)
    with Progress(*columns, *remaining, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("Packing", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _as_json(result: PackResult, target: str) -> str:
    from dataclasses import asdict
    from json import dumps

    return dumps({"file": target, **asdict(result)})


def _in_words(result: PackResult, target: str) -> str:
    ratio = result.source_bytes / result.packed_bytes
    return (
        f"{target}: {format_size(result.source_bytes)} in {result.frames:,} frames of "
        f"{format_size(result.frame_bytes)}, packed to {format_size(result.packed_bytes)} "
        f"({ratio:.2f} to 1)"
    )
