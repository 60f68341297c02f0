"""What quire counted, as a frozen object."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from quire import _core
from quire.sizes import format_size

__all__ = ["Statistics", "statistics"]


UNLIMITED_BYTES = (1 << 64) - 1


@dataclass(frozen=True)
class Statistics:
    """Counters of one mapping, or of all mappings of the process, present and past.

    Attributes:
        faults: touches of a page that was not there.
        waits: touches of a page that another thread was already filling; no faults of their own.
        room_stalls, room_stall_ns: faults that found no room, as the page daemon was behind or
            leaves such pages to who faults, and the nanoseconds in which they evicted or waited.
        store_stalls, store_stall_ns: faults whose page took longer than 10 ms to come when there
            was room, and the nanoseconds that these took.
        fault_ns_p50, fault_ns_p90, fault_ns_p99, fault_ns_max: from the arrival of a fault to
            its resolution, in nanoseconds; half, 90 % and 99 % took no longer.
        fills: granules filled, on demand or ahead of need.
        fill_bytes: bytes of them.
        readahead_fills: of the fills, those ahead of need.
        readahead_hits: granules that were asked for ahead of need and that their sequence has come
            by since. Touches of resident pages are not seen: a later fault of the sequence, at or
            beyond them, counts them.
        readahead_wasted: granules that were asked for ahead of need and were gone when their
            sequence came, or whose sequence was given up for a newer one. Those of sequences that
            are still followed, and of those that ended with the mapping, are neither.
        bytes_fetched: bytes read from the disk or the network; compressed ones where the source is.
        evictions: granules evicted to keep a budget.
        evicted_bytes: bytes of them.
        second_chance_hits: of the evicted granules, those that were touched while their bytes
            stood by to be dropped, and came back without a load. Only where a load is slow.
        resident_bytes: what is held now: pages, those that stand by, and quire's buffers.
        dirty_bytes: what is dirty now, by granules where `quire.Mapping.dirty_tracking` is not
            "wp-async", and 0 of what the kernel pages (`quire.map`), which keeps that to itself.
            Counted by this call, in some milliseconds for each GiB that is resident.
        peak_resident_bytes: the most that was held.
        metadata_bytes: what is taken beside it by what quire knows of pages: page tables, the lists
            of the policy and of pages that stand by, the table of swap slots. It leaves that much
            less of the budget to pages, but never less than what a budget must hold when a mapping
            is opened, and what is pinned.
        buffer_bytes: what stores keep for good: shared memory of pager processes, workspaces and
            tables of zstd; part of what is held.
        budget_bytes: what may be held, metadata included.
        written_bytes: bytes of dirty pages written back.
        swapped_in_bytes: bytes of pages that came back from swap.
        swap_bytes, swap_limit_bytes: what the swap file of private pages takes, and may take.
        syncs: times that the store was made durable.
        write_faults: first writes to clean pages that were faults.
        daemon_rounds: rounds of the page daemon that found it short of room.
        retries: reads that were tried again.
        errors: pages that could not be had.
    """

    faults: int
    waits: int
    room_stalls: int
    room_stall_ns: int
    store_stalls: int
    store_stall_ns: int
    fault_ns_p50: int
    fault_ns_p90: int
    fault_ns_p99: int
    fault_ns_max: int
    fills: int
    fill_bytes: int
    readahead_fills: int
    readahead_hits: int
    readahead_wasted: int
    bytes_fetched: int
    evictions: int
    evicted_bytes: int
    second_chance_hits: int
    resident_bytes: int
    dirty_bytes: int
    peak_resident_bytes: int
    metadata_bytes: int
    buffer_bytes: int
    budget_bytes: int
    written_bytes: int
    swapped_in_bytes: int
    swap_bytes: int
    swap_limit_bytes: int
    syncs: int
    write_faults: int
    daemon_rounds: int
    retries: int
    errors: int

    @property
    def stalls(self) -> int:
        """Waits for more than a quick load: for another thread's, for room, or for a slow store."""
        return self.waits + self.room_stalls + self.store_stalls

    @property
    def readahead_accuracy(self) -> float | None:
        """Which part of what was filled ahead of need was needed; None while nothing is decided."""
        decided = self.readahead_hits + self.readahead_wasted
        return self.readahead_hits / decided if decided else None

    def __str__(self) -> str:
        rows = [(_label(name), _worded(name, n)) for name, n in asdict(self).items()]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {worded}" for name, worded in rows)


def statistics() -> Statistics:
    """Counters of all mappings of this process, present and past.

    >>> import quire
    >>> quire.statistics().resident_bytes <= quire.budget()
    True
    """
    return Statistics(**_core.statistics())


def _label(name: str) -> str:
    """A field's name without its unit, which `_worded` says."""
    return " ".join(word for word in name.split("_") if word not in ("bytes", "ns"))


def _worded(name: str, number: int) -> str:
    if name == "budget_bytes" and number == UNLIMITED_BYTES:
        return "none of its own"
    if name.startswith("fault_ns") or name.endswith("_stall_ns"):
        return f"{number / 1e3:,.1f} us"
    is_bytes = name.endswith("_bytes") or name == "bytes_fetched"
    return format_size(number) if is_bytes else f"{number:,}"
