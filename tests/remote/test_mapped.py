"""Remote sources mapped by `quire.open`: the same array as in the file, or an error with words."""

from __future__ import annotations

import errno
import os
import pickle
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import user_stores

import quire
from quire.store.resolve import resolve

if TYPE_CHECKING:
    from collections.abc import Callable

    from misbehaving_server import Misbehaving

    from quire.tools.range_server import RangeServer

MIB = 1 << 20
BUDGET = "1 MiB"
QUICK = {"retry_config": {"max_retries": 1, "backoff": {"init_backoff": 0.001}}}
NAMES = ("rows.npy", "rows.npy.zst")

pytestmark = pytest.mark.usefixtures("no_mapping_left")


def touch(array: np.ndarray, *index: int) -> float:
    """One element; the loop gives the interpreter a place to raise what the touch met."""
    value = float(array[index])
    for _ in range(3):
        pass
    return value


def pager_pids() -> set[int]:
    """The pager processes that are children of this one."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            if b"quire.pager" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(int(pid))
    return found


@pytest.fixture
def served_rows(folder: Path, rows: np.ndarray) -> np.ndarray:
    """`rows` served as a plain file."""
    np.save(folder / NAMES[0], rows)
    return rows


@pytest.fixture
def packed_rows(folder: Path, served_rows: np.ndarray) -> np.ndarray:
    """`rows` served as a plain and as a packed file."""
    quire.pack(folder / NAMES[0], folder / NAMES[1], frame="64 KiB")
    return served_rows


@pytest.fixture
def url(server: RangeServer, served_rows: np.ndarray) -> str:
    """The plain file on the well-behaved server."""
    return f"{server.url}/{NAMES[0]}"


@pytest.mark.parametrize("name", NAMES)
def test_http(server: RangeServer, packed_rows: np.ndarray, name: str) -> None:
    with quire.open(f"{server.url}/{name}", budget=BUDGET) as mapping:
        array = mapping.array
        assert type(array) is np.ndarray
        for row in np.random.default_rng(1).integers(0, len(packed_rows), 100):
            assert np.array_equal(array[row], packed_rows[row])
        assert np.array_equal(array, packed_rows)
        statistics = mapping.statistics()
        assert statistics.bytes_fetched > 0
        assert statistics.peak_resident_bytes <= 1 << 20
        del array
    assert not pager_pids()


@pytest.mark.parametrize("name", NAMES)
def test_s3(
    bucket: Any, s3_endpoint: str, folder: Path, packed_rows: np.ndarray, name: str
) -> None:
    bucket.upload_file(str(folder / name), f"data/{name}")
    options = {"endpoint": s3_endpoint, "key": "key", "secret": "secret", "region": "us-east-1"}
    url = f"s3://quire-test/data/{name}"
    with quire.open(url, budget=BUDGET, storage_options=options) as mapping:
        assert np.array_equal(mapping.array, packed_rows)
        assert mapping.source == url
    assert not pager_pids()


@pytest.mark.parametrize(
    ("path", "words", "number"),
    [("nothing.npy", "404", errno.ENOENT), ("../outside.npy", "403|404", None)],
)
def test_what_is_not_there(server: RangeServer, path: str, words: str, number: int | None) -> None:
    with pytest.raises(quire.SourceError, match=words) as caught:
        quire.open(f"{server.url}/{path}")
    assert number in (None, caught.value.errno)
    assert not pager_pids()


def test_a_pager_that_is_killed_is_started_again(url: str, served_rows: np.ndarray) -> None:
    with quire.open(url, budget=BUDGET) as mapping:
        mapping.advise("random")  # nothing is there before it is touched
        array = mapping.array
        for row in range(0, len(array), 64):
            (pid,) = pager_pids()
            os.kill(pid, signal.SIGKILL)
            assert np.array_equal(array[row], served_rows[row])
        assert mapping.failed is None
        del array
    assert not pager_pids()


def test_a_pager_that_always_dies() -> None:
    with quire.open(user_stores.DyingStore(), dtype="u8") as mapping:
        array = mapping.array
        with pytest.raises(quire.PagerDiedError, match="died"):
            touch(array, len(array) // 2)
        assert isinstance(mapping.failed, quire.PagerDiedError)
        del array


def test_reads_that_each_want_all_slots_do_not_wait_for_each_other() -> None:
    opened = resolve(user_stores.PatternStore(), budget_bytes=1 << 20, timeout_s=5.0)
    with closing(opened.store) as store, ThreadPoolExecutor(8) as pool:
        offsets = [(number * 300_007) % (store.size - MIB) for number in range(200)]
        answers = pool.map(lambda offset: store.read(offset, MIB), offsets)
        for offset, got in zip(offsets, answers, strict=True):
            assert got == user_stores.pattern(offset, MIB)


def overwrite(path: Path, rows: np.ndarray) -> None:
    np.save(path.with_suffix(".new"), rows + 1)
    path.with_suffix(".new.npy").replace(path)


def test_an_object_that_changes(url: str, served_rows: np.ndarray, folder: Path) -> None:
    with quire.open(url, budget=BUDGET) as mapping:
        array = mapping.array
        assert touch(array, 0, 0) == served_rows[0, 0]
        overwrite(folder / NAMES[0], served_rows)
        with pytest.raises(quire.ChangedError, match="changed while it was mapped"):
            touch(array, 500, 0)
        assert isinstance(mapping.failed, quire.ChangedError)
        with pytest.raises(quire.ChangedError):
            mapping.check()
        del array


def test_an_object_that_changes_while_the_pager_is_dead(
    url: str, served_rows: np.ndarray, folder: Path
) -> None:
    with quire.open(url, budget=BUDGET) as mapping:
        array = mapping.array
        assert touch(array, 0, 0) == served_rows[0, 0]
        (pid,) = pager_pids()
        overwrite(folder / NAMES[0], served_rows)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(quire.ChangedError):
            touch(array, 500, 0)
        del array


def test_an_s3_object_that_changes(
    bucket: Any, s3_endpoint: str, folder: Path, packed_rows: np.ndarray
) -> None:
    bucket.upload_file(str(folder / NAMES[1]), "rows.zst")
    options = {"endpoint": s3_endpoint, "key": "key", "secret": "secret"}
    with quire.open("s3://quire-test/rows.zst", budget=BUDGET, storage_options=options) as mapping:
        array = mapping.array
        assert touch(array, 0, 0) == packed_rows[0, 0]
        bucket.put_object(Key="rows.zst", Body=(folder / NAMES[1]).read_bytes()[::-1])
        with pytest.raises(quire.ChangedError):
            touch(array, 500, 0)
        del array


@pytest.mark.parametrize(
    ("misbehave", "kind", "number"),
    [
        (lambda server: server.behave("status", status=500), quire.PageIOError, errno.EIO),
        (lambda server: server.stop(), quire.PageIOError, errno.ECONNREFUSED),
        (lambda server: server.behave(sending="truncate", bytes=9), quire.TruncatedError, None),
        (lambda server: server.behave("ignore_range"), quire.PageIOError, errno.EIO),
    ],
)
def test_a_server_that_fails(
    bad_server: Misbehaving,
    served_rows: np.ndarray,
    misbehave: Callable[[Misbehaving], None],
    kind: type[quire.PageIOError],
    number: int | None,
) -> None:
    url = f"{bad_server.url}/{NAMES[0]}"
    with quire.open(url, budget=BUDGET, storage_options=QUICK) as mapping:
        array = mapping.array
        assert touch(array, 0, 0) == served_rows[0, 0]
        misbehave(bad_server)
        with pytest.raises(kind) as caught:
            touch(array, 500, 0)
        assert caught.value.source == url
        assert caught.value.errno == number
        assert caught.value.offset is not None
        del array


def test_failures_that_pass_are_not_seen(bad_server: Misbehaving, packed_rows: np.ndarray) -> None:
    with quire.open(
        f"{bad_server.url}/{NAMES[1]}", budget=BUDGET, storage_options=QUICK
    ) as mapping:
        bad_server.behave("status", status=503, count=1)
        assert np.array_equal(mapping.array, packed_rows)


def test_a_stalled_server_meets_the_deadline(
    bad_server: Misbehaving, served_rows: np.ndarray
) -> None:
    with quire.open(f"{bad_server.url}/{NAMES[0]}", budget=BUDGET, timeout=2) as mapping:
        array = mapping.array
        bad_server.behave(sending="stall")
        with pytest.raises(quire.PageTimeoutError):
            touch(array, 500, 0)
        del array
    assert not pager_pids()


def test_stores_of_ones_own() -> None:
    with quire.open(user_stores.PatternStore(), dtype="u8", budget=BUDGET) as mapping:
        assert np.array_equal(mapping.array, np.arange(user_stores.SIZE_BYTES // 8))
        assert mapping.version == "v1"


def test_a_store_that_raises() -> None:
    with quire.open(user_stores.RaisingStore(), dtype="u8", granule="4 KiB") as mapping:
        array = mapping.array
        assert touch(array, len(array) - 1) == len(array) - 1
        with pytest.raises(quire.ChecksumError, match="sum is wrong"):
            touch(array, 7 * 4096 // 8)
        del array


def test_a_mapping_travels_as_a_recipe(url: str, served_rows: np.ndarray, folder: Path) -> None:
    with quire.open(url, budget=BUDGET) as mapping:
        pickled = pickle.dumps(mapping)
        assert len(pickled) < 4096
        with pickle.loads(pickled) as again:
            assert np.array_equal(again.array, served_rows)
    overwrite(folder / NAMES[0], served_rows)
    with pytest.raises(quire.ChangedError):
        pickle.loads(pickled)
