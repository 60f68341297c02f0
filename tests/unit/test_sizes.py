import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("17", 17),
        ("17 B", 17),
        ("64MiB", 64 << 20),
        (" 64  mib ", 64 << 20),
        ("2G", 2 << 30),
        ("1.5 GiB", 3 << 29),
        ("1_000 kB", 10**6),
        ("1,000 B", 1000),
        ("3TiB", 3 << 40),
        ("2 PiB", 2 << 50),
        ("1 EiB", 1 << 60),
        ("1.5 PB", 1_500_000 * 10**9),
    ],
)
def test_text(text, size_bytes):
    assert parse_size(text) == size_bytes


def test_auto_is_the_processs():
    with pytest.raises(ValueError, match=r'quire.set_budget\("auto"\); the budget here'):
        parse_size("auto", name="budget")


def test_numpy_integers_are_integers():
    assert parse_size(np.int32(4096)) == 4096


@pytest.mark.parametrize("text", ["", "MiB", "12 parsecs", "-1", "1e9", "1..5 MiB", "٣ MiB", "nan"])
def test_other_text_is_refused_by_name(text):
    with pytest.raises(ValueError, match=r"budget .* is no size.*64 MiB"):
        parse_size(text, name="budget")


@pytest.mark.parametrize("size", [-1, 1 << 63, "8388608 TiB"])
def test_out_of_range(size):
    with pytest.raises(ValueError, match="outside"):
        parse_size(size)


@pytest.mark.parametrize("size", [1.5, None, True, b"1", [1]])
def test_other_types(size):
    with pytest.raises(TypeError, match="granule must be an int or text"):
        parse_size(size, name="granule")


@given(st.integers(0, (1 << 63) - 1))
def test_integers_in_any_spelling(size_bytes):
    assert parse_size(size_bytes) == parse_size(str(size_bytes)) == size_bytes


@given(st.integers(0, 1 << 50))
def test_formatted_sizes_parse_back_to_about_the_same(size_bytes):
    text = format_size(size_bytes).replace("bytes", "").replace("byte", "")
    assert parse_size(text) == pytest.approx(size_bytes, rel=0.06)
