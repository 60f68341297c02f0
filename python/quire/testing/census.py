"""What a process holds: threads, descriptors, map entries, child processes, address space."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Census", "child_processes", "is_mapped", "take_census"]


@dataclass(frozen=True)
class Census:
    """Counts at one moment, of this process.

    Attributes:
        threads: names of the kernel's tasks, sorted.
        descriptors: what the open descriptors refer to, sorted.
        map_entries: lines of ``/proc/self/maps``.
        children: ids of child processes, sorted.
        address_space_bytes: VmSize.
        resident_bytes: VmRSS.
    """

    threads: tuple[str, ...]
    descriptors: tuple[str, ...]
    map_entries: int
    children: tuple[int, ...]
    address_space_bytes: int
    resident_bytes: int


def take_census() -> Census:
    """Counts now.

    >>> take_census().threads != ()
    True
    """
    status = Path("/proc/self/status").read_text()
    facts = dict(line.split(":", 1) for line in status.splitlines())
    return Census(
        threads=tuple(sorted(_thread_names())),
        descriptors=tuple(sorted(_descriptors())),
        map_entries=Path("/proc/self/maps").read_text().count("\n"),
        children=tuple(sorted(child_processes())),
        address_space_bytes=int(facts["VmSize"].split()[0]) * 1024,
        resident_bytes=int(facts["VmRSS"].split()[0]) * 1024,
    )


def child_processes() -> list[int]:
    """Ids of this process's children, those that ended and were not waited for included."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        try:
            found += map(int, (task / "children").read_text().split())
        except FileNotFoundError:  # the thread ended meanwhile
            continue
    return found


def is_mapped(address: int) -> bool:
    """Whether ``address`` lies in a map entry of this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if start <= address < end:
            return True
    return False


def _thread_names() -> list[str]:
    names: list[str] = []
    for task in Path("/proc/self/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return names


def _descriptors() -> list[str]:
    found: list[str] = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found.append(str(descriptor.readlink()))
        except FileNotFoundError:  # the one that listed the directory
            continue
    return found
