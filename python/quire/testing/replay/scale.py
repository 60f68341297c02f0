"""Rows are written for pages of 4 KiB; here they are stretched to a geometry with larger pages.

Every byte becomes a run of `factor` equal bytes: addresses, lengths and contents grow alike, and an
outcome shrinks back by taking every `factor`-th byte. Constants near the edges of what an address
can be keep their distance from the edge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.testing.replay.rows import PAGE

if TYPE_CHECKING:
    from quire.model import Geometry

__all__ = ["Scale"]

_X86_HALF = 1 << 47
_NEAR = 1 << 36


class Scale:
    """From bytes of a row to bytes of a geometry, and back."""

    def __init__(self, geometry: Geometry) -> None:
        self.factor = geometry.page_size // PAGE
        self._edges = {0: 0, _X86_HALF: geometry.half, 1 << 63: 1 << 63, 1 << 64: 1 << 64}

    def up(self, value: int) -> int:
        """An address, a length or a size."""
        for edge, here in self._edges.items():
            if abs(value - edge) < _NEAR:
                return here + (value - edge) * self.factor
        return value

    def down(self, value: int) -> int:
        """A number of bytes of the geometry in bytes of the row."""
        assert value % self.factor == 0, "the outcome is not a whole number of the row's bytes"
        return value // self.factor

    def stretch(self, content: bytes) -> bytes:
        """Contents for the geometry."""
        if self.factor == 1:
            return content
        return b"".join([bytes([byte]) * self.factor for byte in content])

    def shrink(self, content: bytes) -> bytes:
        """Contents of the geometry as the row would see them."""
        return content[:: self.factor]
