"""From a source, as users name it, to an open native store.

| source | store |
|---|---|
| path, `file://` URL | the native file store |
| `http(s)://`, `s3://`, `gs://`, `az://` | `quire.store.object_store` in a pager process |
| other URLs (`sftp://`, `zip::...`) | `quire.store.fsspec_store` in a pager process |
| `quire.Store` object | the object itself, in a pager process |
| native store | itself |

Bytes that begin like Zstandard are read through the seekable format, whatever the store.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from quire import _core
from quire.errors import SourceError, TruncatedError
from quire.store.abc import Store

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quire.pager import Recipe

__all__ = ["Resolved", "Source", "resolve"]

Source: TypeAlias = "str | os.PathLike[str] | Store | _core.Store"

NPY_MAGIC = b"\x93NUMPY"
SEEKABLE_END = b"\xb1\xea\x92\x8f"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
SKIPPABLE_MAGICS = tuple(bytes([nibble, 0x2A, 0x4D, 0x18]) for nibble in range(0x50, 0x60))

READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK

SLOT_BYTES_MIN = 64 << 10
SLOT_BYTES_MAX = 512 << 10
SLOTS_MIN, SLOTS_MAX = 4, 32
SHARE_OF_BUDGET = 8

_URL = re.compile(r"(?:[a-z][a-z0-9+.-]*::)*[a-z][a-z0-9+.-]*://", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Resolved:
    """An open source.

    Attributes:
        store: what is mapped.
        container: the store of the compressed bytes, when `store` decompresses them, else None.
        pickled: the source in a form that names the same thing from any working directory; None
            when it cannot be named (a native store).
    """

    store: _core.Store
    container: _core.Store | None
    pickled: Source | None


def resolve(
    source: Source,
    *,
    storage_options: Mapping[str, object] | None = None,
    budget_bytes: int | None = None,
    timeout_s: float = 60.0,
    writable: bool = False,
) -> Resolved:
    """Opens the store of ``source`` and, where its bytes are compressed, the store above it.

    A ``writable`` one is asked for; whether it is says the store (`read_only`).

    ``budget_bytes`` bounds the memory shared with a pager process (an eighth of it at most, but
    at least 256 KiB).

    Raises:
        quire.SourceError: it cannot be opened.
        quire.FormatError: compressed, but not in the seekable format.
        TypeError: not a source.
    """
    opened, pickled = _open(source, storage_options, budget_bytes, timeout_s, writable)
    try:
        if not _is_compressed(opened, pickled):
            return Resolved(opened, None, pickled)
        return Resolved(_core.open_zstd(opened), opened, pickled)
    except BaseException:
        opened.close()
        raise


def _open(
    source: Source,
    storage_options: Mapping[str, object] | None,
    budget_bytes: int | None,
    timeout_s: float,
    writable: bool,
) -> tuple[_core.Store, Source | None]:
    if isinstance(source, _core.Store):
        return source, None
    if isinstance(source, Store):
        return _open_in_pager(source, budget_bytes, timeout_s), source
    name = _name_of(source)
    path = local_path(name)
    if path is not None:
        refuse_options(storage_options, path)
        return _open_file(path, writable), os.path.abspath(path)  # noqa: PTH100 (symlinks stay)
    recipe = _recipe_of_url(name, storage_options)
    return _open_in_pager(recipe, budget_bytes, timeout_s), name


def local_path(name: str) -> str | None:
    """The path that a path or a ``file://`` URL names; None for other URLs.

    >>> local_path("file:///tmp/a%20b"), local_path("s3://bucket/key")
    ('/tmp/a b', None)
    """
    if name.startswith("file://"):
        return _path_of_url(name)
    return name if _URL.match(name) is None else None


def _recipe_of_url(url: str, storage_options: Mapping[str, object] | None) -> Recipe | Store:
    """What opens ``url`` in a pager process.

    The modules are imported here because opening a local file needs none of what they load.
    """
    from quire.store import object_store

    if url.partition("://")[0].lower() in object_store.SCHEMES:
        return object_store.recipe(url, storage_options)
    from quire.store import fsspec_store

    return fsspec_store.recipe(url, storage_options)


def _name_of(source: object) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fsdecode(source)
    raise TypeError(
        "a source is a path, a URL, or an object of your own subclass of quire.Store, "
        f"not {type(source).__name__}"
    )


def _path_of_url(url: str) -> str:
    """The local path that a `file://` URL names (RFC 8089)."""
    from urllib.parse import unquote, urlsplit

    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise SourceError(
            f"the file URL names another machine, {parts.netloc}: write file:///path", source=url
        )
    return unquote(parts.path)


def refuse_options(storage_options: Mapping[str, object] | None, path: str) -> None:
    if storage_options:
        raise SourceError(
            "storage_options are for URLs and this is a local path: leave them out", source=path
        )


def _open_file(path: str, writable: bool) -> _core.Store:
    return _core.open_file(require_path(path), writable)


def require_path(path: str) -> str:
    """A path as it is; raises `quire.SourceError` where it can be none."""
    if "\0" in path:
        raise SourceError("a path cannot contain a NUL character", source=repr(path))
    return path


def require_true_size(source: str | int, label: str) -> None:
    """Raises `quire.SourceError` for a file that has more or less content than its size says.

    Such are those of /proc and /sys: they are made anew for whoever reads them.
    """
    try:
        descriptor = os.open(source, READ) if isinstance(source, str) else os.dup(source)
    except OSError:
        return  # gone, or no longer ours
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return
        last = os.pread(descriptor, 1, max(found.st_size - 1, 0))
        if bool(last) == bool(found.st_size):
            return
    except OSError:
        return
    finally:
        os.close(descriptor)
    raise SourceError(
        f"{label} has other content than the {found.st_size} bytes that it says it has, as files "
        "of /proc and /sys do: it cannot be mapped, read it",
        source=label,
    )


def _open_in_pager(
    recipe: Recipe | Store, budget_bytes: int | None, timeout_s: float
) -> _core.Store:
    from quire.pager import command, encode_recipe

    slots, slot_bytes = pager_shape(min(budget_bytes or _core.budget(), _core.budget()))
    label = str(recipe.label)
    return _core.open_external(
        command(), encode_recipe(recipe), label, slots, slot_bytes, float(timeout_s)
    )


def pager_shape(budget_bytes: int) -> tuple[int, int]:
    """Number of slots of the memory shared with a pager process, and bytes of each.

    One request fills one slot; larger reads are split and asked for at once.

    >>> pager_shape(64 << 20), pager_shape(1 << 20), pager_shape(1 << 40)
    ((16, 524288), (4, 65536), (32, 524288))
    """
    share = budget_bytes // SHARE_OF_BUDGET
    wanted = 1 << max((share // 16).bit_length() - 1, 0)
    slot_bytes = min(max(wanted, SLOT_BYTES_MIN), SLOT_BYTES_MAX)
    return min(max(share // slot_bytes, SLOTS_MIN), SLOTS_MAX), slot_bytes


def _is_compressed(store: _core.Store, pickled: Source | None) -> bool:
    """`_is_zstd`; raises `quire.SourceError` for a file whose size is not that of its content."""
    path = pickled if isinstance(pickled, str) and local_path(pickled) is not None else None
    if path is not None and not store.size:
        require_true_size(path, store.label)
    try:
        return _is_zstd(store)
    except TruncatedError:
        if path is not None:
            require_true_size(path, store.label)
        raise


def _is_zstd(store: _core.Store) -> bool:
    """Whether it begins as zstd, or ends as the seekable format (its first bytes are damaged)."""
    head = store.read(0, min(store.size, len(ZSTD_MAGIC)))
    if head == ZSTD_MAGIC or head in SKIPPABLE_MAGICS:
        return True
    if len(head) < len(ZSTD_MAGIC) or NPY_MAGIC.startswith(head):
        return False
    return store.read(store.size - len(SEEKABLE_END), len(SEEKABLE_END)) == SEEKABLE_END
