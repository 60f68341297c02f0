"""Compressed local data beside zarr v3 and tensorstore: same codec, level and chunk size.

quire reads seekable zstd, zarr and tensorstore read one zarr v3 array. tensorstore is given a
cache pool as large as quire's budget; zarr has no cache. tensorstore runs twice: with its default
settings, which ask the file system at each read whether a chunk is still the same, and trusting
what it has read, as quire and numpy.memmap do.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorstore
import zarr

import quire
from bench import data
from bench.result import Context, Topic, ratio, require, topic_main
from bench.timing import pretouch, rounds_of, seconds, wake_processor

if TYPE_CHECKING:
    from collections.abc import Callable

BUDGET_PARTS = 8
TRUSTING = "tensorstore, trusting"
RESIDENT_ROWS = {"quire": 20_000, "tensorstore": 1_000, TRUSTING: 1_000, "zarr": 200}
OVER_ROWS = {"1 MiB": 300, "64 KiB": 2_000}
ZARR_OVER = {"1 MiB": 1.5, "64 KiB": 5.0}


@dataclass(frozen=True)
class Peers:
    """The same rows by each contender; `budget` bytes for the two that can keep some."""

    quire: quire.Mapping
    zarr: Any
    tensorstore: Any
    trusting: Any

    def readers(self) -> dict[str, Callable[[int], Any]]:
        """How each reads one row. quire's rows are copied, as the others' are new arrays."""
        rows, chunked, store, trusting = (
            self.quire.array,
            self.zarr,
            self.tensorstore,
            self.trusting,
        )
        return {
            "quire": copier(rows),
            "zarr": lambda index: chunked[index],
            "tensorstore": lambda index: store[index].read().result(),
            TRUSTING: lambda index: trusting[index].read().result(),
        }


def copier(rows: Any) -> Callable[[int], Any]:
    """Copies one row after the other into the same buffer."""
    row = np.empty(rows.shape[1:], dtype=rows.dtype)

    def copy(index: int) -> Any:
        row[:] = rows[index]
        return row

    return copy


def open_tensorstore(folder: Path, chunk: str, budget: int, *, trusting: bool) -> Any:
    """The zarr array through tensorstore with a cache pool of `budget` bytes."""
    spec: dict[str, Any] = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(data.zarr_path(folder, chunk))},
    }
    if trusting:
        spec["recheck_cached_data"] = "open"
    pool = tensorstore.Context({"cache_pool": {"total_bytes_limit": budget}})
    return tensorstore.open(spec, context=pool, read=True).result()


def open_peers(folder: Path, chunk: str, budget: int, stack: ExitStack) -> Peers:
    """Opens all of them; quire is closed with the stack."""
    return Peers(
        stack.enter_context(quire.open(data.packed_path(folder, chunk), budget=budget)),
        zarr.open_array(data.zarr_path(folder, chunk), mode="r"),
        open_tensorstore(folder, chunk, budget, trusting=False),
        open_tensorstore(folder, chunk, budget, trusting=True),
    )


def run(context: Context) -> Topic:
    """Resident rows, rows over budget and the sum, at both chunk sizes."""
    topic = Topic("zstd rows")
    folder = Path(context.data)
    plain = np.load(data.plain_path(folder), mmap_mode="r")
    pretouch(3 * plain.nbytes)
    wake_processor()
    for chunk in data.CHUNKS:
        with ExitStack() as stack:
            peers = open_peers(folder, chunk, 2 * plain.nbytes, stack)
            _check_rows(topic, peers, plain, chunk, context)
            _resident(topic, peers, len(plain), chunk, context)
        with ExitStack() as stack:
            budget = plain.nbytes // BUDGET_PARTS
            peers = open_peers(folder, chunk, budget, stack)
            _over_budget(topic, peers, len(plain), chunk, context)
            _sequential(topic, peers, plain, chunk, context)
            statistics = peers.quire.statistics()
            topic.notes.append(
                f"{chunk}: quire kept at most {statistics.peak_resident_bytes >> 20} MiB of "
                f"{budget >> 20} MiB, granule {peers.quire.granule_bytes >> 10} KiB, "
                f"pmap {peers.quire.pmap}"
            )
    return topic


def _check_rows(topic: Topic, peers: Peers, plain: Any, chunk: str, context: Context) -> None:
    chosen = np.random.default_rng(context.seed).integers(0, len(plain), 200)
    for name, read in peers.readers().items():
        for index in chosen.tolist():
            require(np.array_equal(read(index), plain[index]), f"row {index} of {name}")
    topic.checks.append(f"{chunk}: 200 rows are equal to the plain file's in every contender")


def _rows(read: Callable[[int], Any], count: int, rows: int, random: Any) -> Callable[[], float]:
    """A contender that reads `count` rows, others each time; seconds a row."""

    def call() -> float:
        chosen = random.integers(0, rows, count).tolist()
        return seconds(lambda: read_all(read, chosen)) / count

    return call


def read_all(read: Callable[[int], Any], chosen: list[int]) -> None:
    """Reads rows one by one, as a program does that wants one after the other."""
    for index in chosen:
        read(index)


def _resident(topic: Topic, peers: Peers, rows: int, chunk: str, context: Context) -> None:
    peers.quire.array.sum()
    for store in (peers.tensorstore, peers.trusting):
        store.read().result()
    random = np.random.default_rng(context.seed + 1)
    calls = {
        name: _rows(read, RESIDENT_ROWS[name], rows, random)
        for name, read in peers.readers().items()
    }
    times = rounds_of(calls, context.rounds, context.seed)
    topic.add(times, "µs", 1e6, f"{chunk}, resident row")
    for peer, limit in (("zarr", 100.0), ("tensorstore", 50.0)):
        name = f"zstd {chunk}, resident rows: faster than {peer}"
        topic.want(name, ratio(times, peer, "quire"), limit, at_least=True)
    trusting = ratio(times, TRUSTING, "quire")
    topic.notes.append(
        f"{chunk}: a resident row is {trusting:.0f} times faster than tensorstore's when that is "
        "told to trust what it has read"
    )


def _over_budget(topic: Topic, peers: Peers, rows: int, chunk: str, context: Context) -> None:
    random = np.random.default_rng(context.seed + 2)
    calls = {
        name: _rows(read, OVER_ROWS[chunk], rows, random) for name, read in peers.readers().items()
    }
    times = rounds_of(calls, context.rounds, context.seed)
    topic.add(times, "µs", 1e6, f"{chunk}, row over budget")
    for peer, limit in (("zarr", ZARR_OVER[chunk]), ("tensorstore", 1.2)):
        name = f"zstd {chunk}, rows over budget: faster than {peer}"
        topic.want(name, ratio(times, peer, "quire"), limit, at_least=True)


def _sequential(topic: Topic, peers: Peers, plain: Any, chunk: str, context: Context) -> None:
    works: dict[str, Callable[[], Any]] = {
        "quire": lambda: peers.quire.array.sum(),
        "zarr": lambda: peers.zarr[:].sum(),
        "tensorstore": lambda: peers.tensorstore.read().result().sum(),
        TRUSTING: lambda: peers.trusting.read().result().sum(),
    }
    expected = float(plain.sum())
    for name, work in works.items():
        require(float(work()) == expected, f"the sum of {name}")
    topic.checks.append(f"{chunk}: the sums are equal in every bit")
    calls = {name: _seconds_of(work) for name, work in works.items()}
    times = rounds_of(calls, context.rounds, context.seed)
    topic.add(times, "s", 1.0, f"{chunk}, sum")
    for peer, limit in (("zarr", 1.5), ("tensorstore", 1.2)):
        name = f"zstd {chunk}, sequential sum: faster than {peer}"
        topic.want(name, ratio(times, peer, "quire"), limit, at_least=True)


def _seconds_of(work: Callable[[], Any]) -> Callable[[], float]:
    return lambda: seconds(work)


if __name__ == "__main__":
    topic_main(run)
