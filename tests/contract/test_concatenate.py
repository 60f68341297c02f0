"""Many sources as one array: equal to numpy's, by the pager and by mapping, and every refusal."""

from __future__ import annotations

import mmap
import os
import pickle
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
from quire import _core
from quire.testing import children
from quire.testing.content import new_seed
from quire.testing.stores import BytesStore
from quire.testing.touches import touch

PAGE = mmap.PAGESIZE


def shards(folder: Path, lengths: list[int], dtype: str = "f4", row: tuple[int, ...] = (3,)):
    source = np.random.default_rng(new_seed())
    arrays = [
        source.integers(0, 200, (length, *row)).astype(dtype, order="C") for length in lengths
    ]
    paths = [folder / f"shard-{number:04d}.npy" for number in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        np.save(path, array)
    return paths, np.concatenate(arrays)


def raw_pages(folder: Path, pages: list[int], extra: int = 0) -> tuple[list[Path], Any]:
    """Raw files of whole pages, the last with some bytes more."""
    content = np.random.default_rng(new_seed())
    sizes = [number * PAGE for number in pages]
    sizes[-1] += extra
    arrays = [content.integers(0, 256, size, dtype="u1") for size in sizes]
    paths = [folder / f"raw-{number}.bin" for number in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        array.tofile(path)
    return paths, np.concatenate(arrays)


def test_random_slices_equal_numpy(tmp_path: Path, pmap: str) -> None:
    paths, whole = shards(tmp_path, [1, 7, 1000, 0, 3000, 2, 5000], row=(2, 3))
    if pmap == "soft":
        with quire.concatenate(paths, pmap=pmap) as mapping:
            assert mapping.read() == whole.tobytes()
        return
    source = np.random.default_rng(new_seed())
    with quire.concatenate(paths, pmap=pmap, budget="64 KiB", granule=PAGE) as mapping:
        assert (mapping.shape, mapping.dtype, mapping.pmap) == (whole.shape, whole.dtype, pmap)
        assert mapping.array.flags.c_contiguous
        assert not mapping.array.flags.writeable
        for _ in range(200):
            first, last = sorted(source.integers(0, len(whole) + 1, 2))
            assert np.array_equal(mapping.array[first:last], whole[first:last])
        statistics = mapping.statistics()
        assert statistics.evictions > 0
        assert statistics.peak_resident_bytes <= 64 << 10
        assert statistics.bytes_fetched > 0


def test_a_thousand_shards(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard == resource.RLIM_INFINITY or hard > 2000
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    lengths = np.random.default_rng(1).integers(0, 20, 1000).tolist()
    paths, whole = shards(tmp_path, lengths, "i8")
    with quire.concatenate(paths, budget="1 MiB") as mapping:
        assert np.array_equal(mapping.array, whole)
    small = [tmp_path / f"{number}.bin" for number in range(1000)]
    for number, path in enumerate(small):
        path.write_bytes(number.to_bytes(2, "little") * (PAGE // 2))
    with quire.concatenate(small, dtype="u2") as mapped:
        assert mapped.pmap == "kernel"
        assert np.array_equal(mapped.array[:: PAGE // 2], np.arange(1000))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_one_none_and_rows_of_none(tmp_path: Path) -> None:
    paths, whole = shards(tmp_path, [5])
    with quire.concatenate(paths) as mapping:
        assert np.array_equal(mapping.array, whole)
        assert mapping.source == str(paths[0])
    with pytest.raises(ValueError, match="nothing to concatenate"):
        quire.concatenate([])
    with pytest.raises(TypeError, match="as a list"):
        quire.concatenate(str(paths[0]))
    empty, none = shards(tmp_path, [0, 0, 0])
    with quire.concatenate(empty) as mapping:
        assert mapping.shape == none.shape == (0, 3)
        assert mapping.array.size == 0
    with pytest.raises(quire.PmapError, match="at least one row"):
        quire.concatenate(empty, pmap="kernel")


def test_what_does_not_go_together_is_named(tmp_path: Path) -> None:
    first, other = tmp_path / "first.npy", tmp_path / "other.npy"
    np.save(first, np.zeros((4, 3), "f4"))
    cases = [
        (np.zeros((4, 3), "f8"), "dtype of the first is <f4, of the second <f8"),
        (np.zeros((4, 3), ">f4"), "dtype of the first is <f4, of the second >f4"),
        (np.zeros((4, 2), "f4"), r"shape of a row of the first is \(3,\), of the second \(2,\)"),
        (np.zeros((0, 2), "f4"), "shape of a row"),
        (np.zeros(12, "f4"), "number of dimensions of the first is 2, of the second 1"),
        (np.array(1, "f4"), "no rows"),
        (np.zeros((4, 3), "f4", order="F"), "Fortran order"),
    ]
    for array, words in cases:
        np.save(other, array)
        with pytest.raises(quire.FormatError, match=words) as caught:
            quire.concatenate([first, other])
        assert caught.value.source == str(other)
        if "second" in words:
            assert f"{first} and {other} do not go together" in str(caught.value)
    other.write_bytes(b"no array")
    with pytest.raises(quire.FormatError, match="dtype="):
        quire.concatenate([first, other])
    with pytest.raises(quire.SourceError) as missing:
        quire.concatenate([first, tmp_path / "missing.npy"])
    assert missing.value.source == str(tmp_path / "missing.npy")
    for wrong in ("w+", "?"):
        with pytest.raises(quire.ModeError):
            quire.concatenate([first], mode=wrong)


def test_sources_of_every_kind(tmp_path: Path) -> None:
    paths, _ = shards(tmp_path, [400, 500])
    packed = tmp_path / "packed.npy.zst"
    quire.pack(paths[1], packed, frame="4 KiB")
    own = BytesStore(paths[0].read_bytes())
    native = _core.open_memory(paths[1].read_bytes(), "native")
    sources = [paths[0], packed, own, paths[0].as_uri(), native, packed]
    whole = np.concatenate([np.load(paths[number]) for number in (0, 1, 0, 0, 1, 1)])
    with quire.concatenate(sources, budget="4 MiB") as mapping:
        assert np.array_equal(mapping.array, whole)
        assert np.array_equal(mapping.array[::-7], whole[::-7])
        with pytest.raises(TypeError, match="pickled"):
            pickle.dumps(mapping)


def test_raw_sources_have_one_description(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.raw" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(b"head" + np.full(2 * number, number, "i2").tobytes())
    with quire.concatenate(paths, dtype="i2", shape=(-1, 2), offset=4) as mapping:
        assert mapping.array.tolist() == [[1, 1], [2, 2], [2, 2]]
    with pytest.raises(quire.FormatError, match="whole number"):
        quire.concatenate(paths, dtype="i2", shape=(-1, 4), offset=4)


@pytest.mark.parametrize("budget", [None, "64 KiB"])
def test_an_error_names_the_shard_and_its_own_offset(tmp_path: Path, budget: str | None) -> None:
    paths, whole = raw_pages(tmp_path, [40, 40, 40], 7)
    mapping = quire.concatenate(paths, dtype="u1", budget=budget)
    assert (mapping.pmap == "kernel") == (budget is None)
    array = mapping.array
    assert touch(array, 3) == whole[3]
    with paths[1].open("r+b") as file:
        file.truncate(20 * PAGE)
    with pytest.raises(quire.TruncatedError) as caught:
        touch(array, 75 * PAGE)
    assert caught.value.source == str(paths[1])
    assert 20 * PAGE <= (caught.value.offset or 0) <= 35 * PAGE
    with pytest.raises(quire.TruncatedError):
        mapping.check()
    with quire.concatenate(paths, dtype="u1", pmap="soft", shape=20 * PAGE) as soft:
        paths[2].write_bytes(b"")
        with pytest.raises(quire.TruncatedError) as again:
            soft.read(50 * PAGE, 5)
    assert again.value.source == str(paths[2])
    del array, caught


def read_again(mapping: quire.Mapping, offset: int) -> None:
    for _ in range(10_000):  # a change is looked for once a millisecond
        mapping.read(offset, 8)
        mapping.evict()


def test_a_changed_shard_is_named(tmp_path: Path) -> None:
    paths, _ = shards(tmp_path, [4000, 4000])
    with quire.concatenate(paths, budget="1 MiB") as mapping:
        mapping.advise("random")
        os.utime(paths[1], ns=(0, 0))
        with pytest.raises(quire.ChangedError) as caught:
            read_again(mapping, 50_000)
        assert caught.value.source == str(paths[1])


def test_pages_are_mapped_side_by_side(tmp_path: Path) -> None:
    paths, whole = raw_pages(tmp_path, [1, 3, 2], 77)
    with quire.concatenate(paths, dtype="u1") as mapping:
        assert mapping.pmap == "kernel"
        assert (mapping.mode, mapping.size_bytes) == ("r", len(whole))
        assert np.array_equal(mapping.array, whole)
        assert not mapping.array.flags.writeable
        assert mapping.read(PAGE - 1, 3) == whole[PAGE - 1 : PAGE + 2].tobytes()
        again = pickle.loads(pickle.dumps(mapping))
        assert np.array_equal(again.array, whole)
        again.close()
    with mapping if not mapping.closed else quire.concatenate(paths, dtype="u1") as outlived:
        array = outlived.array
    assert np.array_equal(array, whole)
    npy, _ = shards(tmp_path, [5, 5])
    with pytest.raises(quire.PmapError, match="begins at byte 128") as caught:
        quire.concatenate(npy, pmap="kernel")
    assert caught.value.source == str(npy[0])
    with pytest.raises(quire.PmapError, match=f"has {PAGE * 2 + 77} bytes"):
        quire.concatenate(paths[::-1], dtype="u1", pmap="kernel")
    with pytest.raises(quire.PmapError, match="not a local file"):
        quire.concatenate([BytesStore(bytes(PAGE))], dtype="u1", pmap="kernel")


@pytest.mark.parametrize("pmap", ["kernel", None])
def test_writes_go_to_the_sources(tmp_path: Path, pmap: str | None) -> None:
    paths, whole = raw_pages(tmp_path, [2, 2, 1])
    budget = None if pmap else "1 MiB"
    with quire.concatenate(paths, dtype="u1", mode="c", pmap=pmap, budget=budget) as mapping:
        mapping.array[:] = 1
        assert mapping.mode == "c"
    assert np.concatenate([np.fromfile(path, "u1") for path in paths]).tolist() == whole.tolist()
    with quire.concatenate(paths, dtype="u1", mode="r+", pmap=pmap, budget=budget) as mapping:
        mapping.array[2 * PAGE - 2 : 2 * PAGE + 2] = [1, 2, 3, 4]
        mapping.sync()
        assert mapping.mode == "r+"
        assert paths[0].read_bytes()[-2:] == b"\1\2"
        assert paths[1].read_bytes()[:2] == b"\3\4"
    with pytest.raises(quire.ModeError, match="can only be read"):
        quire.concatenate([paths[0], BytesStore(bytes(9))], dtype="u1", mode="r+")


def test_pickles_name_the_sources(tmp_path: Path) -> None:
    paths, whole = shards(tmp_path, [5, 6])
    with quire.concatenate(paths, budget="1 MiB") as mapping:
        recipe = pickle.dumps(mapping)
        with pickle.loads(recipe) as again:
            assert np.array_equal(again.array, whole)
    np.save(paths[1], np.zeros((7, 3), "f4"))
    with pytest.raises(quire.ChangedError, match="concatenate them again"):
        pickle.loads(recipe)


@pytest.mark.parametrize("budget", [None, "1 MiB"])
def test_pickled_raw_files_that_changed_are_told(tmp_path: Path, budget: str | None) -> None:
    paths, whole = raw_pages(tmp_path, [1, 2])
    with quire.concatenate(paths, dtype="u1", budget=budget) as mapping:
        recipe = pickle.dumps(mapping)
        with pickle.loads(recipe) as again:
            assert np.array_equal(again.array, whole)
            assert again.version == mapping.version
            assert mapping.version is not None
    os.utime(paths[1], ns=(0, 0))
    with pytest.raises(quire.ChangedError, match="concatenate them again"):
        pickle.loads(recipe)


def test_closing_syncs_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, _ = raw_pages(tmp_path, [1, 2, 1])
    synced: list[tuple[str, int, int | None]] = []
    real = quire.KernelMapping.sync

    def noted(self: quire.KernelMapping, offset: int = 0, length: int | None = None) -> None:
        real(self, offset, length)
        synced.append((self.source, offset, length))

    monkeypatch.setattr(quire.KernelMapping, "sync", noted)
    names, sizes = [str(path) for path in paths], [PAGE, 2 * PAGE, PAGE]
    every = [(name, 0, size) for name, size in zip(names, sizes, strict=True)]
    with quire.concatenate(paths, dtype="u1", mode="r+") as mapping:
        mapping.array[0] = 1
        mapping.sync(PAGE - 1, 2)
        assert synced == [(names[0], PAGE - 1, 1), (names[1], 0, 1)]
        with pytest.raises(ValueError, match="negative"):
            mapping.sync(-1)
        synced.clear()
    assert synced == every
    quire.concatenate(paths, dtype="u1", mode="r+").close()
    assert synced == every * 2
    quire.concatenate(paths, dtype="u1", mode="r+").close(discard=True)
    quire.concatenate(paths, dtype="u1").close()
    quire.concatenate(paths, dtype="u1", mode="c", pmap="kernel").close()
    with pytest.raises(KeyError), quire.concatenate(paths, dtype="u1", mode="r+"):
        raise KeyError
    assert synced == every * 2


def test_the_end_of_the_interpreter_syncs_every_file(tmp_path: Path) -> None:
    paths, _ = raw_pages(tmp_path, [1, 1])
    said = children.run(child_ends_with_stores, *paths).check()
    assert said.split() == [str(path) for path in paths]


def child_ends_with_stores(*paths: str) -> None:
    real = quire.KernelMapping.sync

    def told(self: quire.KernelMapping, *at: Any) -> None:
        real(self, *at)
        print(self.source, flush=True)

    quire.KernelMapping.sync = told  # type: ignore[method-assign]
    kept = quire.concatenate(paths, dtype="u1", mode="r+")
    kept.array[0] = 1
    quire.stay = kept  # type: ignore[attr-defined]


def test_a_replaced_shard_is_told(tmp_path: Path) -> None:
    paths, _ = raw_pages(tmp_path, [1, 1])
    mapping = quire.concatenate(paths, dtype="u1", mode="r+")
    (tmp_path / "other").write_bytes(bytes(PAGE))
    (tmp_path / "other").replace(paths[1])
    mapping.array[PAGE] = 8
    for save in (mapping.sync, mapping.close):
        with pytest.raises(quire.SyncError, match=r"was replaced.*discard=True") as caught:
            save()
        assert caught.value.source == str(paths[1])
    mapping.sync(0, PAGE)  # of the other one
    mapping.close(discard=True)
    assert not paths[1].read_bytes().strip(b"\0")


def test_a_file_that_comes_twice_is_written_once(tmp_path: Path) -> None:
    paths, _ = raw_pages(tmp_path, [1], 77)
    link = tmp_path / "link"
    link.hardlink_to(paths[0])
    for how in ({}, {"budget": "1 MiB"}):
        with pytest.raises(ValueError, match=r"are one file.*undo each other's stores") as caught:
            quire.concatenate([paths[0], link], dtype="u1", mode="r+", **how)
        assert str(link) in str(caught.value)
        with quire.concatenate([paths[0], link], dtype="u1", mode="c", **how) as mapping:
            mapping.array[0] += 1
    os.truncate(paths[0], PAGE)
    with quire.concatenate([paths[0], link], dtype="u1", mode="r+") as mapping:
        mapping.array[3] = 33  # one memory
        assert mapping.array[PAGE + 3] == 33
    assert paths[0].read_bytes()[3] == 33


def test_a_shard_replaced_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, _ = raw_pages(tmp_path, [1, 1])
    real = quire.Arena.map

    def replacing(self: quire.Arena, at: int, source: str, *how: Any, **more: Any) -> Any:
        (tmp_path / "other").write_bytes(bytes(PAGE))
        (tmp_path / "other").replace(source)
        return real(self, at, source, *how, **more)

    monkeypatch.setattr(quire.Arena, "map", replacing)
    with pytest.raises(quire.ChangedError, match="while it was opened") as caught:
        quire.concatenate(paths, dtype="u1")
    assert caught.value.source == str(paths[0])


def test_a_forked_child_reads_it(tmp_path: Path) -> None:
    paths, whole = shards(tmp_path, [4000, 4000])
    raw, pages = raw_pages(tmp_path, [3, 3])
    with quire.concatenate(paths) as mapping, quire.concatenate(raw, dtype="u1") as mapped:
        assert mapping.array[0, 0] == whole[0, 0]

        def look() -> None:
            assert np.array_equal(mapping.array, whole)
            assert np.array_equal(mapped.array, pages)

        assert children.in_fork(look) == ""


def test_too_few_descriptors_are_named(tmp_path: Path) -> None:
    shards(tmp_path, [1] * 100)
    children.run(child_runs_out_of_descriptors, tmp_path).check()


def child_runs_out_of_descriptors(folder: str) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, hard))
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(quire.SourceError, match=r"100 sources need a descriptor each.*ulimit -n"):
        quire.concatenate(sorted(Path(folder).glob("*.npy")))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


if __name__ == "__main__":
    children.main()
