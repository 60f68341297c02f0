"""Watches one process and one mapping while work goes on: memory, residency, bytes fetched.

Memory is what Linux says of the process in `/proc/self/status`: `VmRSS` now, `VmHWM` the highest
ever, both with anonymous, file and shared pages. The kernel keeps `VmHWM` itself, so no peak
falls between two samples.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from types import TracebackType

    import quire

BAND_COUNT = 240
PEAK_RESET = "5"


def resident_set_bytes(pid: int | str = "self", *, peak: bool = False) -> int:
    """Resident memory of a process in bytes, its highest so far with `peak`; 0 once it is gone."""
    field = "VmHWM:" if peak else "VmRSS:"
    try:
        with Path(f"/proc/{pid}/status").open() as status:
            for line in status:
                if line.startswith(field):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0


def start_counting() -> int:
    """Lets the peak of this process start again at what it uses now: that many bytes."""
    Path("/proc/self/clear_refs").write_text(PEAK_RESET)
    return resident_set_bytes()


def child_pids() -> list[int]:
    """The child processes of this one: quire's pager for sources that are read in Python."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        found += [int(pid) for pid in (task / "children").read_text().split()]
    return found


class Watch:
    """Samples every `interval_s` seconds from a thread of its own, between `with` and its end.

    `base_bytes` is the resident memory that growth is counted from. The thread takes the
    interpreter lock for some microseconds a sample.
    """

    def __init__(self, mapping: quire.Mapping, base_bytes: int, interval_s: float = 0.02) -> None:
        self._mapping = mapping
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="quire-demo-watch", daemon=True)
        self.base_bytes = base_bytes
        self.peak_growth_bytes = 0
        self.children_peak_bytes = 0
        self.samples: list[tuple[float, int, int, int, int]] = []
        self.bands: list[Any] = []

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.peak_growth_bytes = max(0, resident_set_bytes(peak=True) - self.base_bytes)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._sample()
            self._stop.wait(self._interval_s)
        self._sample()

    def _sample(self) -> None:
        statistics = self._mapping.statistics()
        children = sum(resident_set_bytes(pid, peak=True) for pid in child_pids())
        self.children_peak_bytes = max(self.children_peak_bytes, children)
        growth = resident_set_bytes() - self.base_bytes
        self.samples.append(
            (
                time.monotonic(),
                statistics.resident_bytes,
                growth,
                statistics.bytes_fetched,
                statistics.faults,
            )
        )
        self.bands.append(banded(self._mapping.residency()))

    def save(self, path: Path) -> None:
        """Writes the samples as `.npz`.

        Arrays: time_s, resident_bytes, growth_bytes, bytes_fetched, faults, and bands of shape
        (samples, bands): the resident part of each band, 0 to 1.
        """
        columns = np.array(self.samples, dtype=np.float64).T
        names = ("time_s", "resident_bytes", "growth_bytes", "bytes_fetched", "faults")
        np.savez(
            os.fspath(path),
            bands=np.array(self.bands, dtype=np.float32),
            **dict(zip(names, columns, strict=True)),
        )


def banded(resident: bytes) -> Any:
    """Residency by granule, joined to at most `BAND_COUNT` bands: the resident part of each.

    >>> banded(bytes([1, 1, 0, 0])).tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    granules = np.frombuffer(resident, dtype=np.uint8)
    edges = np.linspace(0, len(granules), min(BAND_COUNT, len(granules)) + 1).astype(np.int64)
    sums = np.add.reduceat(granules, edges[:-1], dtype=np.int64)
    return (sums / np.diff(edges)).astype(np.float32)
