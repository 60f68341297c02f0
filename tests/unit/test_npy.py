import io
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import quire
from quire.npy import HEADER_BYTES_MAX, MAGIC, read_layout


def layout_of(data: bytes):
    return read_layout(lambda offset, length: data[offset : offset + length], len(data), "x.npy")


def array_of(data: bytes) -> np.ndarray:
    return layout_of(data).view(memoryview(data))


def npy(array: np.ndarray, version=None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version)
    return file.getvalue()


def header(text: str | bytes, version=1, data=b"") -> bytes:
    raw = text if isinstance(text, bytes) else text.encode("latin-1")
    width = 2 if version == 1 else 4
    return MAGIC + bytes([version, 0]) + len(raw).to_bytes(width, "little") + raw + data


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(
        dtype=st.one_of(
            hnp.scalar_dtypes(),
            hnp.array_dtypes(allow_subarrays=True),
        ),
        shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    ),
    st.sampled_from([(1, 0), (2, 0), (3, 0)]),
    st.booleans(),
)
def test_reads_what_numpy_writes(array, version, fortran):
    array = np.asfortranarray(array) if fortran else array
    try:
        data = npy(array, version)
    except (UnicodeEncodeError, ValueError):
        return  # numpy has no such file
    expected = np.load(io.BytesIO(data))
    found = array_of(data)
    assert type(found) is np.ndarray
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes("A") == expected.tobytes("A")
    assert not found.flags.writeable


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_versions(version):
    array = np.arange(6, dtype=">i2").reshape(2, 3)
    assert np.array_equal(array_of(npy(array, version)), array)


def test_utf8_field_names_need_version_3():
    array = np.zeros(3, dtype=[("größe", "<f4"), ("π", ">i8", (2,))])
    with pytest.warns(UserWarning, match="format 3.0"):
        data = npy(array)
    assert array_of(data).dtype == array.dtype


def test_header_of_many_fields():
    array = np.zeros(2, dtype=[(f"field_{number}", "<f8") for number in range(5000)])
    assert array_of(npy(array, (2, 0))).dtype == array.dtype


def test_fortran_order():
    array = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    layout = layout_of(npy(array))
    assert layout.order == "F"
    assert np.array_equal(array_of(npy(array)), array)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)])
def test_empty_and_0d(shape):
    array = np.ones(shape, dtype="<f4")
    found = array_of(npy(array))
    assert found.shape == shape
    assert np.array_equal(found, array)
    assert not found.flags.writeable


def test_python_2_lengths():
    text = "{'descr': '<f8', 'fortran_order': False, 'shape': (2L, 3L), }"
    assert layout_of(header(text, data=bytes(48))).shape == (2, 3)


@pytest.mark.parametrize(
    "dtype", [object, [("a", "i4"), ("b", object)], [("a", [("b", object)], (2,))]]
)
def test_object_dtype_is_refused_by_name(dtype):
    file = io.BytesIO()
    np.save(file, np.zeros(2, dtype=dtype), allow_pickle=True)
    with pytest.raises(quire.FormatError, match="holds Python objects") as caught:
        layout_of(file.getvalue())
    assert caught.value.source == "x.npy"


GOOD = "{'descr': '<f8', 'fortran_order': False, 'shape': (2,)}"


HOSTILE = [
    (b"", "first bytes"),
    (MAGIC, "first bytes"),
    (MAGIC + b"\1\0\1", "first bytes"),
    (MAGIC + b"\2\0\1\0", "first bytes"),
    (MAGIC + b"\4\0\1\0\0\0", "version 4.0"),
    (MAGIC + b"\0\0\1\0\0\0", "version 0.0"),
    (MAGIC + b"\1\0\xff\xff{}", "the source ends before"),
    (MAGIC + b"\2\0\xff\xff\xff\xff", "claims 4,294,967,295 bytes"),
    (header(GOOD[:-1]), "SyntaxError"),
    (header("__import__('os')"), "ValueError"),
    (header("[1]"), "must have the keys"),
    (header("{'descr': '<f8'}"), "must have the keys"),
    (header(GOOD[:-1] + ", 'more': 1}"), "must have the keys"),
    (header("{[]: 1}"), "no dict"),
    (header(b"\xff\xfe", version=3), "UnicodeDecodeError"),
    (header("'" + "\0" * 10 + "'"), "SyntaxError"),
    (header(GOOD.replace("(2,)", "2")), "no tuple"),
    (header(GOOD.replace("(2,)", "(-2,)")), "no length"),
    (header(GOOD.replace("(2,)", "(2.0,)")), "no length"),
    (header(GOOD.replace("(2,)", "(True,)")), "no length"),
    (header(GOOD.replace("(2,)", f"({1 << 64},)")), "no length"),
    (header(GOOD.replace("(2,)", f"({'1,' * 100})")), "no tuple"),
    (header(GOOD.replace("False", "0")), "fortran_order"),
    (header(GOOD.replace("'<f8'", "'<f7'")), "descr is no dtype"),
    (header(GOOD.replace("'<f8'", "None")), "source"),
    (header(GOOD.replace("'<f8'", "[('a',)]")), "descr is no dtype"),
    (header(GOOD.replace("'<f8'", "[('a', '<f8', (1 << 40,))]")), "no dict"),
    (header(GOOD.replace("'<f8'", f"[('a', '<f8', ({1 << 40},))]")), "descr is no dtype"),
    (header(GOOD, data=bytes(15)), "truncated"),
    (header(GOOD.replace("(2,)", f"({1 << 62}, {1 << 62})")), "truncated"),
    (header("(" * 50_000), "no dict"),
    (header("-" * 60_000 + "1"), "no dict"),
    (header("[" * 90 + "]" * 90), "keys"),
    (header("1" * 5000, version=2), "no dict"),
]


@pytest.mark.parametrize(("data", "why"), HOSTILE, ids=range(len(HOSTILE)))
def test_damaged_and_hostile_headers(data, why):
    with pytest.raises(quire.FormatError, match=why) as caught:
        layout_of(data)
    assert caught.value.source == "x.npy"


def test_truncated_at_every_byte():
    data = npy(np.arange(4, dtype="<i2"))
    for end in range(len(data)):
        with pytest.raises(quire.FormatError):
            layout_of(data[:end])


def test_claims_cost_no_memory():
    claim = MAGIC + b"\2\0" + (HEADER_BYTES_MAX + 1).to_bytes(4, "little")
    data = claim + bytes(100)
    asked = []

    def read(offset: int, length: int) -> bytes:
        asked.append(length)
        return data[offset : offset + length]

    tracemalloc.start()
    try:
        with pytest.raises(quire.FormatError):
            read_layout(read, 1 << 40, "x.npy")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert max(asked) <= 12


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(1, 3))
def test_any_bytes_give_an_array_or_a_format_error(noise, version):
    for data in (MAGIC + bytes([version, 0]) + noise, header(noise, version)):
        try:
            layout_of(data)
        except quire.FormatError:
            continue


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_changed_byte_gives_an_array_or_a_format_error(draw):
    data = bytearray(npy(np.zeros(4, dtype=[("a", "<f4"), ("b", ">i2", (3,))])))
    at = draw.draw(st.integers(0, 127))
    data[at] = draw.draw(st.integers(0, 255))
    try:
        layout = layout_of(bytes(data))
    except quire.FormatError:
        return
    layout.view(memoryview(bytes(data)))
