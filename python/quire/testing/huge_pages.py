"""The machine's pool of huge pages, which tests fill (as root) and give back."""

from __future__ import annotations

import fcntl
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["HUGE_BYTES", "POOL", "available", "counted", "pool_of"]

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
HUGE_BYTES = 2 << 20


def counted(name: str) -> int:
    """A number of the pool: "nr", "free" or "resv", those that are promised."""
    return int((POOL / f"{name}_hugepages").read_text())


def available() -> int:
    """Huge pages that are free and promised to nobody; 0 where there is no pool of 2 MiB pages."""
    return counted("free") - counted("resv") if POOL.is_dir() else 0


@contextmanager
def pool_of(count: int) -> Iterator[None]:
    """Exactly `count` available huge pages, for one process at a time; after it, as many as before.

    Raises:
        RuntimeError: the kernel has no such pool, or no memory for it in one piece.
    """
    if not count and not POOL.is_dir():
        yield
        return
    if not POOL.is_dir():
        listed = sorted(path.name for path in POOL.parent.glob("*"))
        raise RuntimeError(f"this kernel has no pool of huge pages of 2 MiB; it has {listed}")
    size = POOL / "nr_hugepages"
    with size.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if available() == count:
            yield  # nothing need be written, where /sys may be read-only
            return
        before = size.read_text()
        size.write_text(str(int(before) - available() + count))
        try:
            if available() != count:
                raise RuntimeError(f"{available()} huge pages of {count}: memory is fragmented")
            yield
        finally:
            size.write_text(before)
