"""`OpenedFile`: a local file as `quire.open` gives it when the operating system pages it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quire import _core
from quire._fork import sync_at_exit
from quire.errors import Error
from quire.kernel_mapping import KernelMapping, RawArray
from quire.limits import Asked, explained
from quire.map_flags import MapFlag, protection_bits

if TYPE_CHECKING:
    from types import TracebackType

    from quire.creation import RawShape
    from quire.layout import ArrayLayout
    from quire.sizes import SizeLike
    from quire.store.resolve import Resolved

__all__ = ["OpenedFile", "map_file", "why_not_kernel"]


class OpenedFile(KernelMapping):
    """A local file that the operating system pages; made by `quire.open`.

    All that a `KernelMapping` is. As every mapping of `quire.open` it is durable when it closes.
    It shows what the file holds now, so that stores of others are seen as they are made.
    """

    _version: str | None = None

    @property
    def version(self) -> str | None:
        """What named the content that was opened; the mapping shows what the file holds now."""
        return self._version

    def advise(self, advice: str, index: object = None) -> None:
        """Gives advice as `KernelMapping.advise`, but "dontneed" evicts, as `Mapping.advise` says.

        So it takes away nothing that was stored, also where stores are private.

        Raises:
            quire.Error, ValueError, TypeError: as `KernelMapping.advise`.
        """
        if advice == "dontneed":
            self.evict(index)
        else:
            super().advise(advice, index)

    def close(self, *, discard: bool = False) -> None:
        """Syncs and unmaps; does nothing when that was done before.

        With ``discard`` it does not sync: what was written is in the page cache, and the kernel
        writes it back when it comes to it.

        Raises:
            quire.SyncError: what is dirty could not be written back. The mapping stays open.
            BufferError: an array or another view of the mapping is alive.
        """
        if not self.closed and self.exports == 0 and not discard and self.mode == "r+":
            self.sync()
        super().close()

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
        if kind is None and not self.closed and self.mode == "r+":
            self.sync()
        super().__exit__(kind, error, traceback)


def why_not_kernel(source: Resolved) -> str | None:
    """Why the operating system cannot map a source; None when it can."""
    if source.store.describe()["kind"] != "file" or not isinstance(source.pickled, str):
        return "it is not a local file that is not compressed"
    return None if source.store.size else "it is empty"


def map_file(
    source: Resolved,
    layout: ArrayLayout,
    raw: RawShape,
    mode: str,
    budget: SizeLike | None,
    recipe: tuple[Any, ...] | None,
) -> OpenedFile:
    """Maps a local file, whose store is closed then.

    Raises:
        quire.Error: the kernel refuses; the message says why.
        ValueError: a budget, and changed pages that have no home but memory (mode "c").
    """
    label, size, path = source.store.label, source.store.size, str(source.pickled)
    prot = protection_bits("r" if mode == "r" else "rw")
    flags = int(MapFlag.PRIVATE if mode == "c" else MapFlag.SHARED)
    try:
        kernel_range = _core.map_kernel(path, label, size, 0, prot, flags, 0, 0)
    except Error as error:
        raise explained(error, Asked(size, flags, prot, label)) from None
    mapping: OpenedFile = OpenedFile(kernel_range)
    # An array of a shape that was not given goes on to the end of the mapping when that grows.
    shape = layout.shape if raw.dtype is None else raw.shape
    mapping._raw = RawArray(layout.dtype, shape, layout.order, layout.offset_bytes)
    mapping._made_layout = size, layout
    mapping._version, mapping._recipe = source.store.version, recipe
    if budget is not None:
        try:
            mapping.set_budget(budget)
        except BaseException:
            mapping.close(discard=True)
            raise
    if mode == "r+":
        sync_at_exit(mapping)
    source.store.close()
    return mapping
