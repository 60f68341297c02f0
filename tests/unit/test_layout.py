import numpy as np
import pytest

import quire
from quire.layout import ArrayLayout, raw_layout


def raw(source_bytes, dtype="<f4", shape=None, offset=0, order="C"):
    return raw_layout(source_bytes, "x.bin", dtype, shape, offset, order)


@pytest.mark.parametrize(
    ("source_bytes", "shape", "offset", "expected"),
    [
        (80, None, 0, (20,)),
        (80, None, 8, (18,)),
        (80, 5, 0, (5,)),
        (80, -1, 0, (20,)),
        (80, (-1, 5), 0, (4, 5)),
        (80, [2, -1, 2], 0, (2, 5, 2)),
        (80, (), 76, ()),
        (0, None, 0, (0,)),
        (0, (0, 7), 0, (0, 7)),
        (80, np.array([4, 5]), 0, (4, 5)),
        (80, range(4, 6), 0, (4, 5)),
        (80, np.int64(3), 0, (3,)),
    ],
)
def test_shapes(source_bytes, shape, offset, expected):
    assert raw(source_bytes, shape=shape, offset=offset).shape == expected


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"source_bytes": 81}, "no whole number of pieces"),
        ({"source_bytes": 80, "shape": (-1, 3)}, "no whole number of pieces"),
        ({"source_bytes": 80, "shape": (-1, 0)}, "no whole number of pieces"),
        ({"source_bytes": 80, "dtype": "V0"}, "no whole number of pieces"),
        ({"source_bytes": 80, "shape": 21}, "has 80"),
        ({"source_bytes": 80, "shape": (1 << 40, 1 << 40)}, "has 80"),
        ({"source_bytes": 80, "offset": 81}, "past the end"),
        ({"source_bytes": 80, "offset": 4, "shape": 20}, "ends at byte 84"),
        ({"source_bytes": 80, "dtype": "O"}, "holds Python objects"),
    ],
)
def test_bytes_that_hold_no_such_array(arguments, why):
    with pytest.raises(quire.FormatError, match=why) as caught:
        raw(**arguments)
    assert caught.value.source == "x.bin"


@pytest.mark.parametrize(
    "arguments",
    [
        {"order": "A"},
        {"offset": -1},
        {"shape": (-1, -1)},
        {"shape": (-2,)},
        {"shape": (1,) * 65},
    ],
)
def test_arguments_out_of_range(arguments):
    with pytest.raises(ValueError):
        raw(80, **arguments)


@pytest.mark.parametrize("arguments", [{"dtype": "f7"}, {"shape": 1.5}, {"offset": "3"}])
def test_arguments_of_the_wrong_type(arguments):
    with pytest.raises(TypeError):
        raw(80, **arguments)


@pytest.mark.parametrize("order", ["C", "F"])
def test_view_is_an_exact_read_only_array_of_the_memory(order):
    data = np.arange(13, dtype="u1").tobytes()
    view = raw(13, dtype=">u2", shape=(2, 3), offset=1, order=order).view(memoryview(data))
    expected = np.frombuffer(data, ">u2", 6, 1).reshape((2, 3), order=order)
    assert type(view) is np.ndarray
    assert np.array_equal(view, expected)
    assert view.ctypes.data == np.frombuffer(data, "u1").ctypes.data + 1
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 1


def test_an_array_without_bytes_needs_no_memory():
    layout = ArrayLayout(np.dtype("V0"), (5,), "C", 0, "raw")
    assert layout.view(memoryview(b"")).shape == (5,)
