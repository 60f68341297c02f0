"""The pmap ladder as found here is what the kernel allows, and says why when it is not."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest

import quire
from quire import _core
from quire.testing.pmaps import working_pmaps

LADDER = ["uffd", "inline"]
SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}[os.uname().machine]
UFFD_USER_MODE_ONLY = 1


def kernel_gives_userfaultfd(flags: int) -> bool:
    """Asks the kernel itself, by the bare system call."""
    descriptor = ctypes.CDLL(None).syscall(SYS_USERFAULTFD, flags | os.O_CLOEXEC)
    if descriptor >= 0:
        os.close(descriptor)
    return bool(descriptor >= 0)


def test_what_the_kernel_allows_works() -> None:
    allowed = [("uffd", kernel_gives_userfaultfd(0))]
    allowed += [("inline", kernel_gives_userfaultfd(UFFD_USER_MODE_ONLY))]
    assert working_pmaps() == [name for name, works in allowed if works]


def test_root_has_both_and_everybody_has_one() -> None:
    expected = LADDER if os.geteuid() == 0 else ["inline"]
    assert set(working_pmaps()) >= set(expected)


def test_the_ladder_explains_itself() -> None:
    ladder = _core.probe()
    assert [rung["name"] for rung in ladder] == LADDER
    assert [rung["name"] for rung in ladder if rung["default"]] == working_pmaps()[:1]
    for rung in ladder:
        assert rung["reason"]
        assert rung["pointer"] is True
        assert bool(rung["remedy"]) is not rung["works"]


def test_a_pmap_that_does_not_work_is_refused_with_its_reason(rows_file: Path) -> None:
    for rung in _core.probe():
        if not rung["works"]:
            with pytest.raises(quire.PmapError) as refused:
                quire.open(rows_file, pmap=str(rung["name"]))
            assert str(rung["remedy"]) in str(refused.value)
    with pytest.raises(quire.PmapError, match=r"no pmap .mmu.*uffd, inline"):
        quire.open(rows_file, pmap="mmu")


def test_both_at_once(rows: np.ndarray, rows_file: Path) -> None:
    mappings = [quire.open(rows_file, pmap=pmap) for pmap in working_pmaps() * 2]
    for mapping in mappings:
        with mapping:
            assert np.array_equal(mapping.array, rows)
