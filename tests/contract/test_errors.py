"""Page errors in the situations in which the interpreter can be told of them, each first met."""

from __future__ import annotations

import ctypes
import errno
import threading
from collections.abc import Callable

import numpy as np
import pytest

import quire
from quire import _core
from quire.testing import children
from quire.testing.content import random_content
from quire.testing.touches import TOUCHES, Touch

KIB = 1 << 10
SIZE = 4 << 20
BAD_OFFSET = 3 << 20


def failing(
    pmap: str, *, dtype: str = "u1", shape: object = None, **faults: object
) -> quire.Mapping:
    """A mapping whose page at `BAD_OFFSET` cannot be had."""
    faults = {"offset": BAD_OFFSET, "length": 1, "errno": errno.EIO, **faults}
    memory = _core.open_memory(random_content(SIZE, 1), "failing memory")
    store = _core.open_faulty(memory, **faults)
    return quire.open(store, dtype=dtype, shape=shape, pmap=pmap, granule="4 KiB", retries=0)


@pytest.mark.parametrize("where", ["main", "other"])
@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES.keys())
def test_the_first_touch_raises(pmap: str, touch: Touch, where: str) -> None:
    with failing(pmap) as mapping:
        part = mapping.array[BAD_OFFSET - 2000 : BAD_OFFSET + 1]
        caught: list[BaseException] = []

        def run() -> None:
            try:
                touch(part)
            except quire.PageIOError as error:
                caught.append(error)

        if where == "main":
            run()
        else:
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        assert [type(error) for error in caught] == [quire.PageIOError]
        assert caught[0].errno == errno.EIO


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("io", quire.PageIOError),
        ("truncated", quire.TruncatedError),
        ("changed", quire.ChangedError),
        ("corrupt", quire.CorruptError),
        ("checksum", quire.ChecksumError),
        ("pager_died", quire.PagerDiedError),
        ("timeout", quire.PageTimeoutError),
        ("closed", quire.PageIOError),
    ],
)
def test_each_failure_has_its_class(pmap: str, code: str, kind: type[quire.Error]) -> None:
    with failing(pmap, code=code) as mapping:
        with pytest.raises(quire.PageIOError) as caught:
            TOUCHES["item"](mapping.array[: BAD_OFFSET + 1])
        assert type(caught.value) is kind
        assert type(mapping.failed) is kind
        assert mapping.statistics().retries == 0
        assert "injected" in caught.value.message
        assert caught.value.source == "failing memory"


def wait_for_error(mapping: quire.Mapping) -> None:
    """Runs Python code until the interpreter raises; or until it is clear that it does not."""
    for _ in range(1000):
        mapping.statistics()


def test_a_thread_that_python_does_not_know(pmap: str) -> None:
    """It cannot raise: the main thread does."""
    libc = ctypes.CDLL(None)
    with failing(pmap) as mapping:
        thread = ctypes.c_ulong()
        address = ctypes.c_void_p(mapping.address + BAD_OFFSET)

        def touch_and_wait() -> None:
            libc.pthread_create(ctypes.byref(thread), None, libc.atoi, address)
            libc.pthread_join(thread, None)
            wait_for_error(mapping)

        with pytest.raises(quire.PageIOError) as caught:
            touch_and_wait()
        assert caught.value.errno == errno.EIO
        assert isinstance(mapping.failed, quire.PageIOError)


def test_threads_of_a_blas_library(pmap: str) -> None:
    """Whichever of its threads meets the page, the call does not pass unnoticed."""
    rows = SIZE // 4 // 512
    with failing(pmap, dtype="f4", shape=(rows, 512)) as mapping, np.errstate(all="ignore"):

        def multiply() -> None:
            np.dot(mapping.array, mapping.array.T[:, :64])
            wait_for_error(mapping)

        with pytest.raises(quire.PageIOError):
            multiply()
        assert mapping.failed is not None


def test_a_blas_product_in_another_thread(pmap: str) -> None:
    rows = SIZE // 4 // 512
    with failing(pmap, dtype="f4", shape=(rows, 512)) as mapping:
        array, done = mapping.array, threading.Event()
        caught: list[BaseException] = []

        def guarded(function: Callable[[], object]) -> None:
            try:
                with np.errstate(all="ignore"):
                    function()
                wait_for_error(mapping)
            except quire.PageIOError as error:
                caught.append(error)

        def multiply() -> None:
            guarded(lambda: np.dot(array, array.T[:, :64]))
            done.set()

        thread = threading.Thread(target=multiply)
        for step in (thread.start, lambda: done.wait(60), thread.join, lambda: None):
            guarded(step)  # a worker of BLAS is no thread of Python: its error comes to this one
        assert caught
        assert mapping.failed is not None


def test_an_error_does_not_reach_other_mappings(pmap: str) -> None:
    content = random_content(SIZE, 2)
    with failing(pmap) as bad, quire.open(_core.open_memory(content, "good"), dtype="u1") as good:
        with pytest.raises(quire.PageIOError):
            TOUCHES["sum"](bad.array)
        assert np.array_equal(good.array, np.frombuffer(content, "u1"))
        assert good.failed is None


def test_one_error_is_raised_once(pmap: str) -> None:
    with failing(pmap) as mapping:
        with pytest.raises(quire.PageIOError):
            TOUCHES["sum"](mapping.array)
        wait_for_error(mapping)
        assert _core.take_pending_error() is None


def test_a_failed_mapping_can_be_closed_and_its_source_opened_again(pmap: str) -> None:
    content = random_content(SIZE, 1)
    store = _core.open_memory(content, "memory")
    for _ in range(2):
        with failing(pmap) as mapping, pytest.raises(quire.PageIOError):
            TOUCHES["sum"](mapping.array)
    with quire.open(store, dtype="u1", pmap=pmap) as mapping:
        assert np.array_equal(mapping.array, np.frombuffer(content, "u1"))


def child_raises_in_a_loop(pmap: str) -> None:
    """Hundreds of errors in four threads, with and without the interpreter lock.

    Filler that is there for one thread can be read by another; it is never anything else.
    """
    last = failing(pmap).array[BAD_OFFSET : BAD_OFFSET + 1]
    ways: list[Touch] = [np.ndarray.item, np.copy, np.max, lambda part: part.data[0]]
    raised, seen = [0] * 4, set()

    def touch_often(number: int) -> None:
        for _ in range(300):
            try:
                seen.add(int(np.asarray(ways[number](last)).ravel()[0]))
                for _ in range(10):
                    pass
            except quire.PageIOError:
                raised[number] += 1

    threads = [threading.Thread(target=touch_often, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(raised) > 0
    assert seen <= {0xFF}, seen


def test_errors_in_many_threads_do_no_harm(pmap: str) -> None:
    children.run(child_raises_in_a_loop, pmap).check()


if __name__ == "__main__":
    children.main()
