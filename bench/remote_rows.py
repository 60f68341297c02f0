"""An uncompressed array over HTTP beside obstore's range reads and fsspec's block cache.

The server is quire's own range server on this machine, in a process of its own, the same for all.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import obstore
from obstore.store import HTTPStore

import quire
from bench import data
from bench.result import Context, Topic, ratio, require, topic_main
from bench.timing import pretouch, rounds_of, seconds, wake_processor
from bench.zstd_rows import copier, read_all
from quire.tools.range_server import RangeServer

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK_BYTES = 1 << 20
BUDGET_PARTS = 8
RESIDENT_ROWS = {"quire": 20_000, "obstore": 200, "fsspec": 100, "fsspec, all cached": 1_000}
COLD_GRANULES = 64


def run(context: Context) -> Topic:
    """Resident rows, cold granules and the sum."""
    topic = Topic("remote rows")
    folder = Path(context.data)
    plain = np.load(data.plain_path(folder), mmap_mode="r")
    pretouch(3 * plain.nbytes)
    wake_processor()
    with RangeServer(folder) as server:
        remote = Remote(server.url, data.plain_path(folder), plain)
        _resident(topic, remote, context)
        _cold(topic, remote, context)
        _sequential(topic, remote, context)
    return topic


class Remote:
    """One remote `.npy` file, and how each contender opens it."""

    def __init__(self, server_url: str, path: Path, plain: Any) -> None:
        self.plain = plain
        self.name = path.name
        self.url = f"{server_url}/{path.name}"
        self.header_bytes = path.stat().st_size - plain.nbytes
        self.size_bytes = path.stat().st_size
        options: Any = {"allow_http": True}
        self.obstore = HTTPStore.from_url(server_url, client_options=options)

    def mapping(self, budget: int) -> quire.Mapping:
        """The array mapped anew."""
        return quire.open(self.url, budget=budget)

    def blocks(self, budget: int | None) -> Any:
        """The file through fsspec's block cache of `budget` bytes, None: its default settings."""
        files = fsspec.filesystem("http")
        if budget is None:
            return files.open(self.url, cache_type="blockcache")
        return files.open(
            self.url,
            block_size=BLOCK_BYTES,
            cache_type="blockcache",
            cache_options={"maxblocks": budget // BLOCK_BYTES},
        )

    def row_of(self, blocks: Any, index: int) -> Any:
        """One row read through an open fsspec file."""
        start, length = self.row_range(index)
        blocks.seek(start)
        return np.frombuffer(blocks.read(length), dtype=self.plain.dtype)

    def range(self, start: int, length: int) -> memoryview:
        """Bytes by one range read of obstore."""
        return memoryview(obstore.get_range(self.obstore, self.name, start=start, length=length))

    def row_range(self, index: int) -> tuple[int, int]:
        """Where a row's bytes are in the file: start and length."""
        return self.header_bytes + index * data.ROW_BYTES, data.ROW_BYTES


def _resident(topic: Topic, remote: Remote, context: Context) -> None:
    """Random rows when everything has been read once before.

    fsspec runs twice: with its default settings, which keep 32 blocks of 5 MiB, and with a cache
    that holds the whole file, which is the most it can do.
    """
    with ExitStack() as stack:
        rows = stack.enter_context(remote.mapping(2 * remote.size_bytes)).array
        default = stack.enter_context(remote.blocks(None))
        roomy = stack.enter_context(remote.blocks(2 * remote.size_bytes))
        rows.sum()
        for blocks in (default, roomy):
            while blocks.read(BLOCK_BYTES):
                pass
        readers: dict[str, Callable[[int], Any]] = {
            "quire": copier(rows),
            "obstore": lambda i: np.frombuffer(remote.range(*remote.row_range(i)), rows.dtype),
            "fsspec": lambda index: remote.row_of(default, index),
            "fsspec, all cached": lambda index: remote.row_of(roomy, index),
        }
        random = np.random.default_rng(context.seed)
        for name, read in readers.items():
            for index in random.integers(0, len(rows), 50).tolist():
                require(np.array_equal(read(index), remote.plain[index]), f"row {index} of {name}")
        topic.checks.append("50 rows are equal to the plain file's in every contender")

        def rows_by(name: str) -> Callable[[], float]:
            def call() -> float:
                chosen = random.integers(0, len(rows), RESIDENT_ROWS[name]).tolist()
                return seconds(lambda: read_all(readers[name], chosen)) / len(chosen)

            return call

        times = rounds_of({name: rows_by(name) for name in readers}, context.rounds, context.seed)
        topic.add(times, "µs", 1e6, "resident row")
        for peer in ("obstore", "fsspec"):
            name = f"HTTP, resident rows: faster than {peer}"
            topic.want(name, ratio(times, peer, "quire"), 100.0, at_least=True)
        cached = ratio(times, "fsspec, all cached", "quire")
        topic.notes.append(
            f"with every block in fsspec's cache a row of quire is {cached:.1f} times faster"
        )


def _cold(topic: Topic, remote: Remote, context: Context) -> None:
    """Granules never read before: quire by one touch each, obstore by a range of the same bytes."""
    random = np.random.default_rng(context.seed + 1)
    with remote.mapping(2 * remote.size_bytes) as probe:
        granule = probe.granule_bytes

    def picked() -> list[int]:
        whole = np.arange(1, remote.size_bytes // granule)
        return [int(one) for one in random.permutation(whole)[:COLD_GRANULES]]

    def by_touch() -> float:
        chosen = picked()
        with remote.mapping(2 * remote.size_bytes) as mapping:
            octets = mapping.array.reshape(-1).view(np.uint8)
            at = [number * granule - remote.header_bytes for number in chosen]
            took = seconds(partial(octets.take, at))
            del octets
        return took / len(chosen)

    def by_range() -> float:
        chosen = picked()
        ends = [(one * granule, min(granule, remote.size_bytes - one * granule)) for one in chosen]
        return seconds(lambda: [remote.range(*one) for one in ends]) / len(chosen)

    calls = {"quire": by_touch, "obstore": by_range}
    times = rounds_of(calls, context.rounds, context.seed)
    topic.add(times, "µs", 1e6, f"cold {granule >> 10} KiB")
    topic.want(
        "HTTP, cold: time beside obstore", ratio(times, "quire", "obstore"), 1.0, at_least=False
    )


def _sequential(topic: Topic, remote: Remote, context: Context) -> None:
    """The sum of everything.

    fsspec reads by blocks through its cache, and once more everything by one request into memory,
    which is what it does when a file is read whole: no cache, and no bound on memory.
    """
    budget = remote.size_bytes // BUDGET_PARTS
    shape, dtype = remote.plain.shape, remote.plain.dtype

    def by_quire() -> tuple[float, float]:
        with remote.mapping(budget) as mapping:
            began = seconds(lambda: sums.append(float(mapping.array.sum())))
        return began, sums.pop()

    def by_blocks() -> tuple[float, float]:
        def read() -> bytes:
            return b"".join(iter(partial(blocks.read, BLOCK_BYTES), b""))

        with remote.blocks(budget) as blocks:
            took = seconds(lambda: sums.append(_sum_of(read(), remote, shape, dtype)))
        return took, sums.pop()

    def by_one_get() -> tuple[float, float]:
        with remote.blocks(budget) as blocks:
            took = seconds(lambda: sums.append(_sum_of(blocks.read(), remote, shape, dtype)))
        return took, sums.pop()

    def by_obstore() -> tuple[float, float]:
        def read() -> bytes:
            parts = range(0, remote.size_bytes, BLOCK_BYTES)
            ends = [(one, min(BLOCK_BYTES, remote.size_bytes - one)) for one in parts]
            return b"".join(remote.range(*one) for one in ends)

        took = seconds(lambda: sums.append(_sum_of(read(), remote, shape, dtype)))
        return took, sums.pop()

    sums: list[float] = []
    expected = float(remote.plain.sum())

    def checked(work: Callable[[], tuple[float, float]]) -> Callable[[], float]:
        def call() -> float:
            took, found = work()
            require(found == expected, "the sum over HTTP")
            return took

        return call

    works = {
        "quire": by_quire,
        "fsspec": by_blocks,
        "fsspec, one GET of all": by_one_get,
        "obstore": by_obstore,
    }
    calls = {name: checked(work) for name, work in works.items()}
    times = rounds_of(calls, context.rounds, context.seed)
    topic.checks.append("the sums are equal in every bit")
    topic.add(times, "s", 1.0, "sum")
    name = "HTTP, sequential sum: faster than fsspec"
    topic.want(name, ratio(times, "fsspec", "quire"), 2.0, at_least=True)


def _sum_of(content: bytes, remote: Remote, shape: Any, dtype: Any) -> float:
    rows = np.frombuffer(content, dtype, offset=remote.header_bytes).reshape(shape)
    return float(rows.sum())


if __name__ == "__main__":
    topic_main(run)
