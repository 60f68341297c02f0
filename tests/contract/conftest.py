"""What the contract tests share. They run as root and again as an ordinary user."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from quire.testing.pmaps import working_pmaps


@pytest.fixture(params=working_pmaps())
def pmap(request: pytest.FixtureRequest) -> str:
    """Every pmap that works here; `test_pmaps.py` makes sure that none is missing."""
    return str(request.param)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A test that skips itself here has tested nothing: it fails."""
    report = yield
    if report.skipped and "contract" in item.path.parts:
        report.outcome = "failed"
        report.longrepr = f"skipped: {report.longrepr}"
    return report
