"""What a mapping does when pages cannot be had: the error reaches the thread that touched."""

from __future__ import annotations

import errno
import functools
import itertools
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest

import quire
from quire import _core
from quire.testing import children
from quire.testing.content import new_seed, random_content
from quire.testing.pmaps import working_pmaps
from quire.testing.store_contract import SourceMaker
from quire.testing.touches import TOUCHES, Array, MappedSource, Touch, equals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["PmapErrors"]

KIB = 1 << 10
MIB = 1 << 20
JOIN_LIMIT_S = 60.0
BAD_OFFSET = 1_500_000
FILLER = 0xFF


def in_thread(function: Callable[[], None]) -> None:
    """Runs ``function`` in another thread and raises here what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(JOIN_LIMIT_S)
    assert not thread.is_alive()
    if raised:
        raise raised[0]


def in_threads(function: Callable[[], None], count: int) -> None:
    """Runs ``function`` in ``count`` threads at once."""
    threads = [threading.Thread(target=function) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_LIMIT_S)
        assert not thread.is_alive()


def call(function: Callable[[], None]) -> None:
    """Runs ``function`` here."""
    function()


def check_touch_fails(touch: Touch, part: Array, mapping: quire.Mapping) -> None:
    """Touches the page of `BAD_OFFSET`, the last byte of ``part``; checks what is raised."""
    with pytest.raises(quire.PageIOError) as caught:
        touch(part)
    page = BAD_OFFSET // mapping.granule_bytes
    assert caught.value.source == mapping.source
    assert caught.value.errno == errno.EIO
    assert caught.value.page == page
    assert caught.value.offset is not None
    assert page * mapping.granule_bytes <= caught.value.offset <= BAD_OFFSET


class PmapErrors(SourceMaker):
    """Fixtures of `PmapContract`, and its tests of errors."""

    mapped_content_bytes: ClassVar[int] = 4 * MIB + 1234
    mapped_budget_bytes: ClassVar[int] = 2 * MIB

    @pytest.fixture(params=working_pmaps())
    def pmap(self, request: pytest.FixtureRequest) -> str:
        """Name of the pmap."""
        return str(request.param)

    @pytest.fixture
    def mapped_content(self) -> bytes:
        """What the source holds."""
        return random_content(self.mapped_content_bytes, new_seed())

    @pytest.fixture
    def open_mapped(
        self, pmap: str, mapped_content: bytes, tmp_path: Path
    ) -> Iterator[Callable[..., MappedSource]]:
        """Maps a new source; what it opened is closed afterwards, or leaves with its last view."""
        made: list[MappedSource] = []
        numbers = itertools.count()
        with ExitStack() as stack:

            def open_one(
                faults: dict[str, object] | None = None, **options: object
            ) -> MappedSource:
                folder = tmp_path / f"mapped-{next(numbers)}"
                store = self.open_store(
                    mapped_content, folder, budget_bytes=self.mapped_budget_bytes
                )
                stack.callback(store.close)
                if faults is not None:
                    store = _core.open_faulty(store, **faults)  # type: ignore[arg-type]
                options.setdefault("budget", self.mapped_budget_bytes)
                mapping = quire.open(store, dtype="u1", pmap=pmap, **options)  # type: ignore[arg-type]
                stack.enter_context(mapping)
                made.append(MappedSource(mapping))
                return made[-1]

            yield open_one
            for mapped in made:
                mapped.drop_array()

    @pytest.fixture
    def mapped(self, open_mapped: Callable[..., MappedSource]) -> MappedSource:
        """A mapping of the source."""
        return open_mapped()

    @pytest.fixture
    def failing(self, open_mapped: Callable[..., MappedSource]) -> MappedSource:
        """A mapping whose page at `BAD_OFFSET` cannot be had."""
        return open_mapped({"offset": BAD_OFFSET, "length": 1, "errno": errno.EIO}, retries=0)

    def test_the_error_is_raised_where_the_page_was_touched(self, failing: MappedSource) -> None:
        """In the main thread and in others, with and without the interpreter lock; every time."""
        part = failing.array[BAD_OFFSET - 2000 : BAD_OFFSET + 1]
        for touch in TOUCHES.values():
            fail = functools.partial(check_touch_fails, touch, part, failing.mapping)
            for run in (call, in_thread, in_thread, call):
                run(fail)

    def test_the_mapping_is_failed(self, failing: MappedSource) -> None:
        """After one page error every use of the mapping raises."""
        mapping, array = failing.mapping, failing.array
        with pytest.raises(quire.PageIOError):
            TOUCHES["sum"](array)
        assert isinstance(mapping.failed, quire.PageIOError)
        with pytest.raises(quire.PageIOError):
            mapping.check()
        with pytest.raises(quire.PageIOError):
            _ = mapping.array
        assert "failed" in repr(mapping)
        assert mapping.statistics().errors > 0
        with pytest.raises(quire.PageIOError):  # a page that could be had, but was not resident
            TOUCHES["item"](array[:1])

    def test_missing_data_never_look_plausible(
        self, failing: MappedSource, mapped_content: bytes
    ) -> None:
        """The C call that met the error has seen data, or bytes of 0xFF; never zeros."""
        model = np.frombuffer(mapped_content, "u1")
        start = BAD_OFFSET - 300 * KIB
        part, model = failing.array[start:], model[start:]
        copy = np.zeros_like(model)
        with pytest.raises(quire.PageIOError):
            copy_all(copy, part)
        differs = copy != model
        assert differs[BAD_OFFSET - start]
        assert (copy[differs] == FILLER).all()

    def test_all_who_wait_for_a_page_are_told(
        self, open_mapped: Callable[..., MappedSource]
    ) -> None:
        """Threads that wait for the same page all raise, there or at their next `check`.

        A thread that comes late, while filler is resident for another, reads it unwarned; `check`
        is for that.
        """
        late = {"offset": BAD_OFFSET, "length": 1, "errno": errno.EIO, "delay_s": 0.5}
        mapped = open_mapped(late, retries=0)
        array = mapped.array
        told: list[int | None] = []

        def touch() -> None:
            try:
                TOUCHES["copy"](array[BAD_OFFSET : BAD_OFFSET + 3000])  # lets the lock go
                mapped.mapping.check()
            except quire.PageIOError as error:
                told.append(error.errno)

        in_threads(touch, 6)
        assert told == [errno.EIO] * 6

    def test_failures_that_pass_are_tried_again(
        self, open_mapped: Callable[..., MappedSource], mapped_content: bytes
    ) -> None:
        """Within ``retries`` nobody sees them, but they are counted."""
        mapped = open_mapped({"offset": BAD_OFFSET, "length": 1, "count": 2, "errno": errno.EIO})
        assert mapped.mapping.statistics().retries == 0
        part = slice(BAD_OFFSET - 20_000, BAD_OFFSET + 20_000)
        assert equals(mapped.array[part], np.frombuffer(mapped_content, "u1")[part])
        assert mapped.mapping.statistics().retries == 2
        assert mapped.mapping.failed is None

    def test_tries_come_to_an_end(self, open_mapped: Callable[..., MappedSource]) -> None:
        """One failure more than ``retries`` is an error."""
        mapped = open_mapped({"offset": BAD_OFFSET, "length": 1, "count": 2}, retries=1)
        with pytest.raises(quire.PageIOError):
            TOUCHES["item"](mapped.array[: BAD_OFFSET + 1])

    def test_a_forked_child_is_told_too(self, failing: MappedSource) -> None:
        """A child meets the error itself, and inherits a mapping that is failed as failed."""
        array = failing.array

        def fail() -> None:
            with pytest.raises(quire.PageIOError):
                TOUCHES["sum"](array)

        assert children.in_fork(fail) == ""
        assert failing.mapping.failed is None
        with pytest.raises(quire.PageIOError):
            TOUCHES["sum"](array)
        assert children.in_fork(fail) == ""


def copy_all(to: Array, source: Array) -> None:
    """Copies in one C call; the loop lets the exception arrive."""
    np.copyto(to, source)
    for _ in range(10):
        pass
