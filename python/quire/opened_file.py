"""`OpenedFile`: a local file as `quire.open` gives it when the operating system pages it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from quire import _core
from quire._fork import sync_at_exit
from quire.errors import ChangedError, Error, SyncError
from quire.kernel_mapping import KernelMapping, RawArray
from quire.limits import Asked, explained
from quire.map_flags import MapFlag, protection_bits
from quire.mapping import Mapping

if TYPE_CHECKING:
    from types import TracebackType

    from quire.creation import RawShape
    from quire.layout import ArrayLayout
    from quire.sizes import SizeLike
    from quire.store.resolve import Resolved

__all__ = [
    "Durable",
    "OpenedFile",
    "identity_of",
    "map_file",
    "require_identity",
    "require_named",
    "why_not_kernel",
]

DESCRIPTORS = ("/proc/", "/dev/fd/")


class Durable(Mapping):
    """What `quire.open` adds to mappings by the kernel: stores to files are synced at the end."""

    _durable: bool = False

    def _sync_at_end(self) -> None:
        self._durable = True
        sync_at_exit(self)

    def close(self, *, discard: bool = False) -> None:
        """Syncs and unmaps; does nothing when that was done before.

        With ``discard`` it does not sync: what was written is in the page cache, and the kernel
        writes it back when it comes to it.

        Raises:
            quire.SyncError: what is dirty could not be written back, or a file was replaced at its
                path. The mapping stays open.
            BufferError: an array or another view of the mapping is alive.
        """
        if self._durable and not self.closed and self.exports == 0 and not discard:
            self.sync()
        super().close(discard=discard)

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
        if self._durable and kind is None and not self.closed:
            self.sync()
        super().__exit__(kind, error, traceback)


class OpenedFile(Durable, KernelMapping):
    """A local file that the operating system pages; made by `quire.open`.

    All that a `KernelMapping` is. As every mapping of `quire.open` it is durable when it closes.
    It shows what the file holds now, so that stores of others are seen as they are made.
    """

    _version: str | None = None
    _path: str = ""

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

    def sync(
        self,
        offset: int = 0,
        length: int | None = None,
        *,
        asynchronous: bool = False,
        invalidate: bool = False,
    ) -> None:
        """Writes back what is dirty and makes it durable, as `KernelMapping.sync`.

        Raises:
            quire.SyncError: as there; or the file was replaced at its path, so that no name leads
                to what was written.
        """
        super().sync(offset, length, asynchronous=asynchronous, invalidate=invalidate)
        if self._durable:
            require_named(self, self._path)

    def split(self, at: int) -> KernelMapping:
        """As `KernelMapping.split`; both parts are durable when they close."""
        rest = super().split(at)
        if isinstance(rest, OpenedFile):
            rest._path, rest._version = self._path, self._version
            if self._durable:
                rest._sync_at_end()
        return rest


def identity_of(store: _core.Store) -> tuple[int, int]:
    """The device and inode of a file's store, with which its version begins."""
    device, inode = (store.version or "").split("-")[:2]
    return int(device, 16), int(inode, 16)


def require_identity(mapping: KernelMapping, store: _core.Store) -> None:
    """Raises `quire.ChangedError` where the path led to another file than the store's.

    The store and the mapping open the path each, and the size and the array are the store's.
    """
    if mapping.identity != identity_of(store):
        raise ChangedError(
            "the file was replaced at its path while it was opened: open it again",
            source=store.label,
        )


def require_named(mapping: KernelMapping, path: str) -> None:
    """Raises `quire.SyncError` where the path of a mapped file leads to another one by now.

    One that leads nowhere was unlinked, and who does that means it.
    """
    if mapping.identity is None or path.startswith(DESCRIPTORS):
        return
    try:
        found = os.stat(path)  # noqa: PTH116 (a path is made for each sync otherwise)
    except OSError:
        return
    device, inode = mapping.identity
    if (found.st_dev, found.st_ino) != (device, inode):
        raise SyncError(
            f"{path} was replaced: inode {inode} was opened and took what was written, and the "
            f"path names inode {found.st_ino} now; copy the array to a new file, or open the new "
            "one and write there; or give it up with close(discard=True)",
            source=path,
        )


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
        quire.ChangedError: the file was replaced at its path since the store was opened.
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
    mapping._version, mapping._recipe, mapping._path = source.store.version, recipe, path
    try:
        require_identity(mapping, source.store)
        if budget is not None:
            mapping.set_budget(budget)
    except BaseException:
        mapping.close(discard=True)
        raise
    if mode == "r+":
        mapping._sync_at_end()
    source.store.close()
    return mapping
