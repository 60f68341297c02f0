"""What a mapping of any store does with any pmap: content, budget, ends, reading only, fork."""

from __future__ import annotations

import ctypes
import errno
import re
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

import numpy as np
import pytest

import quire
from quire import _core
from quire.testing import children
from quire.testing.census import is_mapped
from quire.testing.content import new_seed, random_ranges
from quire.testing.pmap_errors import PmapErrors
from quire.testing.pmaps import takes_system_calls
from quire.testing.touches import MappedSource, equals
from quire.testing.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["PmapContract"]

PYBUF_WRITABLE = 1
PROGRESS_LIMIT_S = 20.0


class PmapContract(PmapErrors):
    """Mappings of one kind of source, with every pmap that works here."""

    def test_random_touches_equal_the_model(
        self, mapped: MappedSource, mapped_content: bytes
    ) -> None:
        """Whatever is touched in whatever order is what the source holds."""
        array, seed = mapped.array, new_seed()
        model = np.frombuffer(mapped_content, "u1")
        rng = np.random.default_rng(seed)
        for offset, length in random_ranges(len(model), 60, seed):
            window = slice(offset, offset + length)
            assert equals(array[window], model[window]), window
        for step in (4099, -4096, 65_537, -1001):
            assert equals(array[::step], model[::step]), step
        picked = rng.integers(0, len(model), 2000)
        assert equals(array[picked], model[picked])
        assert equals(array, model)
        assert mapped.mapping.failed is None

    def test_it_counts(self, mapped: MappedSource, mapped_content: bytes) -> None:
        """The statistics of one sequential pass agree with each other and with the source."""
        before = mapped.mapping.statistics()
        assert before.faults == before.fills == before.errors == 0
        assert equals(mapped.array, np.frombuffer(mapped_content, "u1"))

        def all_counted() -> bool:
            return mapped.mapping.statistics().fill_bytes >= len(mapped_content)

        wait_until(all_counted, "a page is counted a moment after it can be read")
        after = mapped.mapping.statistics()
        assert 0 < after.faults <= after.fills
        assert after.fills <= after.faults + after.readahead_fills
        assert after.evicted_bytes >= len(mapped_content) - after.budget_bytes
        assert after.bytes_fetched > 0
        assert 0 < after.fault_ns_p50 <= after.fault_ns_p90 <= after.fault_ns_p99
        assert after.fault_ns_p99 <= after.fault_ns_max
        assert after.resident_bytes <= after.peak_resident_bytes <= after.budget_bytes

    def test_the_tail_of_the_last_page_is_zero(
        self, mapped: MappedSource, mapped_content: bytes
    ) -> None:
        """Past the end of the data the last page holds zeros, also after it was evicted."""
        mapping, page = mapped.mapping, _core.page_bytes()
        size = len(mapped_content)
        rest = -size % page
        assert rest, "the content of this test ends within a page"
        for _ in range(2):  # the second time after the page was evicted
            assert ctypes.string_at(mapping.address + size, rest) == bytes(rest)
            assert ctypes.string_at(mapping.address + size - 1, 1) == mapped_content[-1:]
            assert equals(mapped.array, np.frombuffer(mapped_content, "u1"))
            assert equals(
                mapped.array[: size // 2], np.frombuffer(mapped_content, "u1")[: size // 2]
            )

    @pytest.mark.parametrize(("threads", "times"), [(4, 1), (12, 4)])
    def test_a_tiny_budget_holds_with_many_threads(
        self,
        open_mapped: Callable[..., MappedSource],
        mapped_content: bytes,
        threads: int,
        times: int,
    ) -> None:
        """The budget is ``times`` the least that quire accepts for this source."""
        with pytest.raises(quire.BudgetError) as refused:
            open_mapped(budget=1, granule=_core.page_bytes())
        found = re.search(r"at least (\d+) bytes", str(refused.value))
        assert found, str(refused.value)
        budget = times * int(found[1])
        mapped = open_mapped(budget=budget, granule=_core.page_bytes())
        model, seed = np.frombuffer(mapped_content, "u1"), new_seed()

        def touch(number: int) -> None:
            for offset, length in random_ranges(len(model), 6, seed + number):
                window = slice(offset, offset + min(length, 20_000))
                assert equals(mapped.array[window], model[window]), window

        with ThreadPoolExecutor(threads) as pool:
            touches = [pool.submit(touch, number) for number in range(threads)]
            slow = wait(touches, PROGRESS_LIMIT_S).not_done
            if slow:
                mapped.mapping.set_budget(None)  # ends the test rather than the whole run
        assert not slow, f"no progress: {mapped.mapping.statistics()}"
        for done in touches:
            done.result()
        statistics = mapped.mapping.statistics()
        assert statistics.budget_bytes == budget
        assert 0 < statistics.peak_resident_bytes <= budget
        assert statistics.errors == 0

    def test_close_waits_for_no_view_and_refuses(self, mapped: MappedSource) -> None:
        """Closing is refused while views live, and then lets the addresses go."""
        mapping, address = mapped.mapping, mapped.mapping.address
        view = memoryview(mapping)
        with pytest.raises(BufferError, match="view"):
            mapping.close()
        assert not mapping.closed
        assert mapped.array[0] == view[0]
        mapped.drop_array()
        with pytest.raises(BufferError, match="view"):
            mapping.close()
        view.release()
        assert is_mapped(address)
        mapping.close()
        mapping.close()
        assert not is_mapped(address)
        with pytest.raises(quire.ClosedError):
            _ = mapping.array
        with pytest.raises(BufferError, match="closed"):
            memoryview(mapping)

    def test_python_cannot_write(self, mapped: MappedSource, mapped_content: bytes) -> None:
        """Neither numpy nor the buffer protocol gives a way to write."""
        array = mapped.array
        assert not array.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            array[5] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
        buffer = ctypes.create_string_buffer(200)
        get_buffer = ctypes.pythonapi.PyObject_GetBuffer
        with pytest.raises(BufferError, match='mode "r"'):
            get_buffer(ctypes.py_object(mapped.mapping), buffer, PYBUF_WRITABLE)
        assert array[5] == mapped_content[5]
        assert mapped.mapping.failed is None

    def test_a_write_of_c_code_raises(self, mapped: MappedSource) -> None:
        """Code that ignores the flags is told, and the mapping is failed."""
        target = mapped.mapping.address + 4096 + 17
        with pytest.raises(quire.ProtectionError, match='mode "r"') as caught:
            write_byte(target)
        assert caught.value.offset == 4096 + 17
        assert caught.value.source == mapped.mapping.source
        assert isinstance(mapped.mapping.failed, quire.ProtectionError)
        with pytest.raises(quire.ProtectionError):
            write_byte(target + 64)

    def test_system_calls_on_cold_pages(
        self, mapped: MappedSource, mapped_content: bytes, tmp_path: Path
    ) -> None:
        """They work, or say EFAULT and work once the pages were touched."""
        part = slice(50_000, 50_000 + 9000)
        with open(tmp_path / "copy", "wb", buffering=0) as file:
            if takes_system_calls(mapped.mapping.pmap):
                assert file.write(mapped.array[part].data) == 9000
            else:
                with pytest.raises(OSError, match="Bad address") as refused:
                    file.write(mapped.array[part].data)
                assert refused.value.errno == errno.EFAULT
                assert mapped.array[part].sum() > 0
                assert file.write(mapped.array[part].data) == 9000
        assert (tmp_path / "copy").read_bytes() == mapped_content[part]

    def test_a_forked_child_reads_the_same(
        self, mapped: MappedSource, mapped_content: bytes
    ) -> None:
        """A child of fork(2) reads what its parent reads; the parent is unharmed."""
        model = np.frombuffer(mapped_content, "u1")
        array = mapped.array
        assert array[7] == model[7]

        def compare() -> None:
            assert array[7] == model[7]
            assert equals(array, model)

        assert children.in_fork(compare) == ""
        assert equals(array, model)
        assert mapped.mapping.failed is None

    def test_an_empty_source_maps(self, pmap: str, tmp_path: Path) -> None:
        """No bytes are an array of no elements."""
        (tmp_path / "empty").mkdir()
        with quire.open(self.make_source(b"", tmp_path / "empty"), dtype="u1", pmap=pmap) as empty:
            assert empty.array.shape == (0,)
            assert bytes(memoryview(empty)) == b""


def write_byte(address: int) -> None:
    """Stores a byte as C code that ignores flags would; the loop lets the exception arrive."""
    ctypes.memset(address, 1, 1)
    for _ in range(10):
        pass
