"""What libraries make of mappings of every pmap, whose pages are not there yet."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quire
from consumers import TABLE, TEXT, WRITERS, Consumer
from quire.testing.pmaps import takes_system_calls, working_pmaps

PMAPS = ["kernel", *working_pmaps()]
REQUIRED = {
    "pandas_frame",
    "arrow_array",
    "polars_frame",
    "numba_compiled",
    "scikit_learn_fits",
    "scipy_functions",
    "dask_array",
    "joblib_dumped",
    "hdf5_written",
    "safetensors_saved",
}
"""Of the libraries of the extra `consumers`; others take part where they are installed."""

UNSEEN = {"hdf5_written"}
"""They hand the pointer to a system call without asking numpy for a buffer: quire cannot see it."""

PARTIAL = {"arrow_reads_json", "frombuffer", "json_text", "text_decoding"}
"""They read only the beginning of what the truncated file holds."""

WHOLE = {name: function for name, function in (TABLE | TEXT).items() if name not in PARTIAL}

table = np.random.default_rng(5).standard_normal((4096, 16))
text = json.dumps(
    [{"id": number, "is": ["even", "odd"][number % 2]} for number in range(20_000)]
).encode()


def test_the_libraries_are_here() -> None:
    missing = REQUIRED - TABLE.keys()
    assert not missing, "pip install 'quire[consumers]'"


@pytest.fixture(params=PMAPS)
def how(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of `quire.open`: pages that come one by one, and go again."""
    if request.param == "kernel":
        return {"pmap": "kernel"}
    return {"pmap": request.param, "granule": "16 KiB", "budget": "4 MiB"}


@pytest.fixture
def table_file(tmp_path: Path) -> Path:
    path = tmp_path / "table.npy"
    np.save(path, table)
    return path


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.json"
    path.write_bytes(text)
    return path


def require_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, tuple | list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            require_equal(one, other)
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected or (found != found and expected != expected)


@pytest.fixture
def cold_table(table_file: Path, how: dict[str, Any]) -> Iterator[quire.Mapping]:
    with quire.open(table_file, **how) as mapping:
        mapping.evict()
        yield mapping
        assert mapping.failed is None


@pytest.mark.parametrize("consumer", TABLE.values(), ids=TABLE)
def test_tables(cold_table: quire.Mapping, consumer: Consumer) -> None:
    expected = consumer(table)
    if consumer.__name__ in UNSEEN and not takes_system_calls(cold_table.pmap):
        with pytest.raises(OSError, match="Bad address"):
            consumer(cold_table.array)
        with cold_table.pin():
            require_equal(consumer(cold_table.array), expected)
    else:
        require_equal(consumer(cold_table.array), expected)


@pytest.mark.parametrize("consumer", TEXT.values(), ids=TEXT)
def test_texts(text_file: Path, how: dict[str, Any], consumer: Consumer) -> None:
    with quire.open(text_file, dtype="u1", **how) as mapping:
        mapping.evict()
        require_equal(consumer(mapping.array), consumer(np.frombuffer(text, "u1")))
        assert mapping.failed is None


@pytest.mark.parametrize("mode", ["r+", "c"])
@pytest.mark.parametrize("consumer", WRITERS.values(), ids=WRITERS)
def test_writers(table_file: Path, how: dict[str, Any], consumer: Consumer, mode: str) -> None:
    expected = table.copy()
    told = consumer(expected)
    with quire.open(table_file, mode=mode, **how) as mapping:
        mapping.evict()
        require_equal(consumer(mapping.array), told)
        np.testing.assert_array_equal(mapping.array, expected)
        mapping.evict()
        np.testing.assert_array_equal(mapping.array, expected)
        assert mapping.failed is None
    np.testing.assert_array_equal(np.load(table_file), expected if mode == "r+" else table)


@pytest.mark.parametrize("consumer", WHOLE.values(), ids=WHOLE)
def test_a_file_that_ends_early_is_an_exception(
    table_file: Path, how: dict[str, Any], consumer: Consumer
) -> None:
    """Whatever a library does with the error, it is not lost and the process lives."""
    size = table_file.stat().st_size
    with quire.open(table_file, **how) as mapping:
        mapping.evict()
        with open(table_file, "r+b") as file:
            file.truncate(size // 2)
        array = mapping.array if consumer.__name__ in TABLE else mapping.array.view("u1").ravel()
        with pytest.raises((quire.PageIOError, OSError)) as caught:  # noqa: PT012 - one outcome
            try:
                consumer(array)
            finally:  # of filler it may have made an error of its own: of no JSON, and so on
                mapping.check()
        if isinstance(caught.value, quire.PageIOError):
            assert caught.value.source == str(table_file)
            assert caught.value.offset is not None
        else:
            assert caught.value.errno == errno.EFAULT or "Bad address" in str(caught.value)
