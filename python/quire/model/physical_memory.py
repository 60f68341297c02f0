"""Physical memory: numbered frames of bytes, each with its counts, and who uses it.

Like the kernel's `mem_map` (one `struct page` for each frame), but the bytes are here too. A frame
is

- *free*,
- a *table* of some page table,
- *failed*, and out of use for ever,
- or held by a `Page` of the operating system; `map_counts` says how many translations show it.

Frame 0 is the zero page: read-only, shown wherever untouched anonymous memory is read, never freed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quire.model.page import Page

__all__ = ["ZERO_FRAME", "PhysicalMemory"]

ZERO_FRAME = 0


class PhysicalMemory:
    """Frames, made when first needed; how many may be in use is the page daemon's matter."""

    def __init__(self, frame_size: int) -> None:
        self.frame_size = frame_size
        self.frames: list[bytearray] = [bytearray(frame_size)]
        self.pages: list[Page | None] = [None]
        self.map_counts: list[int] = [0]
        self.tables: set[int] = set()
        self.failed: set[int] = set()
        """Frames whose memory is broken: once freed they are not given out again."""
        self._free: list[int] = []

    def allocate(self, page: Page | None) -> int:
        """A zeroed frame for `page`."""
        if self._free:
            frame = self._free.pop()
            self.frames[frame] = bytearray(self.frame_size)
        else:
            frame = self._extend(1)
        self.pages[frame] = page
        return frame

    def allocate_table(self, size_bytes: int) -> int:
        """A zeroed frame for a page table (larger than others, if a toy geometry wants that)."""
        frame = self.allocate(None)
        self.frames[frame] = bytearray(max(size_bytes, self.frame_size))
        self.tables.add(frame)
        return frame

    def allocate_run(self, pages: list[Page], again: int | None = None) -> int:
        """Adjoining frames that begin at a multiple of their number: what a block mapping needs.

        New ones, or the run that begins at `again` and was kept.
        """
        count = len(pages)
        if again is not None:
            self.pages[again : again + count] = pages
            self.frames[again : again + count] = [bytearray(self.frame_size) for _ in pages]
            return again
        spare = -len(self.frames) % count
        self._free.extend(self._extend(1) for _ in range(spare))
        first = self._extend(count)
        self.pages[first : first + count] = pages
        return first

    def free(self, frame: int, *, kept: bool = False) -> None:
        """Gives a frame back, or keeps it for a run. Nothing may show it any more."""
        assert self.map_counts[frame] == 0, f"frame {frame} is still mapped"
        assert frame != ZERO_FRAME
        self.pages[frame] = None
        self.tables.discard(frame)
        if frame not in self.failed and not kept:
            self._free.append(frame)

    def used(self) -> int:
        """Frames that are not free, without the zero page."""
        return len(self.frames) - 1 - len(self._free)

    def free_frames(self) -> frozenset[int]:
        """The numbers of free frames."""
        return frozenset(self._free)

    def read(self, physical: int, count: int) -> bytes:
        """Bytes at a physical address, within one frame."""
        frame, offset = divmod(physical, self.frame_size)
        return bytes(self.frames[frame][offset : offset + count])

    def write(self, physical: int, content: bytes) -> None:
        """Stores bytes at a physical address, within one frame."""
        frame, offset = divmod(physical, self.frame_size)
        assert frame != ZERO_FRAME, "a store into the zero page"
        self.frames[frame][offset : offset + len(content)] = content

    def _extend(self, count: int) -> int:
        first = len(self.frames)
        self.frames += [bytearray(self.frame_size) for _ in range(count)]
        self.pages += [None] * count
        self.map_counts += [0] * count
        return first
