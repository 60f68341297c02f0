"""Devices: objects whose pages a driver supplies when they are touched.

The driver interface has four calls, after FreeBSD's `cdev_pager_ops` and Linux's
`vm_operations_struct`: `open` and `close` for each mapping, `fault` for the content of a page,
`sync` for what was stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from quire.model.memory_object import MemoryObject
from quire.model.page import Page

if TYPE_CHECKING:
    from quire.model.page import Mapper
    from quire.model.pageout import Pageout

__all__ = ["CounterDriver", "DeviceObject", "Driver"]


class Driver(Protocol):
    """What a device must do. `fault` and `sync` may raise `DiskError`: the program gets SIGBUS."""

    pages: int

    def open(self) -> None:
        """A mapping was made, or one was cut in two."""

    def close(self) -> None:
        """A mapping was removed."""

    def fault(self, index: int) -> bytes:
        """The content of page `index` as it is now, a page at most; the rest is zeros."""

    def sync(self, index: int, content: bytes) -> None:
        """A program has stored into page `index`."""


class DeviceObject(MemoryObject):
    """A driver's pages.

    They are never cached: each access faults, so that registers are computed then.
    """

    volatile = True

    def __init__(self, pageout: Pageout, name: str, driver: Driver) -> None:
        super().__init__(pageout, name)
        self.driver = driver

    def attach(self, space: Mapper) -> None:
        """Tells the driver."""
        super().attach(space)
        self.driver.open()

    def detach(self, space: Mapper) -> None:
        """Tells the driver."""
        super().detach(space)
        self.driver.close()

    def page_count(self) -> int:
        """As many as the driver has."""
        return self.driver.pages

    def page(self, index: int) -> Page:
        """A page filled by the driver, for one access."""
        content, size = self.driver.fault(index), self.pageout.memory.frame_size
        if len(content) > size:
            raise ValueError(f"the driver of {self.name} gave {len(content)} bytes for a page")
        page = self.pages.get(index) or Page(self, index)
        frame = self.pageout.bring_in(page)
        self.pages[index] = page
        self.pageout.memory.frames[frame][:] = content.ljust(size, b"\0")
        return page

    def page_out(self, page: Page) -> None:
        """Delivers what was stored."""
        assert page.frame is not None
        if page.dirty:
            self.driver.sync(page.index, bytes(self.pageout.memory.frames[page.frame]))
        page.dirty = False
        del self.pages[page.index]

    def finish(self, page: Page) -> None:
        """The access is over: what was stored goes to the driver, and the page is gone."""
        content, dirty = self.pageout.content(page), page.dirty
        self.drop(page.index)
        if dirty:
            self.driver.sync(page.index, content)

    @property
    def swap_backed(self) -> bool:
        """Its content is the driver's, not swap's."""
        return False


class CounterDriver:
    r"""The demo device. Page 0 counts how often it was read; page 1 holds what was stored.

    >>> driver = CounterDriver()
    >>> driver.fault(0), driver.fault(0)
    (b'\x01\x00\x00\x00\x00\x00\x00\x00', b'\x02\x00\x00\x00\x00\x00\x00\x00')
    """

    pages = 2

    def __init__(self) -> None:
        self.touches = 0
        self.register = bytes(8)
        self.mappings = 0

    def open(self) -> None:
        """One mapping more."""
        self.mappings += 1

    def close(self) -> None:
        """One mapping less."""
        self.mappings -= 1

    def fault(self, index: int) -> bytes:
        """The counter, or the register."""
        if index == 0:
            self.touches += 1
            return self.touches.to_bytes(8, "little")
        return self.register

    def sync(self, index: int, content: bytes) -> None:
        """The register takes what was stored; the counter does not."""
        if index == 1:
            self.register = content[:8]
