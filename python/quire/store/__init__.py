"""Stores: bytes somewhere, read by offset. A store knows nothing of pages.

`abc` is the interface for stores of your own, `resolve` finds the store of a source, and each
further module holds one kind of store. Files, memory and seekable zstd are read by the native core.
"""

from quire.store.abc import Store

__all__ = ["Store"]
