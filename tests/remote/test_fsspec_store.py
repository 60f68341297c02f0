"""Sources of the other protocols that fsspec knows."""

from __future__ import annotations

import errno
import os
import pickle
import zipfile
from typing import TYPE_CHECKING

import fsspec
import pytest
from core_side import CoreSide
from reading import read

from quire import errors
from quire.store import fsspec_store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def archive(folder: Path) -> str:
    """A URL of the served file inside a zip archive: a chain of two file systems."""
    with zipfile.ZipFile(folder / "a.zip", "w") as file:
        file.write(folder / "x.bin", "x.bin")
    return f"zip://x.bin::file://{folder}/a.zip"


@pytest.fixture
def in_memory(content: bytes) -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/quire/x.bin", content)
    yield "memory://quire/x.bin"
    fs.rm("/quire", recursive=True)


def test_reads_every_part(folder: Path, content: bytes) -> None:
    store = fsspec_store.recipe(f"local://{folder}/x.bin").open()
    assert store.size == len(content)
    assert store.version
    for offset, length in ((0, 1), (0, len(content)), (len(content) - 1, 1), (4096, 65536), (7, 0)):
        assert read(store, offset, length) == content[offset : offset + length]
    store.close()


def test_chained_urls_through_the_pager(archive: str, content: bytes) -> None:
    with CoreSide(fsspec_store.recipe(archive)) as core:
        assert core.first["size"] == len(content)
        assert core.read(1000, 5000) == content[1000:6000]


def test_memory_files_travel_with_the_recipe(in_memory: str, content: bytes) -> None:
    with CoreSide(fsspec_store.recipe(in_memory)) as core:
        assert core.first["label"] == in_memory
        assert core.read(0, len(content)) == content


def test_a_file_that_changes(folder: Path, content: bytes) -> None:
    store = fsspec_store.recipe(f"local://{folder}/x.bin").open()
    assert read(store, 0, 10) == content[:10]
    os.utime(folder / "x.bin", (0, 0))
    with pytest.raises(errors.ChangedError):
        read(store, 0, 10)


def test_a_file_that_goes(folder: Path) -> None:
    store = fsspec_store.recipe(f"local://{folder}/x.bin").open()
    (folder / "x.bin").unlink()
    with pytest.raises(errors.PageIOError, match="fsspec cannot read it") as caught:
        read(store, 0, 10)
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("name", ["nothing", "."])
def test_what_is_not_a_file(folder: Path, name: str) -> None:
    with pytest.raises(errors.SourceError, match="no such file"):
        fsspec_store.recipe(f"local://{folder}/{name}").open()


def test_memory_files_that_are_not_there() -> None:
    with pytest.raises(errors.SourceError, match="in this process's memory"):
        fsspec_store.recipe("memory://nothing/there")


def test_unknown_protocols_are_refused() -> None:
    with pytest.raises(errors.SourceError, match="no store reads nonsense://"):
        fsspec_store.recipe("nonsense://x/y")


def test_fsspec_is_named_when_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(errors.SourceError, match=r"pip install 'quire\[remote\]'"):
        fsspec_store.recipe("ftp://host/x")


def test_a_missing_package_is_named() -> None:
    with pytest.raises(errors.SourceError, match="needs a package"):
        fsspec_store.recipe("dropbox://x/y").open()


def test_recipes_travel_and_hide_secrets() -> None:
    recipe = fsspec_store.recipe("ftp://me:SECRET@host/x.npy", {"password": "SECRET"})
    assert "SECRET" not in repr(recipe) + recipe.label
    assert recipe.label == "ftp://host/x.npy"
    assert pickle.loads(pickle.dumps(recipe)) == recipe
