import errno
import os
import pickle
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import quire
from quire import _core
from quire.creation import RawShape, plan
from quire.testing import children
from quire.testing.stores import BytesStore


def test_a_npy_file_is_numpys(tmp_path):
    path = tmp_path / "new.npy"
    with quire.open(path, mode="w+", dtype=">i4", shape=(30, 41), order="F") as mapping:
        assert mapping.mode == "r+"
        assert (mapping.shape, mapping.order) == ((30, 41), "F")
        assert mapping.dtype == np.dtype(">i4")
        assert not mapping.array.any()
        mapping.array[3] = np.arange(41)
    there = np.load(path)
    assert there.dtype == np.dtype(">i4")
    assert there.flags.f_contiguous
    assert np.array_equal(there[3], np.arange(41))
    assert there.sum() == np.arange(41).sum()
    by_numpy = tmp_path / "numpy.npy"
    np.save(by_numpy, there)
    assert by_numpy.read_bytes() == path.read_bytes()


def test_structured_elements_in_a_npy_file(tmp_path):
    dtype = np.dtype([("id", "<u4"), ("xy", "<f8", (2,)), ("name", "U5")])
    with quire.open(tmp_path / "new.npy", mode="w+", dtype=dtype, shape=7) as mapping:
        mapping.array["name"] = "abc"
        mapping.array["xy"][:, 1] = 2.5
    there = np.load(tmp_path / "new.npy")
    assert there.dtype == dtype
    assert there["name"].tolist() == ["abc"] * 7
    assert there["xy"].tolist() == [[0.0, 2.5]] * 7


def test_raw_bytes(tmp_path):
    path = tmp_path / "new.bin"
    with quire.open(path, mode="w+", shape=(3, 5)) as mapping:
        assert mapping.dtype == np.uint8
        mapping.array[2, 4] = 9
    assert path.read_bytes() == bytes(14) + b"\x09"
    with quire.open(path, mode="w+", dtype="<u2", shape=(2, 2), order="F", offset=10) as mapping:
        mapping.array[0, 1] = 0x0201
        assert mapping.size_bytes == 18
    assert path.read_bytes() == bytes(14) + b"\x01\x02" + bytes(2)


def test_it_replaces_what_was_there(rows_file):
    with quire.open(rows_file, mode="w+", dtype="i8", shape=(4,)) as mapping:
        mapping.array[:] = 1
    assert np.load(rows_file).tolist() == [1, 1, 1, 1]


def test_a_file_url_and_text_and_bytes_are_paths(tmp_path):
    for number, name in enumerate([f"file://{tmp_path}/a%20b.npy", str(tmp_path / "c.npy")]):
        with quire.open(name, mode="w+", dtype="i4", shape=2) as mapping:
            mapping.array[1] = number
    assert np.load(tmp_path / "a b.npy").tolist() == [0, 0]
    assert np.load(tmp_path / "c.npy").tolist() == [0, 1]


def test_a_large_file_is_sparse(tmp_path):
    path = tmp_path / "large.npy"
    with quire.open(path, mode="w+", dtype="u1", shape=(1 << 36,), budget="1 MiB") as mapping:
        mapping.array[1 << 35] = 1
    assert path.stat().st_size > 1 << 36
    assert path.stat().st_blocks * 512 < 1 << 20


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("new.bin", {"dtype": "u1"}, "give its shape="),
        ("new.bin", {"dtype": "u1", "shape": (-1, 3)}, "every length of the shape"),
        ("https://example.org/new.bin", {"shape": 3}, "makes a local file"),
        ("s3://bucket/new.npy", {"shape": 3}, "makes a local file"),
        (BytesStore(b"content"), {"shape": 3}, "makes a local file"),
    ],
)
def test_what_cannot_be_made_is_refused(source, options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(quire.ModeError, match=said):
        quire.open(source, mode="w+", **options)
    assert list(tmp_path.iterdir()) == []


def test_elements_that_are_objects_are_refused(tmp_path):
    for name in ("new.npy", "new.bin"):
        with pytest.raises(quire.FormatError, match="object"):
            quire.open(tmp_path / name, mode="w+", dtype=object, shape=3)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(quire.SourceError) as caught:
        quire.open(tmp_path / "no" / "new.npy", mode="w+", shape=3)
    assert caught.value.errno == errno.ENOENT
    assert caught.value.source == str(tmp_path / "no" / "new.npy")


def test_a_plan_says_how_to_open_and_makes_nothing(tmp_path):
    raw = RawShape("<i4", (2, 3), 0, "F")
    assert plan(tmp_path / "a.npy", raw, None).raw == RawShape()
    new = plan(tmp_path / "a.bin", raw, None)
    assert new.raw == RawShape("<i4", (2, 3), 0, "F")
    assert list(tmp_path.iterdir()) == []
    new.make()
    assert (tmp_path / "a.bin").stat().st_size == new.size_bytes == 24


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"policy": "mru"}, ValueError),
        ({"pmap": "magic"}, quire.PmapError),
        ({"granule": 1000}, ValueError),
        ({"budget": 1}, quire.BudgetError),
        ({"budget": "lots"}, ValueError),
        ({"swap": quire.Swap(limit="1 MiB")}, quire.ModeError),
        ({"storage_options": {"anon": True}}, quire.SourceError),
        ({"dtype": object}, quire.FormatError),
        ({"shape": (1 << 62,)}, quire.FormatError),
        ({"shape": (1 << 60,)}, ValueError),
    ],
    ids=lambda given: str(given) if isinstance(given, dict) else "",
)
def test_what_is_refused_leaves_the_file_that_is_there(options, kind, rows_file):
    before = rows_file.read_bytes()
    with pytest.raises(kind):
        quire.open(rows_file, mode="w+", **({"dtype": "f4", "shape": (3, 3)} | options))
    assert rows_file.read_bytes() == before


def test_a_length_that_the_system_refuses_leaves_the_file_that_is_there(rows_file):
    before = rows_file.read_bytes()

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))
        with pytest.raises(quire.SourceError) as caught:
            quire.open(rows_file, mode="w+", shape=(8 << 20,))
        assert caught.value.errno == errno.EFBIG

    assert children.in_fork(limited) == ""
    assert rows_file.read_bytes() == before


def test_swap_is_for_mode_c(rows_file):
    for mode in ("r", "r+"):
        with pytest.raises(quire.ModeError, match=r'swap= .* mode "c"'):
            quire.open(rows_file, mode=mode, swap=quire.Swap(limit="1 MiB"))


def test_modes_are_named(rows_file):
    for mode in ("rw", "w", "", "R+", "readwrite"):
        with pytest.raises(quire.ModeError, match=r"is no mode: there are 'r', 'r\+', 'w\+'"):
            quire.open(rows_file, mode=mode)


def test_compressed_and_python_sources_are_refused(rows_file, tmp_path):
    quire.pack(rows_file, tmp_path / "rows.zst")
    for source in (tmp_path / "rows.zst", BytesStore(rows_file.read_bytes())):
        with pytest.raises(quire.ModeError, match="source that can be written") as caught:
            quire.open(source, mode="r+")
        assert 'mode "c" keeps changes' in str(caught.value)
        assert ("zstd" in str(caught.value)) == (source == tmp_path / "rows.zst")
        assert caught.value.source


def test_a_native_store_opened_for_reading_is_refused(rows_file):
    store = _core.open_file(rows_file)
    assert store.read_only
    with pytest.raises(quire.ModeError, match="cannot"):
        quire.open(store, mode="r+")
    writable = _core.open_file(rows_file, True)
    assert writable.read_only is None
    writable.close()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may look into, and only its owner may change."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_a_file_that_may_only_be_read_is_refused(open_folder):
    path = open_folder / "rows.npy"
    np.save(path, np.arange(5000.0))
    path.chmod(0o444)

    def as_ordinary_user() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        for mode, options in (("r+", {}), ("w+", {"shape": 3})):
            with pytest.raises(quire.SourceError) as caught:
                quire.open(path, mode=mode, **options)
            assert caught.value.errno == errno.EACCES, str(caught.value)
            assert caught.value.source == str(path)
        with quire.open(path) as mapping:
            assert mapping.array[4999] == 4999

    assert children.in_fork(as_ordinary_user) == ""
    assert np.load(path)[4999] == 4999


def test_writes_reach_the_file_and_its_other_readers(rows, rows_file):
    with quire.open(rows_file, mode="r+") as mapping:
        assert mapping.mode == "r+"
        mapping.array[7] += 1
        mapping.flush()
        assert np.array_equal(np.load(rows_file)[7], rows[7] + 1)
        mapping.array[8, 3] = -1
    assert np.load(rows_file)[8, 3] == -1
    with quire.open(rows_file, mode="r") as mapping:
        assert mapping.array[8, 3] == -1
        mapping.sync()  # nothing to do
        assert mapping.dirty_tracking is None


def test_a_writable_mapping_is_pickled_as_one(tmp_path):
    path = tmp_path / "new.npy"
    with quire.open(path, mode="w+", dtype="i4", shape=3) as mapping:
        mapping.array[:] = [1, 2, 3]
        mapping.sync()
        data = pickle.dumps(mapping)
    with pickle.loads(data) as twin:
        assert twin.mode == "r+"
        assert twin.array.tolist() == [1, 2, 3]  # not made anew
        twin.array[0] = 9
    assert np.load(path).tolist() == [9, 2, 3]
