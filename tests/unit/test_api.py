import errno
from pathlib import Path

import numpy as np
import pytest

import quire
from quire import _core
from quire.testing.waiting import wait_until


@pytest.mark.parametrize("mode", ["", "rb", "x", None])
def test_other_modes(mode, rows_file):
    with pytest.raises(quire.ModeError, match="is no mode"):
        quire.open(rows_file, mode=mode)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(5, dtype=">u2"),
        np.asfortranarray(np.arange(30_000.0).reshape(100, 300)),
        np.array([(1, 2.5, "é")], dtype=[("a", "<i4"), ("b", ">f8"), ("c", "U3")]),
        np.array(7.5),
        np.zeros((4, 0, 3), "f4"),
        np.array(["2026-11-20"], "M8[D]"),
        np.zeros((3, 2), "S5"),
    ],
    ids=["big-endian", "fortran", "structured", "0-d", "empty", "datetime", "bytes"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_npy(array, packed, tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, array)
    if packed:
        quire.pack(path, tmp_path / "x.zst", frame=4096)
        path = tmp_path / "x.zst"
    with quire.open(path) as mapping:
        assert mapping.array.dtype == array.dtype
        assert mapping.array.shape == array.shape
        assert mapping.array.flags.f_contiguous == array.flags.f_contiguous
        assert mapping.array.tobytes("A") == array.tobytes("A")
        assert type(mapping.array) is np.ndarray


def test_raw(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"head" + np.arange(12, dtype="<i4").tobytes())
    with quire.open(path, dtype="<i4", shape=(3, 4), offset=4, order="F") as mapping:
        assert np.array_equal(mapping.array, np.arange(12).reshape((3, 4), order="F"))
        assert mapping.order == "F"


def test_raw_view_of_a_npy_file(rows_file):
    with quire.open(rows_file, dtype="u1") as mapping:
        assert mapping.array[:6].tobytes() == b"\x93NUMPY"


def test_empty_raw_file(tmp_path):
    path = tmp_path / "empty"
    path.touch()
    with quire.open(path, dtype="f8") as mapping:
        assert mapping.array.shape == (0,)
        assert len(mapping) == 0
        assert mapping.residency() in (b"\0", b"\1")
        assert mapping.statistics().resident_bytes == 0
        assert bytes(memoryview(mapping)) == b""


def test_one_byte(tmp_path):
    path = tmp_path / "one"
    path.write_bytes(b"\x07")
    with quire.open(path, dtype="u1") as mapping:
        assert mapping.array.tolist() == [7]


def test_other_files_need_a_dtype(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(100))
    with pytest.raises(quire.FormatError, match="give dtype=") as caught:
        quire.open(path)
    assert caught.value.source == str(path)
    with pytest.raises(ValueError, match="give dtype too"):
        quire.open(path, shape=(2, 2))
    with pytest.raises(ValueError, match="give dtype too"):
        quire.open(path, offset=2)


def test_plain_zstd_is_refused_with_the_command_that_repacks_it(tmp_path):
    path = tmp_path / "x.npy.zst"
    path.write_bytes(_core.compress_frame(bytes(10_000), 3)[0])
    for options in ({}, {"dtype": "u1"}):
        with pytest.raises(quire.FormatError, match="quire pack") as caught:
            quire.open(path, **options)
        assert str(path) in str(caught.value)


def test_absent_and_unfit_files(tmp_path):
    with pytest.raises(quire.SourceError) as caught:
        quire.open(tmp_path / "absent.npy")
    assert caught.value.errno == errno.ENOENT
    assert str(tmp_path / "absent.npy") in str(caught.value)
    with pytest.raises(quire.SourceError) as caught:
        quire.open(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "kind", "why"),
    [
        ({"budget": "lots"}, ValueError, "budget 'lots' is no size"),
        ({"granule": -1}, ValueError, "granule"),
        ({"budget": 1.5}, TypeError, "budget must be"),
        ({"budget": 1}, quire.BudgetError, "budget"),
        ({"pmap": "magic"}, quire.PmapError, "magic"),
        ({"storage_options": {"anon": True}}, quire.SourceError, "leave them out"),
        ({"dtype": "f8", "order": "K"}, ValueError, "order"),
    ],
)
def test_bad_options(options, kind, why, rows_file):
    with pytest.raises(kind, match=why):
        quire.open(rows_file, **options)


def test_what_fails_to_open_leaves_no_descriptor(rows_file, tmp_path):
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    (tmp_path / "x.zst").write_bytes(_core.compress_frame(b"x" * 100, 3)[0])
    quire.open(rows_file).close()
    quire.open(rows_file, budget="64 MiB").close()
    before = descriptors()
    for _ in range(20):
        for path, options in ((rows_file, {"budget": 1}), (tmp_path / "x.zst", {})):
            with pytest.raises(quire.Error):
                quire.open(path, **options)
    assert descriptors() <= before


def test_environment_chooses_the_pmap(rows_file, monkeypatch):
    working = [row["name"] for row in _core.probe() if row["works"]]
    for name in working:
        monkeypatch.setenv("QUIRE_PMAP", name)
        with quire.open(rows_file) as mapping:
            assert mapping.pmap == name
    monkeypatch.setenv("QUIRE_PMAP", "magic")
    with pytest.raises(quire.PmapError):
        quire.open(rows_file)
    with quire.open(rows_file, pmap=working[0]) as mapping:
        assert mapping.pmap == working[0]


def test_process_budget():
    default = quire.budget()
    try:
        quire.set_budget("96 MiB")
        assert quire.budget() == 96 << 20
        with pytest.raises(ValueError, match="budget"):
            quire.set_budget("none")
        assert quire.budget() == 96 << 20
    finally:
        quire.set_budget(None)
    assert quire.budget() == pytest.approx(default, rel=0.5)


def test_a_refused_budget_leaves_the_automatic_one_on(rows_file):
    with quire.open(rows_file, mode="c"):
        quire.set_budget("auto")
        try:
            for refused in ("nonsense", 1):
                with pytest.raises(ValueError, match="budget"):
                    quire.set_budget(refused)
            _core.set_budget(33 << 20)  # not by the user: it is followed away from that again
            wait_until(lambda: quire.budget() != 33 << 20, "the budget is followed")
        finally:
            quire.set_budget(None)


def test_an_automatic_budget_ends_at_once(rows_file):
    """What is set then is not followed away from by a step that was under way."""
    with quire.open(rows_file, mode="c"):
        for number in range(200):
            quire.set_budget("auto")
            quire.set_budget((40 << 20) + number)
            assert quire.budget() == (40 << 20) + number
        quire.set_budget(None)


def test_process_budget_bounds_all_mappings(rows_file, rows):
    quire.set_budget("1 MiB")
    try:
        with quire.open(rows_file, granule=4096) as one, quire.open(rows_file, granule=4096) as two:
            assert one.array.sum() == two.array.sum() == rows.sum()
            assert quire.statistics().resident_bytes <= 1 << 20
    finally:
        quire.set_budget(None)


@pytest.mark.parametrize(
    "given",
    [
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": float("nan")},
        {"retries": -1},
        {"retries": 2**40},
    ],
    ids=str,
)
def test_patience_out_of_range(given, tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(100))
    with pytest.raises(ValueError, match=next(iter(given))):
        quire.open(path, dtype="u1", **given)


def test_a_packed_file_with_damaged_first_bytes_is_not_mapped_raw(tmp_path):
    path = tmp_path / "x.bin.zst"
    (tmp_path / "x.bin").write_bytes(bytes(range(256)) * 400)
    quire.pack(tmp_path / "x.bin", path, frame=4096)
    content = bytearray(path.read_bytes())
    content[:4] = b"oops"
    path.write_bytes(content)
    with quire.open(path, dtype="u1") as mapping:
        array = mapping.array
        assert array.size == 256 * 400
        with pytest.raises(quire.CorruptError):
            array.sum()
