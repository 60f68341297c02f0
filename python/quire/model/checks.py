"""The order of errors, as data.

Which errno a call gives when several things are wrong at once is part of its contract: programs
probe for features that way. So each call keeps its checks in one table, in the kernel's order, and
the first that refuses decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from quire.model.errors import CallError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Check", "refuse_first"]

Request = TypeVar("Request")


class Check(NamedTuple, Generic[Request]):
    """One thing that can be wrong with a request."""

    errno: str
    says: str
    refuses: Callable[[Request], bool]


def refuse_first(checks: Sequence[Check[Request]], request: Request) -> None:
    """Raises `CallError` for the first check that refuses the request."""
    for check in checks:
        if check.refuses(request):
            raise CallError(check.errno, check.says)
