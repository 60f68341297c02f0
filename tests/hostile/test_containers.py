"""The hostile containers through the whole of quire: bytes, or an error that says what is wrong."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import quire
from quire import _core

FOLDER = Path(__file__).parent
FILES = sorted(FOLDER.glob("*.zst"))
# A mapping needs at least one byte.
EMPTY = {"reads-no-frames.zst"}

pytestmark = pytest.mark.usefixtures("no_mapping_left")


def of_kind(kind: str) -> list[Path]:
    """The files of which this has to happen."""
    return [path for path in FILES if path.name.startswith(kind)]


def name_of(path: Path) -> str:
    """What a test of this file is called."""
    return path.stem


def test_the_files_are_what_their_maker_makes() -> None:
    spec = importlib.util.spec_from_file_location("containers", FOLDER / "containers.py")
    assert spec is not None
    assert spec.loader is not None
    containers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(containers)
    assert {path.name: path.read_bytes() for path in FILES} == containers.files()


@pytest.mark.parametrize("path", of_kind("reads"), ids=name_of)
def test_odd_files_read_right(path: Path) -> None:
    store = _core.open_zstd(_core.open_file(str(path)))
    expected = bytes(i % 251 for i in range(store.size))
    assert store.read(0, store.size) == expected
    if path.name not in EMPTY:
        with quire.open(path, dtype="u1") as mapping:
            assert mapping.array.tobytes() == expected


@pytest.mark.parametrize("path", of_kind("refused"), ids=name_of)
def test_wrong_tables_are_refused(path: Path) -> None:
    with pytest.raises(quire.FormatError, match=path.name):
        _core.open_zstd(_core.open_file(str(path)))


@pytest.mark.parametrize("path", of_kind("fails"), ids=name_of)
def test_wrong_frames_raise_in_the_thread_that_touched_them(path: Path) -> None:
    expected = quire.ChecksumError if "fails-checksum" in path.name else quire.CorruptError
    store = _core.open_zstd(_core.open_file(str(path)))
    with pytest.raises(expected, match="frame"):
        store.read(0, store.size)
    with quire.open(path, dtype="u1") as mapping:
        with pytest.raises(expected) as raised:  # noqa: PT012 - the loop is where it can be raised
            np.sum(mapping.array)
            for _ in range(3):
                pass
        assert raised.value.source is not None
        assert path.name in raised.value.source
        assert isinstance(mapping.failed, expected)
        with pytest.raises(expected):
            mapping.check()
