"""`quire.compat.memmap` beyond numpy's tests: closing, passing on, other sources, failures."""

from __future__ import annotations

import gc
import os
import pickle
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import joblib
import numpy as np
import pytest

import quire
from quire.compat.memmap import load, memmap, open_memmap
from quire.testing import children
from quire.testing.touches import touch
from quire.testing.waiting import wait_until

LENGTH = 5000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "numbers.bin"
    np.arange(LENGTH, dtype="f8").tofile(found)
    return found


@pytest.fixture
def npy(tmp_path: Path) -> Path:
    found = tmp_path / "table.npy"
    np.save(found, np.arange(LENGTH * 2, dtype="i4").reshape(-1, 2))
    return found


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
@pytest.mark.parametrize("offset", [0, 8, 4096, 4104, 8 * LENGTH])
@pytest.mark.parametrize("order", ["C", "F"])
def test_it_is_as_numpys(path: Path, mode: str, offset: int, order: str) -> None:
    count = (LENGTH - offset // 8) // 2
    ours = memmap(path, "f8", mode, offset, (2, count), order)
    theirs = np.memmap(path, "f8", mode, offset, (2, count), order)
    np.testing.assert_array_equal(ours, theirs)
    for name in ("offset", "mode", "filename", "shape", "strides", "dtype", "nbytes"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for flag in ("WRITEABLE", "C_CONTIGUOUS", "F_CONTIGUOUS", "OWNDATA"):
        assert ours.flags[flag] == theirs.flags[flag], flag
    assert type(ours + 1) is type(theirs + 1) is np.ndarray
    if count:
        assert type(ours[:, :1]) is memmap
        assert type(ours[0, 0]) is type(theirs[0, 0])
        assert type(ours.sum()) is type(theirs.sum())


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
@pytest.mark.parametrize("size", [0, 5, 4096])
def test_nothing_is_left_behind_the_offset(tmp_path: Path, mode: str, size: int) -> None:
    shapes = []
    for of in (np.memmap, memmap):
        path = tmp_path / of.__module__
        path.write_bytes(bytes(size))
        try:
            shapes.append(of(path, "u1", mode, offset=size).shape)
        except ValueError as refused:  # an empty file that cannot be made longer
            shapes.append(str(refused))
        assert path.stat().st_size == (size or (1 if mode == "r+" else 0))
    ours, theirs = shapes
    assert ours == theirs == ((0,) if size or mode == "r+" else "cannot mmap an empty file")


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "q"},
        {"mode": "w+"},
        {"dtype": "i4,i4,i4", "mode": "r"},
        {"mode": "r", "shape": LENGTH * 9},
        {"mode": "c", "shape": LENGTH * 9},
    ],
    ids=str,
)
def test_what_numpy_refuses_is_refused(path: Path, arguments: dict[str, object]) -> None:
    arguments = {"dtype": "f8", **arguments}
    for cls in (np.memmap, memmap):
        with pytest.raises(ValueError):
            cls(path, **arguments)


def test_refused_by_quire_alone(path: Path) -> None:
    with pytest.raises(ValueError, match="past the end"):
        memmap(path, "f8", "r", 9 * LENGTH)
    with pytest.raises(ValueError, match="negative"):
        memmap(path, "f8", "r+", -8)
    with pytest.raises(ValueError, match="Python objects"):
        memmap(path, object, "r")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        memmap(tmp_path / "absent", mode="r")
    with pytest.raises(IsADirectoryError):
        memmap(tmp_path, mode="r+")


@pytest.mark.parametrize("kind", [str, Path, os.fsencode, open])
def test_new_files(tmp_path: Path, kind: object) -> None:
    target = tmp_path / "new.bin"
    target.write_bytes(b"old content" * 100)
    name = open(target, "w+b") if kind is open else kind(str(target))
    made = memmap(name, "i2", "w+", offset=6, shape=(3, 4))
    made[:] = 7
    made.flush()
    assert target.stat().st_size >= 6 + 24
    assert target.read_bytes()[6:30] == b"\7\0" * 12
    if kind is open:
        name.close()
    made[0, 0] = 8  # the file object is not needed any more
    assert np.memmap(target, "i2", "r", offset=6, shape=(3, 4))[0, 0] == 8


class TestClose:
    def test_it_writes_back_and_ends_the_array_and_its_views(self, path: Path) -> None:
        mapped = memmap(path, "f8")
        view, exact = mapped[10:], mapped.array
        mapped[0] = -1
        mapped.close()
        assert mapped.closed
        assert np.fromfile(path, "f8")[0] == -1
        for array in (mapped.array, view, exact):
            with pytest.raises(quire.ProtectionError):
                touch(array.view("u1"), 0)
        mapped.close()
        mapped.flush()
        del mapped, view, exact, array
        gc.collect()
        assert str(path) not in Path("/proc/self/maps").read_text()

    def test_a_with_block(self, path: Path) -> None:
        with memmap(path, "f8", "r") as mapped:
            total = mapped.sum()
        assert total == np.arange(LENGTH).sum()
        assert mapped.closed

    def test_the_file_is_not_held_when_arrays_are_gone(self, path: Path) -> None:
        def descriptors() -> int:
            return len(list(Path("/proc/self/fd").iterdir()))

        before = descriptors()
        mapped = memmap(path, "f8")
        view = mapped[3:][::2]
        del mapped
        assert view[0] == 3
        del view
        assert descriptors() == before


def test_a_truncated_file_raises(path: Path) -> None:
    mapped = memmap(path, "f8", "r+")
    os.truncate(path, 0)
    with pytest.raises(quire.TruncatedError, match=path.name):
        touch(mapped.array.view("u1"), 32_000)


def test_threads_open_one_file_for_writing(tmp_path: Path) -> None:
    """Each makes the file anew, under the others' arrays: they may raise, and nothing crashes."""
    assert children.run(open_at_once, tmp_path / "same.bin").check() == "well\n"


def open_at_once(path: str) -> None:
    gate, wrong = threading.Barrier(4), []

    def work() -> None:
        gate.wait()
        for _ in range(100):
            try:
                made = memmap(path, "i4", "w+", shape=(1000, 10))
                made[:] = 1
                made.sum()
            except quire.TruncatedError:
                continue
            except BaseException as error:
                wrong.append(error)
                raise

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = memmap(path, "i4", "w+", shape=(1000, 10))
    assert not made.any()
    print(wrong or "well")


class TestPickling:
    @pytest.mark.parametrize("mode", ["r", "r+", "c"])
    @pytest.mark.parametrize(
        "part", [np.s_[:], np.s_[3:9], np.s_[::-2], np.s_[1:, 1], np.s_[2], np.s_[::3, ::-1]]
    )
    @pytest.mark.parametrize("protocol", [2, 5])
    def test_parts(self, path: Path, mode: str, part: object, protocol: int) -> None:
        mapped = memmap(path, "f8", mode, 8, (-(-LENGTH // 8), 4), "F")
        found = mapped[part]
        data = pickle.dumps(found, protocol)
        assert len(data) < 2000
        again = pickle.loads(data)
        np.testing.assert_array_equal(again, found)
        assert (type(again), again.strides, again.dtype) == (memmap, found.strides, found.dtype)
        assert again.flags.writeable == found.flags.writeable

    def test_an_array_that_only_comes_from_one_has_its_bytes(self, path: Path) -> None:
        copied = memmap(path, "f8", "r")[[1, 2]] + 1
        path.unlink()
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(copied)), [2, 3])

    def test_a_new_file_is_not_made_again(self, tmp_path: Path) -> None:
        made = memmap(tmp_path / "new.bin", "i4", "w+", shape=4)
        made[:] = 5
        again = pickle.loads(pickle.dumps(made))
        again[0] = 6
        assert made.tolist() == [6, 5, 5, 5]

    def test_another_file_at_the_path_is_refused(self, path: Path) -> None:
        data = pickle.dumps(memmap(path, "f8", "r"))
        other = path.with_suffix(".other")
        np.zeros(LENGTH).tofile(other)
        other.replace(path)
        with pytest.raises(quire.ChangedError, match="another file"):
            pickle.loads(data)

    @pytest.mark.parametrize("mode", ["r", "r+", "c"])
    def test_no_file_is_made_longer(self, path: Path, mode: str) -> None:
        """Neither another one nor its own: the sender's array would no longer raise."""
        mapped = memmap(path, "f8", mode)
        data = pickle.dumps(mapped)
        path.rename(path.with_suffix(".moved"))
        path.write_bytes(b"precious")
        with pytest.raises(quire.ChangedError, match="another file"):
            pickle.loads(data)
        assert path.read_bytes() == b"precious"
        path.with_suffix(".moved").replace(path)
        os.truncate(path, 100)
        with pytest.raises(
            quire.TruncatedError, match=f"byte {8 * LENGTH}, the file by now at 100"
        ):
            pickle.loads(data)
        assert path.stat().st_size == 100

    def test_a_file_without_a_name_is_refused(self) -> None:
        with tempfile.TemporaryFile() as file:
            made = memmap(file, "i4", "w+", shape=4)
            with pytest.raises(TypeError, match="without a name"):
                pickle.dumps(made)

    def test_a_read_only_view_of_a_writable_one(self, path: Path) -> None:
        view = memmap(path, "f8", "r+")[:7]
        view.flags.writeable = False
        assert not pickle.loads(pickle.dumps(view)).flags.writeable


class TestNpy:
    @pytest.mark.parametrize("mode", ["r", "r+", "c"])
    def test_load(self, npy: Path, mode: str) -> None:
        mapped = load(npy, mmap_mode=mode)
        assert type(mapped) is memmap
        np.testing.assert_array_equal(mapped, np.load(npy))

    def test_without_a_mode_it_is_numpys(self, npy: Path) -> None:
        assert type(load(npy)) is np.ndarray

    @pytest.mark.parametrize("version", [None, (1, 0), (2, 0), (3, 0)])
    def test_versions(self, tmp_path: Path, version: tuple[int, int] | None) -> None:
        target = tmp_path / "new.npy"
        made = open_memmap(target, "w+", "f4", (3, 2), fortran_order=True, version=version)
        made[:] = np.arange(6).reshape(3, 2)
        made.flush()
        np.testing.assert_array_equal(np.load(target), made)
        np.testing.assert_array_equal(open_memmap(target, "r"), made)
        assert np.load(target).flags.f_contiguous

    def test_names_that_need_version_3(self, tmp_path: Path) -> None:
        dtype = np.dtype([("данные", "i4")])
        with pytest.warns(UserWarning, match=r"3\.0"):
            made = open_memmap(tmp_path / "new.npy", "w+", dtype, (3,))
        made["данные"] = 1, 2, 3
        made.flush()
        assert np.load(tmp_path / "new.npy").dtype == dtype
        np.testing.assert_array_equal(open_memmap(tmp_path / "new.npy", "r"), made)

    @pytest.mark.parametrize(
        "damage", [b"", b"\x93NUMPY\x09\x00", b"\x93NUMPY\x03\x00\x05\0\0\0{}   "]
    )
    def test_damaged_headers(self, tmp_path: Path, damage: bytes) -> None:
        target = tmp_path / "damaged.npy"
        target.write_bytes(damage)
        with pytest.raises(ValueError):
            open_memmap(target, "r")

    def test_objects_are_refused(self, tmp_path: Path) -> None:
        np.save(tmp_path / "objects.npy", np.array([{}, 1]), allow_pickle=True)
        with pytest.raises(ValueError, match="Python objects"):
            load(tmp_path / "objects.npy", mmap_mode="r", allow_pickle=True)

    def test_a_long_header_needs_leave(self, tmp_path: Path) -> None:
        target = tmp_path / "long.npy"
        dtype = np.dtype([(f"field-{number}", "i1") for number in range(1000)])
        np.save(target, np.zeros(3, dtype))
        with pytest.raises(ValueError, match="max_header_size"):
            load(target, mmap_mode="r")
        assert load(target, mmap_mode="r", max_header_size=100_000).dtype == dtype


class TestNpz:
    @pytest.fixture
    def arrays(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(5)
        return {
            "a": rng.random((50, 20)),
            "b": np.asfortranarray(rng.random((7, 9))),
            "c": np.arange(3),
        }

    @pytest.mark.parametrize("mode", ["r", "c"])
    def test_members_are_mapped_where_they_lie(
        self, tmp_path: Path, arrays: dict[str, np.ndarray], mode: str
    ) -> None:
        target = tmp_path / "some.npz"
        np.savez(target, **arrays)
        with load(target, mmap_mode=mode) as found:
            assert sorted(found) == sorted(arrays)
            for name, array in arrays.items():
                member = found[name]
                assert type(member) is memmap
                assert member.filename == str(target)
                np.testing.assert_array_equal(member, array)
                assert member.flags.writeable == (mode == "c")
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(member)), member)

    def test_compressed_and_objects_are_read(
        self, tmp_path: Path, arrays: dict[str, np.ndarray]
    ) -> None:
        np.savez_compressed(tmp_path / "small.npz", **arrays)
        with load(tmp_path / "small.npz", mmap_mode="r") as found:
            assert type(found["a"]) is np.ndarray
            np.testing.assert_array_equal(found["a"], arrays["a"])
            with pytest.raises(KeyError):
                found["absent"]
        np.savez(tmp_path / "objects.npz", o=np.array([{}, 1], dtype=object), allow_pickle=True)
        with load(tmp_path / "objects.npz", mmap_mode="r", allow_pickle=True) as found:
            assert found["o"][1] == 1
        with load(tmp_path / "objects.npz", mmap_mode="r") as found, pytest.raises(ValueError):
            found["o"]

    def test_writing_through_is_not_offered(
        self, tmp_path: Path, arrays: dict[str, np.ndarray]
    ) -> None:
        """It would leave the archive with a checksum that is wrong; numpy reads a copy as well."""
        np.savez(tmp_path / "some.npz", **arrays)
        with load(tmp_path / "some.npz", mmap_mode="r+") as found:
            assert type(found["a"]) is np.ndarray


class TestSources:
    def test_compressed(self, npy: Path, tmp_path: Path) -> None:
        packed = tmp_path / "table.npy.zst"
        quire.pack(npy, packed)
        for mapped in (load(packed, mmap_mode="r"), open_memmap(packed, "c")):
            np.testing.assert_array_equal(mapped, np.load(npy))
            part = pickle.loads(pickle.dumps(mapped[5:9]))
            np.testing.assert_array_equal(part, np.load(npy)[5:9])

    def test_raw_bytes_that_are_compressed(self, path: Path, tmp_path: Path) -> None:
        packed = tmp_path / "numbers.bin.zst"
        quire.pack(path, packed)
        mapped = memmap(packed, "f8", "r", 80, (10, 2))
        np.testing.assert_array_equal(mapped.ravel(), np.arange(10, 30))
        mapped.advise("random")
        mapped.close()

    def test_a_url(self, npy: Path) -> None:
        mapped = load(npy.as_uri(), mmap_mode="r")
        np.testing.assert_array_equal(mapped, np.load(npy))
        assert mapped.filename is None  # nothing else may open it by a name

    def test_a_url_cannot_be_made(self) -> None:
        with pytest.raises(quire.ModeError):
            memmap("http://localhost:1/x.bin", mode="w+", shape=3)


def test_exact_arrays_and_what_it_is_an_instance_of(path: Path) -> None:
    mapped = memmap(path, "f8", "r+")
    assert type(mapped.array) is type(np.asarray(mapped)) is np.ndarray
    assert np.shares_memory(mapped.array, mapped)
    assert isinstance(mapped, np.ndarray)
    assert not isinstance(mapped, np.memmap)
    assert quire.mapping_of(mapped) is mapped._mmap


def test_advice(path: Path) -> None:
    mapped = memmap(path, "f8", "r")
    for advice in ("random", "sequential", "normal", "willneed", "dontneed"):
        mapped[10:600].advise(advice)
    assert mapped[11] == 11
    with pytest.raises(ValueError, match="no advice"):
        mapped.advise("nonsense")
    with pytest.raises(ValueError, match="shows no file"):
        memmap.__new__(memmap, path, "f8", "r").copy().advise("random")


def test_touches_tell_the_kernel_by_themselves(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    path.write_bytes(os.urandom(1 << 20) * 64)
    mapped = memmap(path, "u1", "r")
    at = [0]

    def is_random() -> bool:
        part = Path("/proc/self/smaps").read_text().partition(f"\n{mapped._mmap.address:x}-")[2]
        return "rr" in part.partition("VmFlags:")[2].partition("\n")[0].split()

    def walked() -> bool:
        mapped.array[at[0] : at[0] + (64 << 10)].sum()
        at[0] += 64 << 10
        return not is_random()

    assert is_random()
    wait_until(walked, "the kernel is told of the walk")
    assert at[0] < len(mapped)


def total(array: np.ndarray) -> tuple[str, str | None, float]:
    return type(array).__name__, getattr(array, "filename", None), float(array.sum())


class TestJoblib:
    @pytest.mark.parametrize("backend", ["loky", "multiprocessing"])
    def test_workers_map_the_same_bytes(self, tmp_path: Path, backend: str) -> None:
        path = tmp_path / "large.bin"
        np.arange(300_000.0).tofile(path)
        mapped = memmap(path, "f8", "r", 80)
        parts = [mapped, mapped[1000:250_000], mapped[::3], mapped.array[5:], mapped[100:] * 2]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = joblib.Parallel(n_jobs=2, backend=backend, max_nbytes=1000)(
                joblib.delayed(total)(part) for part in parts
            )
        assert [one[2] for one in found] == [float(part.sum()) for part in parts]
        for one in found[:3]:
            assert one[:2] == ("memmap", path)

    @pytest.mark.parametrize("backend", ["loky", "multiprocessing"])
    def test_in_the_place_of_numpys(self, tmp_path: Path, backend: str) -> None:
        """Workers write into the file of an output, and nothing is copied to a temporary one."""
        said = children.run(write_from_workers, tmp_path, backend).check()
        assert said.split() == ["True", "True", "True"]


def row_sum(rows: np.ndarray, output: np.ndarray, index: int) -> str:
    output[index] = rows[index].sum()
    return str(getattr(rows, "filename", None))


def write_from_workers(folder: str, backend: str) -> None:
    warnings.simplefilter("ignore", ResourceWarning)
    np.memmap, np.load = memmap, load
    path = Path(folder, "rows.npy")
    np.save(path, np.random.default_rng(1).random((400, 1000)))
    rows = np.load(path, mmap_mode="r")
    output = np.memmap(Path(folder, "output.bin"), "f8", "w+", shape=400_000)
    work = (joblib.delayed(row_sum)(rows, output, index) for index in range(4))
    found = joblib.Parallel(n_jobs=2, backend=backend)(work)
    parts = (joblib.delayed(row_sum)(rows[8:].T[::2], output[8:], index) for index in range(4))
    joblib.Parallel(n_jobs=2, backend=backend)(parts)
    print({Path(one).name for one in found} == {path.name})
    print(np.allclose(output[:4], rows[:4].sum(1)))
    print(np.allclose(output[8:12], rows[8:, ::2].sum(0)[:4]))


class TestDask:
    def test_tokens_without_a_look_at_the_bytes(self, path: Path) -> None:
        from dask.tokenize import tokenize

        mapped = memmap(path, "f8", "r")
        hashed = tokenize(mapped[:5].copy())
        mapped._window.mapping.protect("none")  # a look would raise
        tokens = [tokenize(one) for one in (mapped, mapped[1:], mapped[::-1], mapped[:5])]
        assert len({*tokens, hashed}) == 5
        assert tokenize(memmap(path, "f8", "r")) == tokens[0]
        assert tokenize(pickle.loads(pickle.dumps(mapped))) == tokens[0]
        os.utime(path, ns=(1, 1))
        assert tokenize(memmap(path, "f8", "r")) != tokens[0]

    def test_what_may_change_is_hashed(self, path: Path) -> None:
        from dask.tokenize import tokenize

        mapped = memmap(path, "f8", "c")
        before = tokenize(mapped)
        mapped[0] = 99
        assert tokenize(mapped) != before

    def test_an_array_that_is_older_than_the_import(self, path: Path) -> None:
        assert children.run(token_of_older, path).check() == "well\n"


def token_of_older(path: str) -> None:
    mapped = memmap(path, "f8", "r")
    assert "dask" not in sys.modules
    from dask.delayed import delayed
    from dask.tokenize import normalize_token

    delayed(mapped)
    assert memmap in normalize_token._lookup
    print("well")


if __name__ == "__main__":
    children.main()
