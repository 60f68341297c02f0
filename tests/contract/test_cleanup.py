"""Nothing is left behind: by close, by garbage collection, by the end of the interpreter."""

from __future__ import annotations

import errno
import gc
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import quire
from quire import _core
from quire.store.resolve import Source
from quire.testing import children
from quire.testing.census import Census, child_processes, take_census
from quire.testing.content import random_content
from quire.testing.stores import BytesStore, GatedStore
from quire.testing.touches import TOUCHES
from quire.testing.waiting import wait_until

KINDS = ["file", "zstd", "python"]
CONTENT = random_content(300_001, 3)
MODEL = np.frombuffer(CONTENT, "u1")
MIB = 1 << 20
CYCLES = {"file": 1000, "zstd": 1000, "python": 25}
EXIT_LIMIT_S = 10.0
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}


def source_of(kind: str, folder: Path) -> Source:
    """A source of `CONTENT`."""
    if kind == "python":
        return BytesStore(CONTENT)
    plain, packed = folder / "content", folder / "content.zst"
    if not plain.exists():
        plain.write_bytes(CONTENT)
        quire.pack(plain, packed, frame="64 KiB")
    return packed if kind == "zstd" else plain


def map_source(source: Source, pmap: str) -> quire.Mapping:
    return quire.open(source, dtype="u1", pmap=pmap, budget="8 MiB")


def use_and_close(kind: str, pmap: str, folder: Path) -> None:
    with map_source(source_of(kind, folder), pmap) as mapping:
        array = mapping.array
        assert array[0] == MODEL[0]
        assert array[-1] == MODEL[-1]
        del array
        mapping.close()


def check_same(before: Census, after: Census) -> None:
    """Nothing is there that was not, but for some memory of the allocator's."""
    assert after.threads == before.threads
    assert after.descriptors == before.descriptors
    assert after.children == before.children
    assert after.map_entries <= before.map_entries + 8
    assert after.resident_bytes <= before.resident_bytes + 8 * MIB


def child_closes(kind: str, pmap: str, folder: str) -> None:
    """Ways for a mapping to end, each followed by a census."""
    place = Path(folder)
    for _ in range(3):
        use_and_close(kind, pmap, place)
    before = take_census()
    assert len(before.threads) == 1
    assert before.children == ()

    use_and_close(kind, pmap, place)
    check_same(before, take_census())

    mapping = map_source(source_of(kind, place), pmap)
    assert np.array_equal(mapping.array, MODEL)
    assert len(take_census().threads) > 1
    assert bool(child_processes()) == (kind == "python")
    del mapping
    gc.collect()
    check_same(before, take_census())

    with map_source(source_of(kind, place), pmap) as mapping:
        array = mapping.array
    assert array[-1] == MODEL[-1]  # the view keeps what it views
    assert len(take_census().threads) > 1
    del array, mapping
    check_same(before, take_census())

    circle: list[object] = [map_source(source_of(kind, place), pmap)]
    circle.append(circle)
    del circle
    gc.collect()
    check_same(before, take_census())
    assert _core.live_mappings() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_close_and_garbage_collection(kind: str, pmap: str, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    env = {"TMPDIR": str(tmp_path / "tmp"), **ONE_THREAD}
    children.run(child_closes, kind, pmap, tmp_path, env=env).check()
    assert list((tmp_path / "tmp").iterdir()) == []


def child_opens_and_closes_often(kind: str, pmap: str, folder: str) -> None:
    place = Path(folder)
    cycles = CYCLES[kind]
    for _ in range(cycles // 10):
        use_and_close(kind, pmap, place)
    before = take_census()
    for _ in range(cycles):
        use_and_close(kind, pmap, place)
    after = take_census()
    check_same(before, after)
    assert after.address_space_bytes <= before.address_space_bytes + MIB


@pytest.mark.parametrize("kind", KINDS)
def test_many_cycles_do_not_grow(kind: str, pmap: str, tmp_path: Path) -> None:
    children.run(child_opens_and_closes_often, kind, pmap, tmp_path).check()


def child_cannot_open(pmap: str, folder: str) -> None:
    """Every step at which opening can fail."""
    place = Path(folder)
    use_and_close("python", pmap, place)
    source_of("zstd", place)  # packing loads modules, which stay
    before = take_census()
    for number in range(30):
        for source, options in [
            (place / "nothing", {}),
            (source_of("zstd", place), {"budget": 1}),
            (source_of("file", place), {"granule": 1000}),
            (source_of("file", place), {"pmap": "mmu"}),
            (source_of("file", place), {"dtype": "O"}),
            *([(BytesStore(CONTENT), {"budget": 1})] if number == 0 else []),
            *([(BrokenStore(), {})] if number == 0 else []),
        ]:
            with pytest.raises((quire.Error, ValueError)):
                quire.open(source, **{"dtype": "u1", "pmap": pmap, **options})
    gc.collect()
    check_same(before, take_census())


class BrokenStore(BytesStore):
    """Cannot be opened in a pager process: it says something else than a size."""

    def __init__(self) -> None:
        super().__init__(b"")

    def __reduce__(self) -> tuple[object, ...]:
        return int, ("7",)


def test_what_cannot_be_opened_leaves_nothing(pmap: str, tmp_path: Path) -> None:
    children.run(child_cannot_open, pmap, tmp_path).check()


def child_is_torn_down(pmap: str, folder: str) -> None:
    """Mappings of every kind are open, failed, faulting and waiting when the interpreter ends."""
    place = Path(folder)
    opened = [map_source(source_of(kind, place), pmap) for kind in KINDS]
    arrays = [mapping.array for mapping in opened]
    assert all(array[0] == MODEL[0] for array in arrays)
    memory = _core.open_memory(CONTENT, "failing memory")
    failing = _core.open_faulty(memory, offset=100_000, length=1, errno=errno.EIO)
    bad = map_source(failing, pmap).array

    def fail_for_ever() -> None:
        while True:
            try:
                TOUCHES["sum"](bad)
            except quire.PageIOError:
                continue

    def fault_for_ever() -> None:
        while True:
            assert np.array_equal(arrays[0], MODEL)

    gated = GatedStore(CONTENT, place, range(100_000, 110_000))
    stalled = map_source(gated, pmap).array

    def wait_for_ever() -> None:
        stalled.copy()  # without the interpreter lock: with it nobody could leave

    for body in (fail_for_ever, fail_for_ever, fault_for_ever, wait_for_ever):
        threading.Thread(target=body, daemon=True).start()
    wait_until(gated.arrived, "the read that stalls")
    print(*child_processes(), flush=True)
    print("leaving", flush=True)


@pytest.mark.parametrize("flags", [(), ("-X", "dev")], ids=["plain", "development mode"])
def test_the_interpreter_ends_quickly_and_quietly(
    pmap: str, flags: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "tmp").mkdir()
    env = {"TMPDIR": str(tmp_path / "tmp")}
    with children.start(child_is_torn_down, pmap, tmp_path, flags=flags, env=env) as child:
        child.wait_line("leaving")
        output = child.finish(EXIT_LIMIT_S).check()
    pagers = [int(word) for word in output.split()[:-1]]
    assert len(pagers) == 2
    wait_until(lambda: not any(is_alive(pid) for pid in pagers), "the end of the pagers")
    assert list((tmp_path / "tmp").iterdir()) == []


def is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def child_leaves(how: str, pmap: str, folder: str) -> None:
    """Ends the interpreter in other ways while a page error is on its way."""
    memory = _core.open_memory(CONTENT, "memory")
    failing = _core.open_faulty(memory, offset=100_000, length=1, errno=errno.EIO)
    array = map_source(failing, pmap).array
    pager = map_source(source_of("python", Path(folder)), pmap)
    assert pager.array[0] == MODEL[0]
    print(*child_processes(), flush=True)
    leave = {"raise": lambda _: None, "sys.exit": sys.exit, "os._exit": os._exit}[how]
    leave(int(array.sum() < 0))


@pytest.mark.parametrize(("how", "status"), [("raise", 1), ("sys.exit", 1), ("os._exit", 1)])
def test_other_ends(how: str, status: int, pmap: str, tmp_path: Path) -> None:
    ended = children.run(child_leaves, how, pmap, tmp_path)
    assert ended.status == status, ended
    if how != "os._exit":
        assert ended.errors.count("quire.errors.PageIOError: ") == 1
        assert "EIO" in ended.errors
    (pager,) = map(int, ended.output.split())
    wait_until(lambda: not is_alive(pager), "the end of the pager process")


if __name__ == "__main__":
    children.main()
