"""Limits of the system that a mapping hits: each is named, with its value, where it was hit."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import tempfile
from pathlib import Path

import numpy as np
import pytest

import quire
from quire.testing import children

PAGE = mmap.PAGESIZE
FILES = resource.RLIMIT_NOFILE


def test_what_cannot_be_locked_is_no_limit(tmp_path: Path) -> None:
    """Nothing is said of a limit that was not hit."""
    path = tmp_path / "short.bin"
    path.write_bytes(bytes(16 * PAGE))
    with quire.map(path, 32 * PAGE, sharing="shared") as mapping:
        os.truncate(path, PAGE)
        for call in (lambda: mapping.lock(PAGE, PAGE), lambda: mapping.pin(np.s_[PAGE : 2 * PAGE])):
            with pytest.raises(quire.Error, match=r"A page of it .* beyond the end") as caught:
                call()
            assert caught.value.errno == errno.ENOMEM
            assert "RLIMIT" not in str(caught.value)


def test_limits_are_named() -> None:
    children.run(child_hits_limits).check()


def child_hits_limits() -> None:
    def refused(call: object, number: int, *words: str) -> None:
        with pytest.raises(quire.Error) as caught:
            call()  # type: ignore[operator]
        assert caught.value.errno == number, str(caught.value)
        assert all(word in str(caught.value) for word in words), str(caught.value)

    def private(size: str) -> object:
        return lambda: quire.map(size=size, sharing="private")

    meminfo = Path("/proc/meminfo").read_text()
    overcommit = Path("/proc/sys/vm/overcommit_memory").read_text().strip()
    assert "MemTotal" in meminfo
    if overcommit == "0":
        refused(private("60 TiB"), errno.ENOMEM, "vm.overcommit_memory is 0", "NORESERVE")
    flags = quire.MapFlag.NORESERVE
    refused(lambda: quire.map(size=1 << 50, sharing="private", flags=flags), errno.ENOMEM, "2**47")
    with pytest.raises(quire.Error, match="2\\*\\*47 bytes: map or reserve less") as caught:
        quire.map(size=PAGE, sharing="private", reserve=1 << 48)
    assert "overcommit" not in str(caught.value)
    limits = ((resource.RLIMIT_DATA, "RLIMIT_DATA"), (resource.RLIMIT_AS, "RLIMIT_AS"))
    for which, name in limits:
        before = resource.getrlimit(which)
        resource.setrlimit(which, (1 << 30, before[1]))
        refused(private("2 GiB"), errno.ENOMEM, name, "1.0 GiB", "ulimit")
        resource.setrlimit(which, before)
    with tempfile.TemporaryDirectory() as folder:
        path, before = Path(folder, "x"), resource.getrlimit(resource.RLIMIT_FSIZE)
        path.write_bytes(bytes(PAGE))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        with quire.map(path, sharing="shared", protection="rw") as file:
            refused(lambda: file.resize("2 MiB"), errno.EFBIG, "RLIMIT_FSIZE", "1.0 MiB", "ulimit")
            assert path.stat().st_size == PAGE
        for make in (lambda: quire.Ring("2 MiB"), lambda: quire.shared(size="2 MiB")):
            refused(make, errno.EFBIG, "RLIMIT_FSIZE", "1.0 MiB", "ulimit")
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    if os.geteuid() != 0:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (PAGE, PAGE))
        locked = quire.MapFlag.LOCKED
        with quire.map(size=8 * PAGE, sharing="private") as memory:
            refused(memory.lock, errno.ENOMEM, "RLIMIT_MEMLOCK is 4.0 KiB", "CAP_IPC_LOCK")
            refused(memory.pin, errno.ENOMEM, "RLIMIT_MEMLOCK is 4.0 KiB", "CAP_IPC_LOCK")
        with quire.Arena(8 * PAGE) as arena:
            arena.map(0, size=8 * PAGE, sharing="private")
            refused(arena.pin, errno.ENOMEM, "RLIMIT_MEMLOCK is 4.0 KiB", "CAP_IPC_LOCK")
        refused(
            lambda: quire.map(size=8 * PAGE, sharing="private", flags=locked),
            errno.EAGAIN,
            "RLIMIT_MEMLOCK",
        )
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        refused(
            lambda: quire.map(size=8 * PAGE, sharing="private", flags=locked),
            errno.EPERM,
            "RLIMIT_MEMLOCK is 0",
        )


def test_limits_are_named_without_a_descriptor() -> None:
    children.run(child_has_no_descriptor).check()


def child_has_no_descriptor() -> None:
    """What only /proc knows is left out, and the error is raised all the same."""
    quire.Ring(PAGE).close()
    quire.shared(size=PAGE).close()
    space, files = (resource.getrlimit(which) for which in (resource.RLIMIT_AS, FILES))
    resource.setrlimit(FILES, (64, files[1]))
    taken = []

    def take_all() -> None:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))

    with pytest.raises(OSError, match="Too many open files"):
        take_all()
    told = []
    for make in (lambda: quire.Ring(PAGE), lambda: quire.shared(size=PAGE)):
        with pytest.raises(quire.Error, match="RLIMIT_NOFILE is used up") as caught:
            make()
        assert caught.value.errno == errno.EMFILE
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, space[1]))
    for flags in (0, quire.MapFlag.HUGETLB):
        with pytest.raises(quire.Error) as caught:
            quire.map(size="8 GiB", sharing="private", flags=flags)
        told.append(str(caught.value))
    resource.setrlimit(resource.RLIMIT_AS, space)
    for descriptor in taken:
        os.close(descriptor)
    for text in told:
        assert "RLIMIT_AS is 4.0 GiB, and an unknown number of addresses are mapped" in text
        assert "Some limits cannot be looked at (Too many open files)" in text


def test_the_limit_of_map_entries_is_named() -> None:
    children.run(child_runs_out_of_map_entries).check()


def child_runs_out_of_map_entries() -> None:
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    memory = quire.map(size=most * PAGE, sharing="private", flags=quire.MapFlag.NORESERVE)

    def protect_every_other_page() -> None:
        for page in range(0, most, 2):
            memory.protect("r", page * PAGE, PAGE)

    with pytest.raises(quire.Error, match=rf"vm\.max_map_count is {most}"):
        protect_every_other_page()
    more = []
    with pytest.raises(quire.Error, match=r"sysctl -w vm\.max_map_count"):
        more += [quire.map(size=PAGE, sharing="shared") for _ in range(8)]
    memory.close()
    quire.map(size=PAGE, sharing="shared").close()


if __name__ == "__main__":
    children.main()
