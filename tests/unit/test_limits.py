"""Which limit is named, on systems that are made up: those that a test may not bring about."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

import quire
from quire import limits
from quire.limits import Asked, explained
from quire.map_flags import MapFlag

GIB = 1 << 30
PRIVATE = int(MapFlag.PRIVATE | MapFlag.ANONYMOUS)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the kernel would show, of a machine with 8 GiB of which 6 are promised."""
    write(tmp_path / "sys/vm/max_map_count", "65530\n")
    write(tmp_path / "sys/vm/overcommit_memory", "2\n")
    memory = {"MemTotal": 8, "SwapTotal": 2, "CommitLimit": 7, "Committed_AS": 6}
    rows = [f"{name}: {gib << 20} kB\n" for name, gib in memory.items()]
    write(tmp_path / "meminfo", "".join(rows))
    write(tmp_path / "self/maps", "00400000-00452000 r-xp 00000000 08:02 173521 /bin/x\n" * 9)
    write(tmp_path / "self/stat", f"1 (a) b) S {'0 ' * 24}{(1 << 36) - 1} 0\n")
    write(tmp_path / "self/status", "VmSize: 1000 kB\nVmData: 100 kB\nVmLck: 8 kB\n")
    write(tmp_path / "self/cgroup", "4:cpu:/\n0::/\n")
    monkeypatch.setattr(limits, "PROC", tmp_path)
    monkeypatch.setattr(limits, "CGROUPS", tmp_path / "cgroup")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def said(number: int, asked: Asked, call: str = "mmap") -> str:
    error = quire.Error(f"{call}: refused", source="here", errno=number)
    made = explained(error, asked)
    assert made.errno == number
    assert made.source == "here"
    return made.message


def test_overcommit_never(system: Path) -> None:
    text = said(errno.ENOMEM, Asked(2 * GIB, PRIVATE, 3))
    assert "vm.overcommit_memory is 2 (never), and of 7.0 GiB (CommitLimit) 6.0 GiB" in text
    assert "vm.overcommit_ratio" in text
    assert "overcommit" not in said(errno.ENOMEM, Asked(GIB >> 1, PRIVATE, 3))


def test_overcommit_by_guess(system: Path) -> None:
    write(system / "sys/vm/overcommit_memory", "0\n")
    assert "refuses more at once than the 10.0 GiB" in said(
        errno.ENOMEM, Asked(11 * GIB, PRIVATE, 3)
    )
    for free in (Asked(11 * GIB, PRIVATE | MapFlag.NORESERVE, 3), Asked(11 * GIB, PRIVATE, 1)):
        assert "vm.overcommit_memory" not in said(errno.ENOMEM, free)


def test_map_count(system: Path) -> None:
    write(system / "sys/vm/max_map_count", "10\n")
    assert "vm.max_map_count is 10, and the process has 9 map entries" in said(
        errno.ENOMEM, Asked(4096, PRIVATE, 3)
    )


@pytest.mark.parametrize(
    ("row", "folder", "limit", "usage"),
    [
        ("0::/jobs/one", "cgroup/jobs/one", "memory.max", "memory.current"),
        ("0::/jobs/one", "cgroup/jobs", "memory.max", "memory.current"),
        (
            "9:cpu,memory:/jobs/one",
            "cgroup/memory/jobs/one",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
        ),
        ("9:memory:/", "cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ],
)
def test_control_groups(system: Path, row: str, folder: str, limit: str, usage: str) -> None:
    write(system / "self/cgroup", f"4:cpuset:/other\n{row}\n")
    write(system / folder / limit, f"{64 << 20}\n")
    write(system / folder / usage, f"{60 << 20}\n")
    text = said(errno.ENOMEM, Asked(4096, int(MapFlag.SHARED), 1))
    assert f"The control group {system / folder} has a {limit} of 64.0 MiB, and 60.0 MiB" in text


def test_addresses_that_are_held_are_no_memory(system: Path) -> None:
    text = said(errno.ENOMEM, Asked(4096, PRIVATE, 3, reserve=1 << 36))
    assert text == "mmap: refused. An address space has 2**36 bytes: map or reserve less"
    assert "2**36" not in said(errno.ENOMEM, Asked(4096, PRIVATE, 3, reserve=(1 << 36) - 4096))


def test_what_cannot_be_read_is_left_out(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no descriptor is left to read it by."""
    monkeypatch.setattr(limits, "_limit", lambda _: GIB)
    for name in ("self/status", "self/maps", "meminfo"):
        (system / name).unlink()
    asked = Asked(2 * GIB, PRIVATE, 3)
    text = said(errno.ENOMEM, asked)
    assert "RLIMIT_AS is 1.0 GiB, and an unknown number of addresses are mapped" in text
    assert "RLIMIT_DATA is 1.0 GiB, and an unknown number are private" in text
    assert text.endswith("Some limits cannot be looked at (No such file or directory)")
    for call, number in (("mlock", errno.ENOMEM), ("mmap", errno.EAGAIN)):
        assert "Some limits cannot be looked at" in said(number, asked, call)


def test_nothing_to_be_seen(system: Path) -> None:
    write(system / "cgroup/memory.max", "max\n")
    write(system / "cgroup/memory.current", "4096\n")
    assert "No limit that quire can see" in said(errno.ENOMEM, Asked(4096, int(MapFlag.SHARED), 1))


def as_user(system: Path, capabilities: int = 0, users: str = "0 0 4294967295") -> None:
    status = f"VmSize: 1000 kB\nVmLck: 8 kB\nCapEff: {capabilities:016x}\n"
    write(system / "self/status", status)
    write(system / "self/uid_map", f"{users}\n")


def test_locked_memory(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_limit", lambda _: 64 << 10)
    large, small = Asked(1 << 20, PRIVATE, 3), Asked(4096, PRIVATE, 3)
    as_user(system)
    text = said(errno.ENOMEM, large, "mlock")
    assert "RLIMIT_MEMLOCK is 64.0 KiB, and 8.0 KiB are locked: 1.0 MiB more" in text
    assert "Or a page of it cannot be had" in text
    assert "RLIMIT_MEMLOCK" in said(errno.EAGAIN, large)
    assert "mlock: refused. A page of it cannot be had" in said(errno.ENOMEM, small, "mlock")
    as_user(system, 1 << limits.CAP_IPC_LOCK)  # root: the limit does not bind it
    assert "RLIMIT_MEMLOCK" not in said(errno.ENOMEM, large, "mlock")
    as_user(system, 1 << limits.CAP_IPC_LOCK, "0 1000 1")  # root of a user namespace
    assert "RLIMIT_MEMLOCK" in said(errno.ENOMEM, large, "mlock")


def test_no_map_entry_left_for_a_lock(system: Path) -> None:
    write(system / "sys/vm/max_map_count", "10\n")
    assert "vm.max_map_count is 10" in said(errno.ENOMEM, Asked(4096, PRIVATE, 3), "mlock")


def test_the_longest_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(GIB, int(MapFlag.SHARED), 3, "here")
    monkeypatch.setattr(limits, "_limit", lambda _: 64 << 10)
    assert "RLIMIT_FSIZE" in said(errno.EFBIG, asked, "ftruncate")
    monkeypatch.setattr(limits, "_limit", lambda _: None)
    assert "The file system of here holds no file that long" in said(
        errno.EFBIG, asked, "ftruncate"
    )
    memory = Asked(GIB, int(MapFlag.SHARED | MapFlag.ANONYMOUS))
    assert "No memory file is that long: ask for less" in said(errno.EFBIG, memory, "ftruncate")


def test_parts_that_differ_are_told_of_locks() -> None:
    assert "unlock" in said(errno.EFAULT, Asked(GIB, PRIVATE, 3), "mremap")
