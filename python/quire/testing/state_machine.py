"""The core beside the model of virtual memory: the same operations on both, the outcomes compared.

`quire.model` knows nothing of the core: what both say of the same mapping is right twice over. A
file mapped "r+" stands beside one mapped MAP_SHARED, "c" beside MAP_PRIVATE, `quire.anonymous`
beside MAP_ANONYMOUS, each with room for a small part of it, so that both evict all the time::

    quire                           the model
    array, read, write              load, store
    sync                            msync
    evict, prefetch, advise         madvise
    pin, release                    mlock, munlock
    close, open again               munmap, mmap, also from an offset
    a forked child                  fork
    what is wrong raises            a signal or an errno

The pmap "soft", which gives no pointer, takes part with calls alone; of "kernel", where the
operating system pages, no granule is asked for and no bound of residency.

Compared are bytes (of the mapping, and of the file after a sync), what is refused, and residency:
never more than the budget, and always what is pinned.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import quire
from quire import _core
from quire.model import AddressSpace, CallError, Machine, OpenFile, Signalled
from quire.model import flags as f
from quire.model.invariants import check
from quire.pmap import KERNEL
from quire.testing import children
from quire.testing.content import new_seed, random_content

if TYPE_CHECKING:
    from pathlib import Path

    from quire.model.file_object import FileObject
    from quire.residency import Pin

__all__ = ["KINDS", "SOFT", "CoreAndModel", "Kind", "run_beside_model"]

PAGE = _core.page_bytes()
SIZE = 64 * PAGE + 1235
"""Bytes of a mapping: it ends within a page."""
GRANULES = (PAGE, 4 * PAGE)
BUDGETS = (24 * PAGE, 32 * PAGE, 48 * PAGE)
PINNED_MAX = 8 * PAGE
"""Bytes, whole granules, that may be pinned under every budget: more is refused by some."""
SOFT = "soft"
"""The pmap without a pointer."""
FRAMES = 6
"""Pages that the model keeps in memory."""


@dataclass(frozen=True)
class Kind:
    """A kind of mapping: how quire opens it, and how the model does."""

    mode: str | None
    """None: no file, but anonymous memory."""
    prot: int
    flags: int

    @property
    def writable(self) -> bool:
        """Whether bytes may be stored."""
        return bool(self.prot & f.PROT_WRITE)

    @property
    def writes_back(self) -> bool:
        """Whether what is stored goes to the file."""
        return self.mode == "r+"


KINDS = {
    "shared": Kind("r+", f.PROT_READ | f.PROT_WRITE, f.MAP["SHARED"]),
    "private": Kind("c", f.PROT_READ | f.PROT_WRITE, f.MAP["PRIVATE"]),
    "anonymous": Kind(None, f.PROT_READ | f.PROT_WRITE, f.MAP["PRIVATE"] | f.MAP["ANON"]),
    "read-only": Kind("r", f.PROT_READ, f.MAP["SHARED"]),
}


class Twin:
    """The same content on a machine of few frames, in an address space that has nothing else."""

    def __init__(self, kind: Kind, content: bytes) -> None:
        self.kind = kind
        self.machine = Machine(frames=FRAMES, swap=None)
        self.space = AddressSpace(self.machine)
        self.space.may_lock_beyond_limit = False
        self.space.limits["MEMLOCK"] = SIZE // 2
        self.page = self.machine.geometry.page_size
        self.object: FileObject = self.machine.file("content", content)
        self.file = OpenFile("content", "regular", self.object)
        self.file.fsync()
        self.map()

    def map(self, offset: int = 0) -> None:
        """Maps it, again after `unmap`, or the pages of it from that of ``offset`` on.

        `at` is where byte 0 is, or would be.
        """
        file = None if self.kind.mode is None else self.file
        self.start = offset - offset % self.page
        size = SIZE - self.start
        place = self.space.mmap(0, size, self.kind.prot, self.kind.flags, file, self.start)
        self.at = place - self.start

    def unmap(self) -> None:
        """Ends the mapping, synced before as quire does it."""
        self.sync(self.start, SIZE - self.start)
        self.space.munmap(self.at + self.start, SIZE - self.start)

    def load(self, offset: int = 0, length: int = SIZE) -> bytes:
        """Reads bytes of the mapping."""
        return self.space.load(self.at + offset, length)

    def store(self, offset: int, content: bytes) -> None:
        """Writes bytes of the mapping."""
        self.space.store(self.at + offset, content)

    def sync(self, offset: int, length: int) -> None:
        """Writes the pages of a range to the disk."""
        low, high = self._pages(offset, length)
        self.space.msync(low, high - low, f.MS["SYNC"])

    def advise(self, advice: str, offset: int, length: int) -> None:
        """Advice about the pages of a range; those that are locked are left out of PAGEOUT."""
        for at in range(*self._pages(offset, length), self.page):
            vma = self.space.vmas.find(at)
            if advice != "PAGEOUT" or not (vma and vma.flags & f.LOCKED):
                self.space.madvise(at, self.page, f.MADV[advice])

    def lock(self, parts: list[tuple[int, int]]) -> None:
        """Locks these ranges and no others."""
        self.space.munlock(self.at, SIZE)
        for offset, length in parts:
            self.space.mlock(self.at + offset, length)

    def resident(self, offset: int, length: int) -> bool:
        """Whether every page of a range is in memory."""
        low, high = self._pages(offset, length)
        return all(self.space.mincore(low, high - low))

    def on_disk(self) -> bytes:
        """The bytes of the file's blocks."""
        assert self.object.backing is not None
        blocks = self.object.backing.blocks
        pages = range(self.object.page_count())
        return b"".join(blocks.get(page) or bytes(self.page) for page in pages)[:SIZE]

    def _pages(self, offset: int, length: int) -> tuple[int, int]:
        low, high = self.at + offset, self.at + offset + length
        return low - low % self.page, -(-high // self.page) * self.page


@st.composite
def ranges(draw: st.DrawFn, longest: int = 3 * PAGE) -> tuple[int, int]:
    """Offset and length within the mapping; many of them lie about the start of a page."""
    starts = st.integers(0, SIZE - 1) | st.integers(1, SIZE // PAGE).map(lambda n: n * PAGE - 3)
    lengths = st.integers(1, 64) | st.integers(1, longest) | st.just(longest)
    offset = draw(starts)
    return offset, min(draw(lengths), SIZE - offset)


PLACES = st.none() | ranges(SIZE)
"""Where to do what touches no content: None is where bytes were stored last."""


class CoreAndModel(RuleBasedStateMachine):
    """A mapping of quire and its `Twin`."""

    def __init__(self, kind: str, pmap: str, folder: Path) -> None:
        super().__init__()
        self.kind, self.pmap = KINDS[kind], pmap
        self.has_pointer = pmap != SOFT
        self.pages_itself = pmap != KERNEL
        """Whether quire pages, and not the operating system."""
        self.has_budget = self.pages_itself or self.kind.mode != "c"
        anonymous = self.kind.mode is None
        self.content = bytes(SIZE) if anonymous else random_content(SIZE, seed=1)
        self.path = folder / "content.bin"
        self.path.write_bytes(self.content)
        self.twin = Twin(self.kind, self.content)
        self.pins: list[tuple[Pin, int, int]] = []
        self.last = (0, PAGE)
        """Offset and length of the last store."""
        self.steps = 0
        self.open(GRANULES[0], BUDGETS[0])

    def open(self, granule: int, budget: int, offset: int = 0) -> None:
        """Maps with quire; the array begins at ``offset``."""
        how: dict[str, Any] = {"pmap": self.pmap}
        if self.pages_itself:
            how["granule"] = granule
        if self.has_budget:
            how["budget"] = budget
        if self.kind.mode is None:
            self.mapping = quire.anonymous(SIZE, **how)
        else:
            how["offset"] = offset
            self.mapping = quire.open(self.path, mode=self.kind.mode, dtype="u1", **how)
        self.budget_max = budget

    def teardown(self) -> None:
        """Compares all once more, and leaves nothing behind."""
        try:
            if not self.mapping.closed:
                self.same(0, SIZE)
        finally:
            for pin, _, _ in self.pins:
                pin.release()
            self.mapping.close(discard=True)

    def same(self, offset: int, length: int) -> None:
        """Asserts that bytes are equal, read both ways."""
        expected = self.twin.load(offset, length)
        if self.has_pointer:
            assert self.mapping.array[offset : offset + length].tobytes() == expected
        assert self.mapping.read(offset, length) == expected

    # What may be done.

    @rule(where=ranges())
    def load(self, where: tuple[int, int]) -> None:
        """Reads bytes."""
        self.same(*where)

    @precondition(lambda self: self.kind.writable)
    @rule(where=ranges(), number=st.integers(0, 1 << 32), by_call=st.booleans())
    def store(self, where: tuple[int, int], number: int, by_call: bool) -> None:
        """Writes bytes, with stores of numpy or with `Mapping.write`."""
        offset, length = where
        content = random_content(length, number)
        self.last = where
        self.twin.store(offset, content)
        if by_call or not self.has_pointer:
            assert self.mapping.write(content, offset) == length
        else:
            self.mapping.array[offset : offset + length] = np.frombuffer(content, "u1")

    @precondition(lambda self: self.kind.writable)
    @rule(start=st.integers(0, SIZE - 1), step=st.integers(PAGE // 2, 9 * PAGE), value=st.binary(
        min_size=1, max_size=1
    ))  # fmt: skip
    def scatter(self, start: int, step: int, value: bytes) -> None:
        """Writes single bytes all over, more pages than have room."""
        for offset in range(start, SIZE, step):
            self.twin.store(offset, value)
            if not self.has_pointer:
                assert self.mapping.write(value, offset) == 1
        if self.has_pointer:
            self.mapping.array[start::step] = value[0]

    @rule(where=PLACES)
    def sync(self, where: tuple[int, int] | None) -> None:
        """Writes a part back."""
        offset, length = where or self.last
        self.mapping.sync(offset, length)
        self.twin.sync(offset, length)
        self.same_files(offset, length)

    @rule()
    def sync_all(self) -> None:
        """Writes all back."""
        self.mapping.sync()
        self.twin.sync(0, SIZE)
        self.same_files(0, SIZE)

    def same_files(self, offset: int, length: int) -> None:
        """Asserts that a part of both files, which was synced, is equal."""
        part = slice(offset, offset + length)
        assert self.path.read_bytes()[part] == self.twin.on_disk()[part]

    @precondition(lambda self: self.has_pointer)
    @rule(where=PLACES, as_advice=st.booleans())
    def evict(self, where: tuple[int, int] | None, as_advice: bool) -> None:
        """Pages out what is not pinned."""
        where = where or self.last
        part = slice(where[0], sum(where))
        self.twin.advise("PAGEOUT", *where)
        if as_advice:
            self.mapping.advise("dontneed", part)
        else:
            assert self.mapping.evict(part) % PAGE in (0, SIZE % PAGE)

    @precondition(lambda self: self.has_pointer)
    @rule(where=PLACES, wait=st.booleans())
    def prefetch(self, where: tuple[int, int] | None, wait: bool) -> None:
        """Fills a part ahead of need."""
        where = where or self.last
        part = slice(where[0], sum(where))
        self.twin.advise("WILLNEED", *where)
        if wait:
            self.mapping.prefetch(part).result(60)
        else:
            self.mapping.advise("willneed", part)

    @rule(advice=st.sampled_from(["normal", "sequential", "random"]))
    def advise(self, advice: str) -> None:
        """Says how it is going to be touched."""
        self.twin.advise(advice.upper(), 0, SIZE)
        self.mapping.advise(advice)

    @precondition(lambda self: self.has_pointer)
    @rule(where=ranges())
    def pin(self, where: tuple[int, int]) -> None:
        """Keeps a part resident, unless too much is pinned already."""
        held = [(offset, length) for _, offset, length in self.pins]
        if self.pinned_bytes([*held, where]) > PINNED_MAX:
            return
        self.twin.lock([*held, where])
        self.pins.append((self.mapping.pin(slice(where[0], sum(where))), *where))

    @precondition(lambda self: self.pins)
    @rule(which=st.integers(0, 99))
    def unpin(self, which: int) -> None:
        """Ends a pin; what others hold stays."""
        pin, _, _ = self.pins.pop(which % len(self.pins))
        pin.release()
        self.twin.lock([(offset, length) for _, offset, length in self.pins])

    def pinned_bytes(self, parts: list[tuple[int, int]]) -> int:
        """Bytes of the granules of some parts."""
        unit = self.mapping.granule_bytes
        granules = {
            number
            for offset, length in parts
            for number in range(offset // unit, -(-(offset + length) // unit))
        }
        return len(granules) * unit

    @precondition(lambda self: self.has_budget)
    @rule(budget=st.sampled_from(BUDGETS))
    def set_budget(self, budget: int) -> None:
        """Gives another budget, which what is pinned fits: what exceeds it goes at once."""
        self.mapping.set_budget(budget)
        self.budget_max = max(self.budget_max, budget)
        assert self.mapping.budget_bytes == budget

    @precondition(lambda self: not self.pins)
    @rule(granule=st.sampled_from(GRANULES), budget=st.sampled_from(BUDGETS))
    def close_and_open(self, granule: int, budget: int) -> None:
        """Ends both mappings, compares the files, and maps them again.

        Nothing but what a shared mapping wrote outlives it.
        """
        self.close()
        self.open(granule, budget)
        self.twin.map()
        self.same(0, SIZE)

    @precondition(lambda self: self.kind.mode is not None and not self.pins)
    @rule(where=ranges(), number=st.integers(0, 1 << 32))
    def map_from_offset(self, where: tuple[int, int], number: int) -> None:
        """Both map the file from an offset on for a while, the model from the start of its page."""
        offset, length = where
        self.close()
        self.open(GRANULES[0], BUDGETS[0], offset)
        self.twin.map(offset)
        self.same_from(offset)
        if self.kind.writable:
            content = random_content(length, number)
            self.twin.store(offset, content)
            if self.has_pointer:
                self.mapping.array[:length] = np.frombuffer(content, "u1")
            else:
                assert self.mapping.write(content, offset) == length
            self.same_from(offset)
        self.close()
        self.open(GRANULES[0], BUDGETS[0])
        self.twin.map()

    def same_from(self, offset: int) -> None:
        """Asserts that the bytes from an offset on are equal; there the array begins."""
        expected = self.twin.load(offset, SIZE - offset)
        assert self.mapping.read(offset, SIZE - offset) == expected
        if self.has_pointer:
            assert self.mapping.array.tobytes() == expected

    @rule(where=ranges(), number=st.integers(0, 1 << 32))
    def fork(self, where: tuple[int, int], number: int) -> None:
        """A child of both reads, and where the kernel pages, stores.

        What quire pages and may be written, its child is refused.
        """
        offset, length = where
        child, content = self.twin.space.fork(), random_content(length, number)
        refused = self.kind.writable and self.pages_itself
        low = max(offset - PAGE, 0)
        part = low, min(length + 2 * PAGE, SIZE - low)
        before = child.load(self.twin.at + low, part[1])
        if self.kind.writable and not refused:
            child.store(self.twin.at + offset, content)
        after = child.load(self.twin.at + low, part[1])
        child.exit()

        def use() -> None:
            if refused:
                with pytest.raises(quire.PageIOError, match="belongs to the parent"):
                    self.mapping.read(offset, length)
                return
            assert self.mapping.read(*part) == before
            if self.kind.writable:
                self.mapping.array[offset : offset + length] = np.frombuffer(content, "u1")
            assert self.mapping.read(*part) == after

        assert children.in_fork(use) == ""
        self.same(*part)

    def close(self) -> None:
        """Ends both mappings: neither can be used, and the files are equal."""
        self.mapping.close()
        self.twin.unmap()
        for use in (lambda: self.mapping.array, self.mapping.__enter__):
            with pytest.raises(quire.ClosedError):
                use()
        with pytest.raises(BufferError, match="closed"):
            memoryview(self.mapping)
        with pytest.raises(Signalled, match="SIGSEGV SEGV_MAPERR"):
            self.twin.load(self.twin.start, 1)
        with pytest.raises(CallError, match="ENOMEM"):
            self.twin.sync(self.twin.start, 1)
        self.same_files(0, SIZE)

    # What is wrong on both sides.

    @rule(beyond=st.integers(0, 3 * PAGE), length=st.integers(1, PAGE))
    def misuse(self, beyond: int, length: int) -> None:
        """What is refused whatever the state, and changes nothing."""
        self.past_the_end(beyond, length)
        if self.has_pointer:
            self.close_in_use()
        else:
            self.point_without_pointer()
        if self.pages_itself:
            self.budget_too_small()

    def past_the_end(self, beyond: int, length: int) -> None:
        """Nothing lies past the last page; quire, which knows the last byte, refuses from there."""
        with pytest.raises(ValueError, match="do not lie in a mapping"):
            self.mapping.read(SIZE + beyond, length)
        if self.kind.writable:
            with pytest.raises(ValueError, match="do not lie in a mapping"):
                self.mapping.write(bytes(length + 1), SIZE - 1)
        with pytest.raises(Signalled, match="SIGSEGV SEGV_MAPERR"):
            self.twin.load(-(-SIZE // self.twin.page) * self.twin.page + beyond, length)

    @precondition(lambda self: not self.kind.writable)
    @rule(where=ranges())
    def store_to_read_only(self, where: tuple[int, int]) -> None:
        """No way of Python's writes to what may only be read."""
        offset, length = where
        with pytest.raises(quire.ModeError):
            self.mapping.write(bytes(length), offset)
        if self.has_pointer:
            with pytest.raises(ValueError, match="read-only"):
                self.mapping.array[offset : offset + length] = 0
        with pytest.raises(Signalled, match="SIGSEGV SEGV_ACCERR"):
            self.twin.store(offset, bytes(length))

    @precondition(lambda self: self.has_pointer and not self.kind.writable and not self.pins)
    @rule(offset=st.integers(0, SIZE - 1))
    def stray_store(self, offset: int) -> None:
        """A store of C code raises, and ends the mapping; it is opened again."""
        with pytest.raises(quire.ProtectionError) as caught:
            store_stray(self.mapping.address + offset)
        assert caught.value.offset == offset
        with pytest.raises(quire.ProtectionError):
            self.mapping.check()
        with pytest.raises(Signalled, match=f"SIGSEGV SEGV_ACCERR at {self.twin.at + offset:#x}"):
            self.twin.store(offset, b"\0")
        self.mapping.close()
        self.open(GRANULES[0], BUDGETS[0])

    def budget_too_small(self) -> None:
        """What does not fit is refused as a whole, and nothing changes."""
        before = self.mapping.budget_bytes
        with pytest.raises(quire.BudgetError):
            self.mapping.set_budget(PAGE)
        assert self.mapping.budget_bytes == before
        if self.has_pointer:
            with pytest.raises(quire.BudgetError):
                self.mapping.pin()
        with pytest.raises(CallError, match="ENOMEM"):
            self.twin.space.mlock(self.twin.at, SIZE)

    def point_without_pointer(self) -> None:
        """What needs a pointer says so."""
        for use in (lambda: self.mapping.array, self.mapping.pin, self.mapping.evict):
            with pytest.raises(quire.PmapError, match="soft"):
                use()
        with pytest.raises(BufferError, match="soft"):
            memoryview(self.mapping)

    def close_in_use(self) -> None:
        """A mapping that a view shows is not closed; nor may one be unmapped by halves."""
        view = self.mapping.array
        with pytest.raises(BufferError):
            self.mapping.close()
        assert not self.mapping.closed
        assert view[SIZE - 1] == self.twin.load(SIZE - 1, 1)[0]
        with pytest.raises(CallError, match="EINVAL"):
            self.twin.space.munmap(self.twin.at + 1, SIZE)

    # What is always true.

    @invariant()
    def bytes_are_equal(self) -> None:
        """A part of the mapping after each step, in turn; and what must not be written is not."""
        self.steps += 1
        self.same(self.steps * 7 % 64 * PAGE, PAGE)
        self.same(SIZE - 1235 - 5, 1240)
        if not self.kind.writes_back:
            assert self.path.read_bytes() == self.content == self.twin.on_disk()

    @invariant()
    def residency_is_bounded(self) -> None:
        """No more than the budget is resident, nor ever was; what is pinned is."""
        statistics = self.mapping.statistics()
        if self.pages_itself:
            assert statistics.resident_bytes <= statistics.budget_bytes <= self.budget_max
            assert statistics.peak_resident_bytes <= self.budget_max
        assert statistics.errors == 0
        assert self.mapping.failed is None
        for _, offset, length in self.pins:
            assert self.mapping.resident(slice(offset, offset + length)).all()
            assert self.twin.resident(offset, length)
        assert len(self.twin.machine.pageout.policy) <= FRAMES + PINNED_MAX // self.twin.page

    @invariant()
    def model_is_sound(self) -> None:
        """Frames, tables and counts of the model agree."""
        check(self.twin.machine)


def store_stray(address: int) -> None:
    """Stores a byte as C code that ignores flags would; the loop lets the exception arrive."""
    ctypes.memset(address, 1, 1)
    for _ in range(10):
        pass


def run_beside_model(
    kind: str, pmap: str, folder: Path, *, examples: int, steps: int, shrink: bool
) -> None:
    """Random runs of `CoreAndModel`; a failure prints its steps.

    With ``shrink`` they are the fewest that show it, which takes minutes to find.

    ``kind`` is one of `KINDS`, ``pmap`` may say how writes are noticed ("uffd:wp-sync"). The seed
    is printed; the environment variable ``QUIRE_TEST_SEED`` repeats it.

    Raises:
        AssertionError: core and model differ.
    """

    class Here(CoreAndModel):
        def __init__(self) -> None:
            super().__init__(kind, pmap, folder)

    run_state_machine_as_test(
        seed(new_seed())(Here),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,  # the seed alone says what is run
            print_blob=True,
            phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
