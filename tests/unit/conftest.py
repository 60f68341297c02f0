import pytest


@pytest.fixture(autouse=True)
def _tidy(no_mapping_left: None) -> None:
    """Every unit test ends its mappings."""
