"""Files of any other protocol that fsspec knows: ftp, sftp, github, hdfs, zip chains and so on.

fsspec has no conditional read, so after each read the file's facts (``ukey``, or ETag, checksum
and modification time) are asked for again and compared with those pinned at open: a file that
changes raises. That costs a second request a read; the schemes of `quire.store.object_store` do
not need it.
"""

from __future__ import annotations

import errno
import importlib.util
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quire.errors import ChangedError, Error, PageIOError, SourceError, TruncatedError
from quire.store.abc import Store
from quire.store.remote_advice import public_url

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quire.pager.recipe import Recipe

__all__ = ["BytesStore", "FsspecRecipe", "FsspecStore", "recipe"]

FACTS = [
    "etag",
    "ETag",
    "e_tag",
    "checksum",
    "md5",
    "sha",
    "sha256",
    "mtime",
    "modified",
    "updated",
    "last_modified",
    "LastModified",
    "created",
    "size",
    "ino",
]


def recipe(url: str, storage_options: Mapping[str, object] | None = None) -> Recipe | BytesStore:
    """What opens ``url`` through fsspec in the pager process.

    A ``memory://`` file exists in this process only, so its bytes are copied into the recipe.

    Raises:
        quire.SourceError: fsspec is not installed, does not know the protocol, or needs a package
            for it that is not installed; the message names it.
    """
    protocol = url.partition("://")[0].rpartition("::")[2]
    if importlib.util.find_spec("fsspec") is None:
        raise SourceError(
            f"{protocol}:// sources are read by fsspec, which is not installed: run "
            "`pip install 'quire[remote]'`",
            source=url,
        )
    from fsspec.registry import known_implementations, registry

    for name in {part.partition("://")[0] for part in url.split("::")}:
        if name not in known_implementations and name not in registry:
            raise SourceError(
                f"no store reads {name}:// URLs: check the spelling, or pass an object of your "
                "own subclass of quire.Store",
                source=url,
            )
    options = dict(storage_options or {})
    if protocol == "memory":
        return _snapshot(url, options)
    return FsspecRecipe(url, options)


@dataclass(frozen=True)
class FsspecRecipe:
    """Opens `FsspecStore` in the pager process."""

    url: str = field(repr=False)
    options: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def label(self) -> str:
        """The URL without credentials."""
        return _label_of(self.url)

    def open(self) -> FsspecStore:
        """Looks the file up and pins its facts.

        Raises:
            quire.SourceError: it cannot be found or read; the message says what to do next.
        """
        return FsspecStore(self)


class FsspecStore(Store):
    """One file of an fsspec file system; reads may come from any thread."""

    kind = "fsspec"

    def __init__(self, source: FsspecRecipe) -> None:
        """Opens the file; see `FsspecRecipe.open`."""
        self._label = source.label
        try:
            import fsspec

            self._fs, self._path = fsspec.core.url_to_fs(
                source.url, **{"use_listings_cache": False, **source.options}
            )
            self._facts = self._now()
            self._size: int = self._facts["size"]
        except ImportError as error:
            raise SourceError(
                f"fsspec needs a package for this protocol: {error}", source=self._label
            ) from error
        except (FileNotFoundError, IsADirectoryError) as error:
            raise SourceError(
                "there is no such file: check the spelling of the host and path",
                source=self._label,
                errno=errno.ENOENT,
            ) from error
        except Exception as error:
            raise SourceError(
                f"fsspec cannot open it ({type(error).__name__}: {error}): check the URL and "
                "storage_options",
                source=self._label,
                errno=_errno_of(error),
            ) from error

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._size

    @property
    def label(self) -> str:
        """The URL without credentials."""
        return self._label

    @property
    def version(self) -> str | None:
        """The pinned facts; None where the file system gives no more than a size."""
        named = {name: value for name, value in self._facts.items() if name != "size"}
        return repr(self._facts) if named else None

    @property
    def details(self) -> dict[str, object]:
        """What `quire info` shows of the file."""
        return {name: str(value) for name, value in self._facts.items()}

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills ``buffer`` from ``offset``, then makes sure the file is still the same.

        Raises:
            quire.ChangedError: the file is no longer the one that was opened.
            quire.TruncatedError: it gave fewer bytes.
            quire.PageIOError: any other failure, with errno where there is one.
        """
        try:
            data = self._fs.cat_file(self._path, start=offset, end=offset + len(buffer))
            now = self._now()
        except Error:
            raise
        except Exception as error:
            raise PageIOError(
                f"fsspec cannot read it ({type(error).__name__}: {error}): check the server",
                source=self._label,
                offset=offset,
                errno=_errno_of(error),
            ) from error
        if now != self._facts:
            raise ChangedError(
                "the file changed while it was mapped: close the mapping and open it again",
                source=self._label,
                offset=offset,
            )
        if len(data) != len(buffer):
            raise TruncatedError(
                f"the file system gave {len(data)} of {len(buffer)} bytes",
                source=self._label,
                offset=offset,
            )
        buffer[:] = data

    def close(self) -> None:
        """Nothing to do: fsspec closes its sessions with the process."""

    def _now(self) -> dict[str, Any]:
        """The facts by which a version is known."""
        self._fs.invalidate_cache()
        info = self._fs.info(self._path)
        if info.get("type") == "directory" or info.get("size") is None:
            raise IsADirectoryError(errno.EISDIR, "not a file of known size")
        return {name: info[name] for name in FACTS if info.get(name) is not None}


@dataclass(frozen=True)
class BytesStore(Store):
    """Bytes that travelled in the recipe itself."""

    data: bytes = field(repr=False)
    name: str
    pinned: str | None = None

    kind = "bytes"

    @property
    def size(self) -> int:
        """Bytes there are."""
        return len(self.data)

    @property
    def label(self) -> str:
        """What they were called where they came from."""
        return self.name

    @property
    def version(self) -> str | None:
        """What was known of their version; they cannot change."""
        return self.pinned

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Copies the bytes."""
        buffer[:] = memoryview(self.data)[offset : offset + len(buffer)]

    def close(self) -> None:
        """Nothing to do."""


def _snapshot(url: str, options: dict[str, Any]) -> BytesStore:
    """A ``memory://`` file as it is now."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
        return BytesStore(bytes(fs.cat_file(path)), url, None)
    except FileNotFoundError as error:
        raise SourceError(
            "there is no such file in this process's memory: check its spelling",
            source=url,
            errno=errno.ENOENT,
        ) from error


def _label_of(url: str) -> str:
    """``url`` without user and password."""
    head, slashes, rest = public_url(url).rpartition("://")
    host, slash, path = rest.partition("/")
    return f"{head}{slashes}{host.rpartition('@')[2]}{slash}{path}"


def _errno_of(error: BaseException) -> int | None:
    number = getattr(error, "errno", None)
    return number if isinstance(number, int) and number > 0 else None
