"""Reads a user's array without quire, from start to end, and computes the answers from that.

Local files are read plainly, HTTP addresses with one plain GET; zstd is decompressed by the
standard library (3.14), `backports.zstd`, `zstandard` or the `zstd` program, whichever there is.
What cannot be read in any of these ways is read a second time by quire, and the result says so.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import urllib.request
import zlib
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

import quire
from quire.tools.demo import workload

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK_BYTES = 4 << 20
ZSTD_MAGICS = tuple(bytes([low, 0x2A, 0x4D, 0x18]) for low in range(0x50, 0x60))
ZSTD_MAGICS += (b"\x28\xb5\x2f\xfd",)


class NoOtherReaderError(Exception):
    """This machine has no second way to read the source."""


def compute(
    source: str, array: dict[str, Any], work: workload.Work, folder: Path, step: workload.Step
) -> dict[str, Any]:
    """Scores, row checksums and queries computed from a second reading; `how` says which."""
    try:
        with ExitStack() as stack:
            stream, how = stack.enter_context(_plain_stream(source, folder))
            return _answers(_without_header(stream), array, work, folder, step) | {"how": how}
    except NoOtherReaderError:
        with quire.open(source, budget="32 MiB") as mapping:
            flat = mapping.array.reshape(-1, order="A").view(np.uint8)
            pieces = (
                flat[first : first + BLOCK_BYTES].tobytes()
                for first in range(0, len(flat), BLOCK_BYTES)
            )
            how = "a second reading by quire itself in another process: nothing else here can"
            return _answers(pieces, array, work, folder, step) | {"how": how}


def _answers(
    pieces: Iterator[bytes],
    array: dict[str, Any],
    work: workload.Work,
    folder: Path,
    step: workload.Step,
) -> dict[str, Any]:
    """Goes through the bytes once; rows are cut as `workload.row_view` cuts them."""
    dtype, shape = np.dtype(array["dtype"]), tuple(array["shape"])
    shape = shape if array["order"] == "C" else shape[::-1]
    count, width = workload.row_shape(shape, dtype)
    row_bytes = width * dtype.itemsize
    queries = np.load(folder / "quire-queries.npy")
    chosen = workload.query_indexes(count, work)
    lookups = workload.lookup_indexes(count, row_bytes, work)
    wanted = np.unique(np.concatenate(lookups))
    sums = np.zeros(len(wanted), dtype=np.uint32)
    scores: list[list[Any]] = [[] for _ in queries]
    done, queries_equal = 0, True
    for rows in _row_blocks(pieces, row_bytes, count, dtype):
        for number, query in enumerate(queries):
            scores[number].append(workload.scores_of(rows, query))
        for position in range(*np.searchsorted(wanted, [done, done + len(rows)]).tolist()):
            sums[position] = zlib.crc32(rows[wanted[position] - done])
        for place in np.flatnonzero((chosen >= done) & (chosen < done + len(rows))):
            row = rows[chosen[place] - done].astype(queries.dtype)
            queries_equal &= row.tobytes() == queries[place].tobytes()
        done += len(rows)
        step("check", done, count)
    for number, parts in enumerate(scores):
        np.save(folder / f"numpy-scores-{number}.npy", np.concatenate(parts))
    for name, indexes in zip(("rows", "hot"), lookups, strict=True):
        np.save(folder / f"numpy-{name}.npy", sums[np.searchsorted(wanted, indexes)])
    return {"outcome": None, "load_seconds": None, "queries_equal": queries_equal}


def _row_blocks(
    pieces: Iterator[bytes], row_bytes: int, count: int, dtype: np.dtype[Any]
) -> Iterator[Any]:
    """Whole rows, shape (rows, columns), from pieces that end anywhere.

    Raises `ValueError` when the bytes end before `count` rows.
    """
    rest, missing = b"", count
    for piece in pieces:
        rest += piece
        whole = min(len(rest) // row_bytes, missing)
        if whole:
            yield np.frombuffer(rest, dtype, whole * row_bytes // dtype.itemsize).reshape(whole, -1)
            rest, missing = rest[whole * row_bytes :], missing - whole
        if not missing:
            return
    raise ValueError(f"the plain reading of the source ended {missing} rows too early")


def _pieces(stream: IO[bytes]) -> Iterator[bytes]:
    while piece := stream.read(BLOCK_BYTES):
        yield piece


@contextmanager
def _plain_stream(source: str, folder: Path) -> Iterator[tuple[IO[bytes], str]]:
    """The decompressed bytes of the source, and how they were read."""
    with ExitStack() as stack:
        if source.startswith(("http://", "https://")):
            opened = urllib.request.urlopen(source)  # noqa: S310  (http or https: just tested)
            raw = stack.enter_context(opened)
            path, how = folder / "download", "one plain download of the whole object"
            with path.open("wb") as copy:
                shutil.copyfileobj(raw, copy, BLOCK_BYTES)
        elif Path(source).is_file():
            path, how = Path(source), "a plain reading of the whole file"
        else:
            raise NoOtherReaderError
        stream: IO[bytes] = stack.enter_context(path.open("rb"))
        if stream.read(4) in ZSTD_MAGICS:
            stream.seek(0)
            stream, reader = _decompressed(stream, stack)
            how += f", decompressed by {reader}"
        else:
            stream.seek(0)
        yield stream, how + ", in another process"


def _decompressed(stream: IO[bytes], stack: ExitStack) -> tuple[IO[bytes], str]:
    """A stream of decompressed bytes over all frames, and the name of what decompresses."""
    for name in ("compression.zstd", "backports.zstd", "zstandard"):
        with suppress(ImportError):
            module = importlib.import_module(name)
            if name == "zstandard":
                decompressor = module.ZstdDecompressor()
                return decompressor.stream_reader(stream, read_across_frames=True), name
            return stack.enter_context(module.open(stream, "rb")), name
    program = shutil.which("zstd")
    if program is None:
        raise NoOtherReaderError
    process = stack.enter_context(
        subprocess.Popen([program, "-dc"], stdin=stream, stdout=subprocess.PIPE)
    )
    assert process.stdout is not None
    return process.stdout, "the zstd program"


def _without_header(stream: IO[bytes]) -> Iterator[bytes]:
    """The array's bytes of a `.npy` stream; all bytes of any other stream."""
    start = stream.read(len(np.lib.format.MAGIC_PREFIX) + 2)
    if not start.startswith(np.lib.format.MAGIC_PREFIX):
        yield start
    else:
        length = stream.read(2 if start[-2] == 1 else 4)
        stream.read(int.from_bytes(length, "little"))
    yield from _pieces(stream)
