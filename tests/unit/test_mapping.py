import errno
import gc
import os
import pickle
import threading
import time
import weakref

import numpy as np
import pytest

import quire
from quire import _core
from quire._api import find_layout
from quire.creation import RawShape


def mapping_of(store: _core.Store, **options) -> quire.Mapping:
    """A mapping of all bytes of a native store as uint8."""
    return quire.Mapping(store, find_layout(store, RawShape("u1")), **options)


def faulty(data: bytes, **plan) -> quire.Mapping:
    store = _core.open_faulty(_core.open_memory(data, "made up"), **plan)
    return mapping_of(store, granule_bytes=4096, retries=0)


def test_array_is_an_exact_read_only_ndarray_at_the_address(rows, rows_file):
    with quire.open(rows_file) as mapping:
        array = mapping.array
        assert type(array) is np.ndarray
        assert np.array_equal(array, rows)
        assert array.ctypes.data == mapping.address + 128
        assert not array.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
        del array


def test_facts(rows, rows_file):
    with quire.open(rows_file, granule="64 KiB") as mapping:
        assert mapping.dtype == rows.dtype
        assert mapping.shape == rows.shape
        assert mapping.order == "C"
        assert mapping.source == str(rows_file)
        assert mapping.version
        assert len(mapping) == mapping.size_bytes == rows_file.stat().st_size
        assert mapping.granule_bytes == 64 << 10
        assert repr(mapping) == (
            f"<quire.Mapping '{rows_file}' float64 (512, 512) 2.0 MiB, pmap {mapping.pmap}>"
        )
    assert repr(mapping).endswith(", closed>")


def test_buffer_is_the_bytes_of_the_whole_source(rows_file):
    content = rows_file.read_bytes()
    with quire.open(rows_file) as mapping:
        with memoryview(mapping) as view:
            assert view.readonly
            assert view.format == "B"
            assert bytes(view[:128]) == content[:128]
            assert bytes(view) == content
        with open(os.devnull, "rb") as file, pytest.raises((BufferError, TypeError)):
            file.readinto(mapping)


def test_array_is_one_object_while_held(rows_file):
    with quire.open(rows_file) as mapping:
        array = mapping.array
        assert mapping.array is array
        gone = weakref.ref(array)
        del array
        assert gone() is None
        assert mapping.exports == 0


def test_close_refuses_while_views_live(rows, rows_file):
    mapping = quire.open(rows_file)
    row = mapping.array[3]
    with pytest.raises(BufferError, match="delete them first"):
        mapping.close()
    assert not mapping.closed
    assert np.array_equal(row, rows[3])
    del row
    mapping.close()
    mapping.close()
    assert mapping.closed


def test_closed_mapping_refuses(rows_file):
    mapping = quire.open(rows_file)
    mapping.close()
    with pytest.raises(quire.ClosedError, match="make it again") as caught:
        _ = mapping.array
    assert caught.value.source == str(rows_file)
    for call in (mapping.read, lambda: mapping.read(0, 1), lambda: mapping.readinto(bytearray(1))):
        with pytest.raises(quire.ClosedError, match="make it again"):
            call()
    with pytest.raises(quire.ClosedError), mapping:
        pass
    with pytest.raises(BufferError, match="closed"):
        memoryview(mapping)
    mapping.check()
    assert mapping.statistics().errors == 0


def test_leaving_with_closes(rows_file):
    with quire.open(rows_file) as mapping:
        _ = mapping.array[0, 0]
    assert mapping.closed


@pytest.mark.parametrize("take", [lambda a: a, lambda a: a[7], lambda a: a.T[::2].view("u8")])
def test_left_mapping_closes_with_its_last_view(take, rows_file):
    with quire.open(rows_file) as mapping:
        view = take(mapping.array)
    assert not mapping.closed
    assert view.sum()
    del view
    assert mapping.closed


def test_mapping_without_a_name_closes_with_its_last_view(rows_file):
    before = _core.live_mappings()
    view = quire.open(rows_file).array[5]
    gc.collect()
    assert _core.live_mappings() == before + 1
    assert view.sum()
    del view
    gc.collect()
    assert _core.live_mappings() == before


def test_leaving_with_keeps_an_exception(rows_file):
    mapping = quire.open(rows_file)
    view = mapping.array[1:]
    with pytest.raises(ZeroDivisionError), mapping:
        raise ZeroDivisionError
    assert view[0, 0]
    del view
    assert mapping.closed


def touch(mapping: quire.Mapping) -> int:
    """Reads the first byte, then gives the interpreter an occasion to raise."""
    value = int(mapping.array[0])
    for _ in range(100):
        pass
    return value


CODES = {
    "io": quire.PageIOError,
    "truncated": quire.TruncatedError,
    "changed": quire.ChangedError,
    "corrupt": quire.CorruptError,
    "checksum": quire.ChecksumError,
}


@pytest.mark.parametrize("code", CODES)
def test_page_that_cannot_be_had_raises_and_fails_the_mapping(code):
    mapping = faulty(bytes(20_000), code=code, errno=5)
    assert mapping.failed is None
    with pytest.raises(quire.PageIOError) as caught:
        touch(mapping)
    assert type(caught.value) is CODES[code]
    assert (caught.value.source, caught.value.offset, caught.value.errno) == ("made up", 0, 5)
    for call in (mapping.check, lambda: mapping.array):
        with pytest.raises(CODES[code]) as again:
            call()
        assert again.value.source == "made up"
    assert type(mapping.failed) is CODES[code]
    assert repr(mapping).endswith(", failed>")
    assert mapping.statistics().errors >= 1
    caught = again = None
    gc.collect()
    mapping.close()


def test_page_error_reaches_the_thread_that_touched(rows):
    mapping = faulty(rows.tobytes(), errno=5)
    caught: list[BaseException] = []

    def work() -> None:
        try:
            touch(mapping)
        except quire.PageIOError as error:
            caught.append(error.with_traceback(None))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [error.errno for error in caught] == [5]
    mapping.close()


def test_error_that_passes_is_tried_again(rows):
    store = _core.open_faulty(_core.open_memory(rows.tobytes(), "made up"), count=2, errno=5)
    with mapping_of(store, retries=2) as mapping:
        assert mapping.array.tobytes() == rows.tobytes()
        assert mapping.statistics().retries == 2


def test_pickles_as_a_recipe(rows, rows_file):
    with quire.open(rows_file, budget="8 MiB", granule=65536) as mapping:
        data = pickle.dumps(mapping)
        assert len(data) < 2000
        with pickle.loads(data) as twin:
            assert twin.address != mapping.address
            assert np.array_equal(twin.array, rows)
            assert twin.statistics().budget_bytes == 8 << 20
            assert twin.granule_bytes == 65536


def test_pickle_of_a_relative_path_opens_from_another_folder(rows, rows_file, monkeypatch):
    monkeypatch.chdir(rows_file.parent)
    with quire.open(rows_file.name) as mapping:
        assert mapping.source == rows_file.name
        data = pickle.dumps(mapping)
    monkeypatch.chdir("/")
    with pickle.loads(data) as twin:
        assert np.array_equal(twin.array, rows)


def test_pickle_pins_the_version(rows_file):
    with quire.open(rows_file) as mapping:
        data = pickle.dumps(mapping)
    np.save(rows_file, np.zeros((3, 3)))
    with pytest.raises(quire.ChangedError, match="changed after the mapping was pickled"):
        pickle.loads(data)


def test_mapping_of_a_native_store_cannot_be_pickled():
    with (
        mapping_of(_core.open_memory(b"1234", "made up")) as mapping,
        pytest.raises(TypeError, match="open or map a path"),
    ):
        pickle.dumps(mapping)


def test_set_budget(rows_file):
    with quire.open(rows_file, budget="2 MiB", granule=4096) as mapping:
        mapping.set_budget("1 MiB")
        assert mapping.statistics().budget_bytes == 1 << 20
        with pytest.raises(ValueError, match="budget"):
            mapping.set_budget("much")
        mapping.set_budget(None)
        assert mapping.statistics().budget_bytes > 2 << 20


def test_resident_counts_granules(rows_file):
    with quire.open(rows_file, granule=65536, budget="64 MiB") as mapping:
        assert len(mapping.resident()) == -(-mapping.size_bytes // 65536)
        assert not any(mapping.resident()[20:])
        mapping.array.sum()
        deadline = time.monotonic() + 10
        while not all(mapping.resident()):  # the last fill is entered after its page is there
            assert time.monotonic() < deadline


def test_offsets_count_from_the_start(tmp_path):
    with quire.open(tmp_path / "new", mode="w+", shape=100, dtype="u1") as mapping:
        uses = (
            lambda: mapping.read(-1),
            lambda: mapping.read(0, -1),
            lambda: mapping.read(1 << 70, 1),
            lambda: mapping.readinto(bytearray(5), -5),
            lambda: mapping.readinto(bytearray(5), 96),
            lambda: mapping.write(b"abc", -3),
            lambda: mapping.write(b"abc", 98),
        )
        for use in uses:
            with pytest.raises(ValueError, match="do not lie in a mapping of 100: offsets count"):
                use()
        assert (mapping.read(100), mapping.read(0)) == (b"", bytes(100))
        with pytest.raises(ValueError, match="do not lie"):
            mapping.read(101)


def test_auto_is_no_budget_of_a_mapping(rows_file):
    with pytest.raises(ValueError, match=r"quire\.set_budget"):
        quire.open(rows_file, budget="auto")
    with quire.open(rows_file) as mapping, pytest.raises(ValueError, match=r"quire\.set_budget"):
        mapping.set_budget("auto")


def test_what_has_no_addresses_says_what_to_do():
    with pytest.raises(quire.Error, match=r"RLIMIT_AS.*overcommit") as caught:
        quire.anonymous("127.9 TiB")
    assert caught.value.errno == errno.ENOMEM
    assert str(caught.value).count("ENOMEM") == 1
    assert "os error" not in str(caught.value)


def test_an_error_says_its_number_once(tmp_path):
    with pytest.raises(quire.SourceError) as caught:
        quire.open(tmp_path / "absent")
    assert str(caught.value).endswith("absent: No such file or directory (ENOENT)")
