import pytest

import quire
from quire.store.abc import Store


def test_what_a_store_must_have():
    with pytest.raises(TypeError, match=r"label.*read_into.*size"):
        Store()


def test_defaults():
    class Least(Store):
        size = 0
        label = "least"

        def read_into(self, offset: int, buffer: memoryview) -> None:
            raise AssertionError

    store = Least()
    assert store.version is None
    assert store.close() is None
    assert quire.Store is Store
