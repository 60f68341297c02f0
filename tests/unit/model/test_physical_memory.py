import pytest

from quire.model.page import Page
from quire.model.physical_memory import ZERO_FRAME, PhysicalMemory


def test_frames_are_zeroed_and_reused():
    memory = PhysicalMemory(64)
    page = Page()
    frame = memory.allocate(page)
    memory.write(frame * 64 + 10, b"abc")
    assert memory.read(frame * 64 + 9, 5) == b"\0abc\0"
    memory.free(frame)
    assert memory.free_frames() == {frame}
    assert memory.allocate(page) == frame
    assert memory.read(frame * 64, 64) == bytes(64)
    assert memory.used() == 1


def test_runs_are_aligned():
    memory = PhysicalMemory(64)
    memory.allocate(Page())
    pages = [Page() for _ in range(8)]
    first = memory.allocate_run(pages)
    assert first % 8 == 0
    assert memory.pages[first : first + 8] == pages


def test_mapped_frames_and_the_zero_page_are_not_freed():
    memory = PhysicalMemory(64)
    frame = memory.allocate(Page())
    memory.map_counts[frame] = 1
    with pytest.raises(AssertionError, match="still mapped"):
        memory.free(frame)
    with pytest.raises(AssertionError):
        memory.free(ZERO_FRAME)
    with pytest.raises(AssertionError, match="zero page"):
        memory.write(5, b"x")
