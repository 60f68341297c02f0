"""quire: virtual memory for Python.

A compressed or remote array as a `numpy.ndarray` with a real pointer, within a memory budget:

```python
import quire

with quire.open("features.npy.zst", budget="64 MiB") as mapping:
    x = mapping.array
    x[123], x @ q
```

Importing the package loads nothing heavy: names are looked up at first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from quire.errors import (
    BudgetError,
    ChangedError,
    ChecksumError,
    ClosedError,
    CorruptError,
    Error,
    FormatError,
    InterruptedPageError,
    ModeError,
    PageIOError,
    PagerDiedError,
    PageTimeoutError,
    PmapError,
    ProtectionError,
    RingFullError,
    SourceError,
    SwapFullError,
    SyncError,
    TruncatedError,
)

if TYPE_CHECKING:
    from quire._api import anonymous, budget, empty, mapping_of, open, set_budget
    from quire._concatenate import concatenate
    from quire._map import map
    from quire._shared import receive, shared, unlink
    from quire.arena import Arena, Placed
    from quire.kernel_mapping import KernelMapping
    from quire.map_flags import MapFlag
    from quire.mapped_file import MappedFile
    from quire.mapping import Mapping
    from quire.packing import PackResult, pack
    from quire.ring import Ring
    from quire.shared_mapping import SharedMapping
    from quire.stats import Statistics, statistics
    from quire.store.abc import Store
    from quire.swap import Swap

__all__ = [
    "Arena",
    "BudgetError",
    "ChangedError",
    "ChecksumError",
    "ClosedError",
    "CorruptError",
    "Error",
    "FormatError",
    "InterruptedPageError",
    "KernelMapping",
    "MapFlag",
    "MappedFile",
    "Mapping",
    "ModeError",
    "PackResult",
    "PageIOError",
    "PageTimeoutError",
    "PagerDiedError",
    "Placed",
    "PmapError",
    "ProtectionError",
    "Ring",
    "RingFullError",
    "SharedMapping",
    "SourceError",
    "Statistics",
    "Store",
    "Swap",
    "SwapFullError",
    "SyncError",
    "TruncatedError",
    "anonymous",
    "budget",
    "concatenate",
    "empty",
    "map",
    "mapping_of",
    "open",
    "pack",
    "receive",
    "set_budget",
    "shared",
    "statistics",
    "unlink",
]

MODULE_OF_NAME = {
    "Arena": "quire.arena",
    "KernelMapping": "quire.kernel_mapping",
    "MapFlag": "quire.map_flags",
    "MappedFile": "quire.mapped_file",
    "Mapping": "quire.mapping",
    "PackResult": "quire.packing",
    "Placed": "quire.arena",
    "Ring": "quire.ring",
    "SharedMapping": "quire.shared_mapping",
    "Statistics": "quire.stats",
    "Store": "quire.store.abc",
    "Swap": "quire.swap",
    "anonymous": "quire._api",
    "budget": "quire._api",
    "concatenate": "quire._concatenate",
    "empty": "quire._api",
    "map": "quire._map",
    "mapping_of": "quire._api",
    "open": "quire._api",
    "pack": "quire.packing",
    "receive": "quire._shared",
    "set_budget": "quire._api",
    "shared": "quire._shared",
    "statistics": "quire.stats",
    "unlink": "quire._shared",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        metadata = importlib.import_module("importlib.metadata")
        return str(metadata.version("quire"))
    module = MODULE_OF_NAME.get(name)
    if module is None:
        raise AttributeError(f"module 'quire' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULE_OF_NAME})
