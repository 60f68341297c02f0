"""`quire.open` of local files that the operating system pages: the contract of every mapping."""

from __future__ import annotations

import errno
import mmap
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

import quire
from quire import opened_file
from quire.testing import children
from quire.testing.touches import touch

PAGE = mmap.PAGESIZE


@pytest.fixture(autouse=True)
def no_pmap_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUIRE_PMAP", raising=False)


@pytest.fixture
def raw_file(tmp_path: Path) -> Path:
    path = tmp_path / "raw.bin"
    path.write_bytes(b"".join(bytes([number]) * PAGE for number in range(1, 9)))
    return path


@pytest.mark.parametrize(
    ("options", "pmap"),
    [
        ({}, "kernel"),
        ({"mode": "r+"}, "kernel"),
        ({"mode": "c"}, None),
        ({"mode": "c", "pmap": "kernel"}, "kernel"),
        ({"budget": "4 MiB"}, None),
        ({"budget": "4 MiB", "pmap": "kernel"}, "kernel"),
        ({"granule": "64 KiB"}, None),
        ({"policy": "sieve"}, None),
    ],
)
def test_who_pages(rows_file: Path, rows: np.ndarray, options: dict, pmap: str | None) -> None:
    with quire.open(rows_file, **options) as mapping:
        assert (mapping.pmap == "kernel") == (pmap == "kernel")
        assert isinstance(mapping, quire.KernelMapping) == (pmap == "kernel")
        assert mapping.mode == options.get("mode", "r")
        assert type(mapping.array) is np.ndarray
        assert mapping.array.flags.writeable == (mapping.mode != "r")
        assert np.array_equal(mapping.array, rows)
        assert mapping.size_bytes == rows_file.stat().st_size


def test_the_environment_says(rows_file: Path, monkeypatch: pytest.MonkeyPatch, pmap: str) -> None:
    monkeypatch.setenv("QUIRE_PMAP", pmap)
    with quire.open(rows_file) as mapping:
        assert mapping.pmap == pmap
    monkeypatch.setenv("QUIRE_PMAP", "kernel")
    with quire.open(rows_file) as mapping, quire.anonymous(PAGE) as memory:
        assert mapping.pmap == "kernel"
        assert memory.pmap != "kernel"


def test_what_the_kernel_has_not(rows_file: Path) -> None:
    for option in ({"granule": 4096}, {"policy": "clock"}, {"swap": quire.Swap(), "mode": "c"}):
        with pytest.raises(quire.PmapError, match="leave one of the two out"):
            quire.open(rows_file, pmap="kernel", **option)
    with pytest.raises(ValueError, match="no other home than memory"):
        quire.open(rows_file, pmap="kernel", mode="c", budget="1 MiB")


def test_sources_that_are_no_plain_file(rows_file: Path, tmp_path: Path) -> None:
    packed, empty = tmp_path / "rows.npy.zst", tmp_path / "empty.bin"
    quire.pack(rows_file, packed)
    empty.touch()
    for source, why in ((packed, "not compressed"), (empty, "empty")):
        with pytest.raises(quire.PmapError, match=why):
            quire.open(source, dtype="u1", pmap="kernel")
    with quire.open(empty, dtype="u1") as mapping:
        assert mapping.array.shape == (0,)


@pytest.mark.parametrize("order", ["C", "F"])
def test_shapes(tmp_path: Path, order: str) -> None:
    path = tmp_path / "array.npy"
    array = np.asarray(np.arange(60, dtype=">i4").reshape(3, 4, 5), order=order)
    np.save(path, array)
    with quire.open(path) as mapping:
        assert mapping.shape == array.shape
        assert mapping.dtype == array.dtype
        assert mapping.order == order
        assert mapping.array.tolist() == array.tolist()
    path.write_bytes(b"head" + array.tobytes(order="A"))
    how = {"dtype": ">i4", "shape": (3, 4, -1), "offset": 4, "order": order}
    with quire.open(path, **how) as mapping:
        assert mapping.pmap == "kernel"
        assert mapping.array.tolist() == array.tolist()
        assert bytes(memoryview(mapping)[:4]) == b"head"


def test_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "new.npy"
    with quire.open(path, mode="w+", dtype="f8", shape=(100, 10)) as mapping:
        assert mapping.pmap == "kernel"
        assert mapping.mode == "r+"
        mapping.array[7] = 7
    assert np.load(path)[7].tolist() == [7] * 10
    with pytest.raises(quire.PmapError):
        quire.open(path, mode="w+", dtype="u1", shape=(10,), pmap="kernel", policy="clock")
    assert np.load(path).shape == (100, 10)


def test_writes(raw_file: Path) -> None:
    with quire.open(raw_file, dtype="u1", mode="r+") as mapping:
        mapping.array[0] = 99
        with open(raw_file, "rb") as file:
            assert file.read(1) == b"c"  # one memory: nothing waits to be written back
        with open(raw_file, "r+b") as file:
            file.write(b"zz")
        assert mapping.array[:2].tolist() == [ord("z")] * 2
        mapping.sync(3, PAGE)
        mapping.write(b"end", mapping.size_bytes - 3)
    assert raw_file.read_bytes()[-3:] == b"end"


def test_two_writable_mappings_are_one_memory(raw_file: Path) -> None:
    with (
        quire.open(raw_file, dtype="u1", mode="r+") as one,
        quire.open(raw_file, dtype="u1", mode="r+") as other,
    ):
        one.array[5], other.array[6] = 50, 60
        assert other.array[5:7].tolist() == one.array[5:7].tolist() == [50, 60]
    assert list(raw_file.read_bytes()[5:7]) == [50, 60]


def test_private_stores_stay_here_and_survive_advice(raw_file: Path) -> None:
    with quire.open(raw_file, dtype="u1", mode="c", pmap="kernel") as mapping:
        mapping.array[:PAGE] = 77
        mapping.advise("dontneed")
        mapping.evict()
        assert mapping.array[: PAGE + 1].tolist() == [77] * PAGE + [2]
    assert raw_file.read_bytes()[0] == 1


def test_residency(raw_file: Path) -> None:
    with quire.open(raw_file, dtype="u1") as mapping:
        mapping.prefetch(np.s_[: 4 * PAGE]).result(60)
        assert mapping.resident(np.s_[: 4 * PAGE]).all()
        with mapping.pin(np.s_[PAGE : 2 * PAGE]) as pin:
            assert bytes(pin.data[:3]) == b"\2\2\2"
            mapping.evict()
            assert mapping.resident(np.s_[PAGE : 2 * PAGE]).all()
        for advice in ("normal", "random", "sequential", "willneed", "dontneed"):
            mapping.advise(advice)
        assert mapping.array[::PAGE].tolist() == list(range(1, 9))
        assert mapping.statistics().resident_bytes > 0
        assert mapping.statistics().errors == 0


def test_a_truncated_file_raises_and_heals(raw_file: Path) -> None:
    with quire.open(raw_file, dtype="u1") as mapping:
        array = mapping.array
        whole = raw_file.read_bytes()
        os.truncate(raw_file, 2 * PAGE)
        with pytest.raises(quire.TruncatedError) as caught:
            touch(array, 5 * PAGE)
        assert (caught.value.source, caught.value.offset) == (str(raw_file), 5 * PAGE)
        with pytest.raises(quire.PageIOError):
            mapping.check()
        raw_file.write_bytes(whole)
        assert touch(array, 5 * PAGE) == 6


def test_closing_syncs_what_was_written(raw_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    real = quire.KernelMapping.sync
    monkeypatch.setattr(
        quire.KernelMapping, "sync", lambda self, *at, **how: synced.append(real(self, *at, **how))
    )
    quire.open(raw_file, dtype="u1", mode="r+").close()
    with quire.open(raw_file, dtype="u1", mode="r+"):
        pass
    assert len(synced) == 2
    quire.open(raw_file, dtype="u1", mode="r+").close(discard=True)
    quire.open(raw_file, dtype="u1").close()
    quire.open(raw_file, dtype="u1", mode="c", pmap="kernel").close()
    assert len(synced) == 2


def test_a_sync_that_fails_leaves_it_open(raw_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_at: object, **_how: object) -> None:
        raise quire.SyncError("no space", source=str(raw_file), offset=0, errno=errno.ENOSPC)

    mapping = quire.open(raw_file, dtype="u1", mode="r+")
    mapping.array[0] = 5
    with monkeypatch.context() as patch:
        patch.setattr(quire.KernelMapping, "sync", full)
        with pytest.raises(quire.SyncError):
            mapping.close()
        assert not mapping.closed
        mapping.close(discard=True)
    assert mapping.closed


def test_a_replaced_file_is_told(raw_file: Path, tmp_path: Path) -> None:
    mapping = quire.open(raw_file, dtype="u1", mode="r+")
    opened = raw_file.stat().st_ino
    (tmp_path / "other").write_bytes(bytes(PAGE))
    (tmp_path / "other").replace(raw_file)
    mapping.array[4] = 88
    for save in (mapping.sync, mapping.close, lambda: mapping.__exit__(None, None, None)):
        with pytest.raises(quire.SyncError, match=r"was replaced.*discard=True") as caught:
            save()
        assert caught.value.source == str(raw_file)
        assert str(opened) in str(caught.value)
        assert str(raw_file.stat().st_ino) in str(caught.value)
    assert mapping.array[4] == 88
    assert not raw_file.read_bytes().strip(b"\0")
    raw_file.unlink()  # who unlinks a file that is in use means it
    mapping.close()


def test_a_replaced_file_that_is_only_read_is_not_told(raw_file: Path, tmp_path: Path) -> None:
    for options in ({}, {"mode": "c", "pmap": "kernel"}):
        mapping = quire.open(raw_file, dtype="u1", **options)
        (tmp_path / "other").write_bytes(raw_file.read_bytes())
        (tmp_path / "other").replace(raw_file)
        mapping.sync()
        mapping.close()


def test_a_path_that_was_relative(raw_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(raw_file.parent)
    mapping = quire.open(raw_file.name, dtype="u1", mode="r+")
    (raw_file.parent / "folder").mkdir()
    monkeypatch.chdir(raw_file.parent / "folder")
    Path(raw_file.name).write_bytes(b"another")
    mapping.sync()
    mapping.close()


def test_a_descriptor_of_this_process_by_its_path(raw_file: Path, tmp_path: Path) -> None:
    with raw_file.open("r+b") as file:
        mapping = quire.open(f"/proc/self/fd/{file.fileno()}", dtype="u1", mode="r+")
        (tmp_path / "other").write_bytes(b"x")
        with (tmp_path / "other").open("rb") as other:
            os.dup2(other.fileno(), file.fileno())
        mapping.close()


def test_a_file_replaced_while_it_is_opened(
    raw_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size and the version are those of the first, and so must be the pages."""
    real = opened_file._core.map_kernel

    def replacing(path: str, *how: object) -> object:
        (tmp_path / "other").write_bytes(bytes(PAGE))
        (tmp_path / "other").replace(path)
        return real(path, *how)  # type: ignore[arg-type]

    monkeypatch.setattr(opened_file._core, "map_kernel", replacing)
    for mode in ("r", "r+"):
        with pytest.raises(quire.ChangedError, match="while it was opened") as caught:
            quire.open(raw_file, dtype="u1", mode=mode)
        assert caught.value.source == str(raw_file)


def test_a_part_that_was_split_off_is_durable(raw_file: Path, tmp_path: Path) -> None:
    with quire.open(raw_file, dtype="u1", mode="r+") as mapping:
        rest = mapping.split(2 * PAGE)
        assert isinstance(rest, quire.KernelMapping)
        assert rest.version == mapping.version
        rest.array[0] = 99
        (tmp_path / "other").write_bytes(b"x")
        (tmp_path / "other").replace(raw_file)
        with pytest.raises(quire.SyncError, match="was replaced"):
            rest.close()
        rest.close(discard=True)
        mapping.protect("r")
        with pytest.raises(quire.SyncError, match="was replaced"):
            mapping.close()
        mapping.close(discard=True)


def test_views_keep_it_alive(raw_file: Path) -> None:
    with quire.open(raw_file, dtype="u1") as mapping:
        array = mapping.array
        with pytest.raises(BufferError):
            mapping.close()
    assert array[PAGE] == 2
    del array
    assert mapping.closed
    with pytest.raises(quire.ClosedError):
        _ = mapping.array


def test_pickled_as_a_reference(rows_file: Path, rows: np.ndarray) -> None:
    with quire.open(rows_file) as mapping:
        sent = pickle.dumps(mapping)
        assert len(sent) < 2000
        with pickle.loads(sent) as other:
            assert other.pmap == "kernel"
            assert other.version == mapping.version
            assert np.array_equal(other.array, rows)
        np.save(rows_file, rows[:5])
        with pytest.raises(quire.ChangedError, match="changed after"):
            pickle.loads(sent)


def test_a_child_writes_to_the_same_memory(raw_file: Path) -> None:
    with quire.open(raw_file, dtype="u1", mode="r+") as mapping:
        array = mapping.array

        def child() -> None:
            assert array[0] == 1
            array[1] = 123

        assert children.in_fork(child) == ""
        assert array[1] == 123


def test_it_grows_with_its_file(raw_file: Path) -> None:
    with quire.open(raw_file, dtype="u1", offset=PAGE) as mapping:
        os.truncate(raw_file, 16 * PAGE)
        assert mapping.shape == (7 * PAGE,)
        mapping.resize(16 * PAGE)
        assert mapping.shape == (15 * PAGE,)
        assert mapping.array[0] == 2


def test_descriptors_come_back(raw_file: Path) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    for _ in range(50):
        quire.open(raw_file, dtype="u1").close()
        with pytest.raises(quire.FormatError):
            quire.open(raw_file)
    assert descriptors() <= before + 1
