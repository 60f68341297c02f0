"""Where the pages of private mappings go when they are evicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import os

    from quire.sizes import SizeLike

__all__ = ["Swap"]


@dataclass(frozen=True, kw_only=True)
class Swap:
    """How a mapping of anonymous memory, or one of mode "c", is swapped.

    Each has a swap file of its own, without a name, which ends with the mapping and with the
    process, however that ends.

    Attributes:
        folder: where the file is; `TMPDIR`, `/var/tmp` or `/tmp`, the first that is on a disk, when
            absent.
        limit: bytes it may take, an int or text such as "8 GiB"; enough for all pages when absent.
            A page that finds no room stays in memory; when none can go, a touch raises
            `quire.SwapFullError`.
        compression: "none", "lz4" or "zstd".
        encrypt: whether pages are encrypted (AES-256-GCM) with a key that exists only in locked
            memory of this process.
    """

    folder: str | os.PathLike[str] | None = None
    limit: SizeLike | None = None
    compression: Literal["none", "lz4", "zstd"] = "none"
    encrypt: bool = False
