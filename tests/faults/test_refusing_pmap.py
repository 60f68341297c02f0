"""A memory file that takes no page any more, as where files may not be long (RLIMIT_FSIZE).

No touch waits for ever, each error is told, and what shows filler keeps the budget.
"""

from __future__ import annotations

import contextlib
import errno
import resource

import numpy as np
import pytest

import quire
from quire import _core
from quire.testing import children
from quire.testing.pmaps import working_pmaps

MIB = 1 << 20
SIZE = 16 * MIB
BUDGET = MIB
PMAPS = [pmap for pmap in working_pmaps() if pmap in ("guard", "mprotect")]


def touch_all(mapping: quire.Mapping) -> None:
    """Raises, at the next check of the interpreter, what the touches met."""
    mapping.array[::4096].sum()
    mapping.check()


def child_touches(pmap: str, mode: str) -> None:
    store = _core.open_memory(b"\1" * SIZE, "memory")
    given = {"budget": BUDGET, "granule": "16 KiB", "pmap": pmap, "mode": mode}
    with quire.open(store, dtype="u1", **given) as mapping:  # type: ignore[arg-type]
        assert mapping.array[: 2 * MIB].min() == 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        for _ in range(3):
            with pytest.raises(quire.PageIOError) as caught:
                touch_all(mapping)
            assert caught.value.errno == errno.EFBIG
            assert mapping.statistics().resident_bytes <= BUDGET
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        # The mapping stays failed: what was covered never shows zeros.
        with pytest.raises(quire.PageIOError):
            touch_all(mapping)
        seen: set[int] = set()
        for place in range(0, SIZE, 65536):
            try:
                seen.add(int(np.asarray(mapping.array[place : place + 1]).max()))
            except quire.PageIOError:
                continue
        assert seen <= {1, 255}, f"{seen}"
        assert mapping.failed is not None
        with contextlib.suppress(quire.SyncError, BufferError):
            mapping.close()


@pytest.mark.parametrize("mode", ["r", "c"])
@pytest.mark.parametrize("pmap", PMAPS)
def test_touches_end_and_keep_the_budget(pmap: str, mode: str) -> None:
    children.run(child_touches, pmap, mode, timeout_s=60).check()


if __name__ == "__main__":
    children.main()
