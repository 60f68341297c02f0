"""Tests that every store and every pmap passes; for authors of stores, and for quire itself.

Derive a test class, say how to make your source, and let pytest collect it::

    from quire.testing import PmapContract, StoreContract

    class TestMyStore(StoreContract, PmapContract):
        def make_source(self, content, folder):
            (folder / "content").write_bytes(content)
            return MyStore(folder / "content")

`StoreContract` reads the store; `PmapContract` maps it, once with every pmap that works here.
A store written in Python takes `PythonStoreContract` beside them, one that can be written
`WriteContract`. Whatever is random prints its
seed; the environment variable ``QUIRE_TEST_SEED`` repeats it.

Beside the contracts: `state_machine` does random operations to a mapping and to `quire.model` at
once; `stores` has stores that wait, fail or die on demand; `census` counts what a process holds, to
find what was left behind; `children` runs a function in an interpreter of its own.

Needs pytest: ``pip install quire[test]``.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.testing.pmap_contract import PmapContract
    from quire.testing.store_contract import PythonStoreContract, StoreContract
    from quire.testing.write_contract import WriteContract

__all__ = ["PmapContract", "PythonStoreContract", "StoreContract", "WriteContract"]

_MODULE_OF_NAME = {
    "PmapContract": "quire.testing.pmap_contract",
    "PythonStoreContract": "quire.testing.store_contract",
    "StoreContract": "quire.testing.store_contract",
    "WriteContract": "quire.testing.write_contract",
}

_running = sys.modules.get("pytest")
if _running is not None:
    _running.register_assert_rewrite(
        "quire.testing.pmap_contract",
        "quire.testing.pmap_errors",
        "quire.testing.state_machine",
        "quire.testing.store_contract",
        "quire.testing.write_contract",
        "quire.testing.write_errors",
    )


def __getattr__(name: str) -> object:
    """Loads a contract at first use: `quire.testing.replay` needs neither pytest nor the core."""
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module 'quire.testing' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_MODULE_OF_NAME[name]), name)
    globals()[name] = value
    return value
