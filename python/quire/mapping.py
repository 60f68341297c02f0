"""`Mapping`: a source in memory, as an array and as a buffer."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from quire import _core
from quire._fork import sync_at_exit, watch_interpreter
from quire.errors import ClosedError, Error, ModeError, PmapError, error_of_failure
from quire.pmap import own_pmap
from quire.residency import Pin, bytes_of, in_background
from quire.sizes import SizeLike, checked_span, format_size, parse_size
from quire.stats import Statistics
from quire.swap import Swap

if TYPE_CHECKING:
    from concurrent.futures import Future
    from types import TracebackType
    from typing import Self

    import numpy as np
    from typing_extensions import Buffer

    from quire.layout import ArrayLayout, Order

__all__ = ["Mapping"]

watch_interpreter()


class Mapping(_core.MappingBase):
    """A source mapped into memory; made by `quire.open`.

    It is a context manager and supports the buffer protocol: `memoryview(mapping)` is the bytes of
    the whole (decompressed) source, a header included; `array` is the array in them. Both are
    read-only in mode "r".

    Threads: any number may use a mapping and its array at once. In a forked child the mapping
    works, or a touch raises; it never reads zeros in place of data.

    >>> import numpy, quire
    >>> numpy.save("/tmp/quire-example.npy", numpy.arange(6.0).reshape(2, 3))
    >>> with quire.open("/tmp/quire-example.npy", budget="64 MiB") as mapping:
    ...     print(mapping.shape, mapping.array[1].sum())
    (2, 3) 12.0
    """

    _mode: str
    _store: _core.Store
    _layout: ArrayLayout
    _recipe: tuple[Any, ...] | None
    _live_array: weakref.ref[np.ndarray[Any, Any]] | None

    def __new__(
        cls,
        store: _core.Store,
        layout: ArrayLayout,
        recipe: tuple[Any, ...] | None = None,
        *,
        budget_bytes: int | None = None,
        granule_bytes: int | None = None,
        pmap: str | None = None,
        retries: int = 2,
        mode: str = "r",
        policy: str | None = None,
        swap: Swap | None = None,
    ) -> Self:
        """Maps ``store``; `quire.open` is the way to call it."""
        swap = swap or Swap()
        self = super().__new__(
            cls,
            store,
            budget_bytes,
            granule_bytes,
            own_pmap(pmap),
            retries,
            mode,
            policy,
            swap.folder,
            None if swap.limit is None else parse_size(swap.limit, name="limit"),
            swap.compression,
            swap.encrypt,
        )
        self._mode = mode
        if mode == "r+":
            sync_at_exit(self)
        self._store = store
        self._layout = layout
        self._recipe = recipe
        self._live_array = None
        return self

    @property
    def array(self) -> np.ndarray[Any, Any]:
        """The source as a `numpy.ndarray`; the mapping lives as long as the array.

        It is the same object while anyone holds it. Touching an element reads its page when it
        is not resident; a page that cannot be had raises a `quire.PageIOError` in that thread at
        the interpreter's next check (a loop step, the entry of a function written in Python, most
        calls). Until then what was read are bytes of 0xFF: call `check` before results are used.

        Raises:
            quire.ClosedError: the mapping is closed.
            quire.PageIOError: the mapping is failed.
            quire.PmapError: the pmap is "soft", which has no pointer.
        """
        self.check()
        return self._whole()

    def _whole(self) -> np.ndarray[Any, Any]:
        """`array`, also of a mapping that is failed: for calls that are told what cannot be had."""
        array = self._live_array() if self._live_array is not None else None
        if array is None:
            if self.closed:
                raise self._closed_error()
            if not self.has_pointer:
                raise PmapError(
                    'pmap "soft" gives no array: use read, readinto and write, or another pmap '
                    "(`quire doctor` says which work here)",
                    source=self.source,
                )
            array = self._layout.view(memoryview(self))
            self._live_array = weakref.ref(array)
        return array

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of an element."""
        return self._layout.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of the array."""
        return self._layout.shape

    @property
    def order(self) -> Order:
        """Which index varies fastest in memory: "C" the last, "F" the first."""
        return self._layout.order

    @property
    def mode(self) -> str:
        """What becomes of writes, as in `numpy.memmap`: "r", "r+", "c"."""
        return self._mode

    @property
    def budget_bytes(self) -> int:
        """Bytes that may be resident; a huge number where only the process-wide budget holds."""
        return self.statistics().budget_bytes

    @property
    def source(self) -> str:
        """The path, URL or label of what is mapped."""
        return self._store.label

    @property
    def version(self) -> str | None:
        """What names the content that was opened, or None where the source does not say."""
        return self._store.version

    @property
    def failed(self) -> Error | None:
        """The error that ended the mapping's good life, or None."""
        failure = self.failure()
        return None if failure is None else error_of_failure(failure)

    def check(self) -> None:
        """Raises what made the mapping fail, if anything did.

        Call it after C code that may have swallowed an exception, for instance in a thread of a
        library.

        Raises:
            quire.PageIOError: a page could not be had.
        """
        error = self.failed
        if error is not None:
            raise error

    def sync(self, offset: int = 0, length: int | None = None) -> None:
        """Writes back what is dirty and makes it durable (msync(2), fdatasync(2)).

        Afterwards the source holds what the array held at the call, in these bytes: from ``offset``
        on, counted from the start of the source, ``length`` of them or all. What threads write
        meanwhile may be in it or not. Does nothing where writes do not go to the source.

        Raises:
            quire.SyncError: it could not, or the file was replaced at its path. Everything is still
                in the array, and dirty: the next `sync` writes it again, and `close` with
                ``discard`` gives it up.
            quire.PageIOError: the mapping has failed. What could be written was, but not what went
                to pages that could not be had, as they hold no data.
            ValueError: a negative offset or length.
        """
        super().sync(*checked_span(offset, length))
        if self.writable:
            self.check()

    def flush(self) -> None:
        """`sync` of all, by the name that `numpy.memmap` and `mmap.mmap` have for it."""
        self.sync()

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """Copies ``length`` bytes of the source from ``offset`` on, or all to its end.

        Works with every pmap, also with "soft", which has no array.

        Raises:
            quire.PageIOError: a page could not be had; it is raised here and now.
            ValueError: they do not lie in the source.
        """
        if length is None:
            length = max(self.size_bytes - offset, 0)
        self._require_inside(offset, length)
        return self.copy_bytes(offset, length)

    def readinto(self, buffer: Buffer, offset: int = 0) -> int:
        """Copies bytes from ``offset`` on into a buffer in other memory; returns how many.

        Raises:
            quire.PageIOError, ValueError: as `read`.
            BufferError: it is read-only or not contiguous.
        """
        view = memoryview(buffer).cast("B")
        self._require_inside(offset, len(view))
        self.read_bytes(offset, view)
        return len(view)

    def write(self, data: Buffer, offset: int = 0) -> int:
        """Copies bytes into the mapping from ``offset`` on; returns how many.

        They are written back as what is written to the array is.

        Raises:
            quire.ModeError: the mapping is read-only.
            quire.PageIOError, ValueError: as `read`.
        """
        if not self.writable:
            raise ModeError(
                'a write to a mapping of mode "r": open it with "r+"', source=self.source
            )
        view = memoryview(data).cast("B")
        self._require_inside(offset, len(view))
        self.write_bytes(offset, view)
        return len(view)

    def _require_inside(self, offset: int, length: int) -> None:
        if self.closed:
            raise self._closed_error()
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            if self.closed:
                raise self._closed_error()
            raise ValueError(
                f"{length} bytes from byte {offset} on do not lie in a mapping of "
                f"{self.size_bytes}: offsets count from 0, its start"
            )

    def advise(self, advice: str, index: object = None) -> None:
        """Says how the array is going to be touched (madvise(2), posix_madvise(3)).

        "normal", "sequential" (fill far ahead from the first touch) and "random" (never fill ahead)
        are about the whole mapping. "willneed" starts to fill a part and does not wait; "dontneed"
        evicts it, dirty pages written back first.

        Raises:
            ValueError: no such advice, or an index with advice about the whole mapping.
            quire.SyncError: as `evict`.
            quire.PmapError: "willneed" or "dontneed" where the pmap is "soft", which has no array.
            TypeError: the index makes a copy of what it selects.
        """
        if advice in ("normal", "sequential", "random"):
            if index is not None:
                raise ValueError(
                    f'advice "{advice}" is about the whole mapping: leave the index out'
                )
            self.advise_pattern(advice)
        elif advice == "willneed":
            _, offset, length = self._part(index)
            self.will_need(offset, length)
        elif advice == "dontneed":
            self.evict(index)
        else:
            raise ValueError(
                f"there is no advice {advice!r}; there are: normal, sequential, random, willneed, "
                "dontneed"
            )

    def prefetch(self, index: object = None) -> Future[None]:
        """Starts to make a part of the array resident; returns a future that is done when it is.

        ``index`` is what would select the part of `array`, for instance ``numpy.s_[:1000]``; all
        when absent. A part with gaps counts from its first byte to its last. What does not fit the
        budget pushes out what came before. The future raises what a touch would have raised.

        Raises:
            quire.PmapError: the pmap is "soft", which has no array.
            TypeError: the index makes a copy of what it selects.

        >>> import numpy, quire
        >>> numpy.arange(100_000).tofile("/tmp/quire-example.bin")
        >>> with quire.open("/tmp/quire-example.bin", dtype="i8") as mapping:
        ...     mapping.prefetch(numpy.s_[:50_000]).result()
        ...     bool(mapping.resident(numpy.s_[:50_000]).all())
        True
        """
        _, offset, length = self._part(index)
        return in_background(lambda: self.populate(offset, length), "quire-prefetch")

    def pin(self, index: object = None) -> Pin:
        """Makes a part of the array resident and keeps it so; a context manager, see `Pin`.

        Pinned pages are safe for system calls with every pmap: ``file.write``, ``readinto`` and
        ``socket.send`` find them there. In a writable mapping whose `dirty_tracking` is not
        "wp-async" they count as written.

        Raises:
            quire.PmapError: the pmap is "soft", which has no array.
            quire.BudgetError: the budget cannot hold what is pinned and pages in flight beside it.
            quire.PageIOError: a page could not be had.
            TypeError: the index makes a copy of what it selects.

        >>> import numpy, quire
        >>> numpy.arange(100_000).tofile("/tmp/quire-example.bin")
        >>> with quire.open("/tmp/quire-example.bin", dtype="i8") as mapping:
        ...     with mapping.pin(numpy.s_[:1000]) as part, open("/tmp/quire-copy.bin", "wb") as out:
        ...         out.write(part.data)
        8000
        """
        part, offset, length = self._part(index)
        return Pin(self, part, offset, length)

    def evict(self, index: object = None) -> int:
        """Evicts the pages that lie in a part of the array; returns the bytes freed.

        Dirty pages are written back first; pinned ones stay, and so do those on their way in.

        Raises:
            quire.SyncError, quire.SwapFullError: a dirty page could not be written; it stays.
            quire.PmapError: the pmap is "soft", which has no array.
            TypeError: the index makes a copy of what it selects.
        """
        _, offset, length = self._part(index)
        return self.evict_bytes(offset, length)

    def resident(self, index: object = None) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which granules that hold a part of the array are resident, in order (mincore(2))."""
        import numpy as np

        whole = np.frombuffer(self.residency(), np.uint8).astype(np.bool_)
        if index is None:
            return whole
        _, offset, length = self._part(index)
        granule = self.granule_bytes
        return whole[offset // granule : -(-(offset + length) // granule)]

    def _part(self, index: object) -> tuple[np.ndarray[Any, Any], int, int]:
        array = self.array
        part, address, length = bytes_of(array, index)
        return part, max(address - self.address, 0) if length else 0, length

    def statistics(self) -> Statistics:  # type: ignore[override]
        """What was counted of this mapping; also after it failed or was closed."""
        return Statistics(**super().statistics())

    def set_budget(self, budget: SizeLike | None) -> None:
        """Changes the mapping's budget: an int or text such as "64 MiB"; None for no own one.

        What exceeds a smaller budget is evicted, dirty pages written back first.
        """
        super().set_budget(None if budget is None else parse_size(budget, name="budget"))

    def close(self, *, discard: bool = False) -> None:
        """Syncs, unmaps and closes the source; does nothing when that was done before.

        With ``discard`` it does not sync: what is dirty is given up. What was synced or evicted
        before is in the source.

        Raises:
            quire.SyncError: what is dirty could not be written back. The mapping stays open: mend
                what is in the way and close it again, copy the array elsewhere, or ``discard``.
            BufferError: an array, another view or a pin of the mapping is alive, as with
                `mmap.close`. Delete or release it first, or leave the closing to it: the mapping
                ends with its last view.
        """
        if not self.closed and self.exports == 0 and not discard:
            super().sync()
        if not self.closed:
            self.unmap(discard)

    def __enter__(self) -> Self:
        if self.closed:
            raise self._closed_error()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Syncs and closes; while views are alive it leaves the closing to the last of them.

        Raises:
            quire.SyncError: as `close`, unless an exception is on its way already.
        """
        if kind is None and not self.closed:
            super().sync()
        self.unmap_when_idle()

    def __len__(self) -> int:
        return self.size_bytes

    def __repr__(self) -> str:
        if self.closed:
            state = ", closed"
        elif self.failure() is not None:
            state = ", failed"
        else:
            state = ""
        return (
            f"<quire.Mapping {self.source!r} {self.dtype} {self.shape} "
            f"{format_size(self.size_bytes)}, pmap {self.pmap}{state}>"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles how to open the source, never its bytes.

        Unpickling opens it again and raises `quire.ChangedError` when its version is another, but
        in mode "r+", where writing changes it.
        ``storage_options`` go along, credentials included.
        """
        if self._recipe is None:
            raise TypeError(
                "nothing leads elsewhere to what this mapping shows (an open store or descriptor, "
                "memory of no file, an arena or what is placed in one): to have one that can be "
                "pickled open or map a path, a URL or a quire.Store, or make memory by quire.shared"
            )
        return self._recipe

    def _closed_error(self) -> ClosedError:
        return ClosedError(
            "the mapping is closed: make it again (quire.open, quire.map, quire.shared)",
            source=self.source,
        )
