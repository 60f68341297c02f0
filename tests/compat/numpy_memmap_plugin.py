"""A pytest plugin: has `numpy.memmap` and what makes one be quire's, before tests import them."""

import numpy as np
import numpy.lib.format
import pytest

import quire.compat.memmap as ours

np.memmap = ours.memmap
np.load = ours.load
numpy.lib.format.open_memmap = ours.open_memmap


def pytest_runtest_call(item: pytest.Function) -> None:
    """Fails a test that has numpy's own class."""
    imported = getattr(item.module, "memmap", ours.memmap)
    assert np.memmap is imported is ours.memmap
    assert np.load is ours.load
