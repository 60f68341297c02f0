"""Rows are written for pages of 4 KiB; here they are stretched to a geometry with larger pages.

Every byte becomes a run of `factor` equal bytes: addresses, lengths and contents grow alike, and an
outcome shrinks back by taking every `factor`-th byte. What is huge stays as huge, and only its
distance from the next round number is stretched: so it stays at the edge of user space, or at the
largest offset, and aligned where it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.testing.replay.rows import PAGE

if TYPE_CHECKING:
    from quire.model import Geometry

__all__ = ["Scale"]

_X86_HALF = 1 << 47
_ROUND = 1 << 37
_HUGE = 1 << 40
"""What lies below, in bytes of a geometry, was stretched as a whole."""


class Scale:
    """From bytes of a row to bytes of a geometry, and back."""

    def __init__(self, geometry: Geometry) -> None:
        self.factor = geometry.page_size // PAGE
        self._half = geometry.half

    def up(self, value: int) -> int:
        """An address, a length or a size."""
        near = (value + _ROUND // 2) // _ROUND * _ROUND
        here = self._half if near == _X86_HALF else near
        return here + (value - near) * self.factor

    def down(self, value: int) -> int:
        """A number of bytes of the geometry in bytes of the row."""
        near = (value + _ROUND // 2) // _ROUND * _ROUND if value >= _HUGE else 0
        away = value - near
        assert away % self.factor == 0, "the outcome is not a whole number of the row's bytes"
        return near + away // self.factor

    def stretch(self, content: bytes) -> bytes:
        """Contents for the geometry."""
        if self.factor == 1:
            return content
        return b"".join([bytes([byte]) * self.factor for byte in content])

    def shrink(self, content: bytes) -> bytes:
        """Contents of the geometry as the row would see them."""
        return content[:: self.factor]
