"""`MappedFile`: a mapping as a file and as a bytearray of fixed length.

It is what `quire.compat.mmap` is made of, native because an index of a Python class takes several
times as long, and public because it takes any `quire.KernelMapping`, at any offset of its source.
"""

from __future__ import annotations

from quire._core import MappedFile

__all__ = ["MappedFile"]
