"""When a remote read is tried again: obstore's ``retry_config``, with defaults for a page fault.

A thread waits in the middle of an instruction while its page is fetched, and a mapping has a
timeout of its own, so the defaults give up sooner than obstore's (10 retries, 3 minutes).
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from quire.errors import SourceError

__all__ = ["RetryPolicy", "seconds"]

UNITS_S = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0}


def seconds(value: object, name: str) -> float:
    """A duration in seconds from a number, a ``timedelta`` or words as ``"1m 500ms"``.

    Raises:
        quire.SourceError: it is none of these; ``name`` is the option the message names.

    >>> seconds("1m 500ms", "timeout"), seconds(timedelta(seconds=2), "timeout")
    (60.5, 2.0)
    """
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
        return float(value)
    words = re.findall(r"([0-9.]+)\s*([a-z]+)\s*", value) if isinstance(value, str) else []
    if words and all(unit in UNITS_S for _, unit in words):
        return sum(float(number) * UNITS_S[unit] for number, unit in words)
    raise SourceError(
        f"{name}={value!r} is not a duration: give seconds, a timedelta, or words as '30s'"
    )


@dataclass(frozen=True)
class RetryPolicy:
    """How often, and after which waits, a request that may yet succeed is tried again."""

    max_retries: int = 3
    init_backoff_s: float = 0.1
    max_backoff_s: float = 15.0
    base: float = 2.0
    retry_timeout_s: float = 30.0

    @classmethod
    def from_config(cls, config: object) -> RetryPolicy:
        """The policy of obstore's ``retry_config`` dict; missing keys keep the defaults.

        Raises:
            quire.SourceError: an unknown key or a value of the wrong type.

        >>> RetryPolicy.from_config({"max_retries": 0}).max_retries
        0
        """
        if config is None:
            return cls()
        known = {"max_retries", "retry_timeout", "backoff"}
        backoff = config.get("backoff") or {} if isinstance(config, Mapping) else None
        if not isinstance(config, Mapping) or not isinstance(backoff, Mapping):
            raise SourceError(f"retry_config={config!r} must be a dict as obstore's RetryConfig")
        unknown = {*config} - known | {*backoff} - {"init_backoff", "max_backoff", "base"}
        if unknown:
            raise SourceError(
                f"retry_config has no {', '.join(sorted(unknown))}: its keys are max_retries, "
                "retry_timeout and backoff (a dict of init_backoff, max_backoff, base)"
            )
        given: dict[str, Any] = {}
        if "max_retries" in config:
            given["max_retries"] = int(config["max_retries"])
        if "base" in backoff:
            given["base"] = float(backoff["base"])
        for source, key in (
            (config, "retry_timeout"),
            (backoff, "init_backoff"),
            (backoff, "max_backoff"),
        ):
            if key in source:
                given[f"{key}_s"] = seconds(source[key], key)
        return cls(**given)

    def waits_s(self) -> Iterator[float]:
        """The waits before the retries, in seconds; ends when the request is to be given up.

        Each is drawn between half and all of the exponential backoff, so that the many readers
        of a server that was overloaded do not all come back at once.
        """
        start = time.monotonic()
        backoff = self.init_backoff_s
        for _ in range(self.max_retries):
            wait = min(backoff, self.max_backoff_s) * random.uniform(0.5, 1.0)  # noqa: S311
            if time.monotonic() + wait > start + self.retry_timeout_s:
                return
            yield wait
            backoff *= self.base

    def as_obstore(self) -> dict[str, object]:
        """The same policy in obstore's spelling."""
        return {
            "max_retries": self.max_retries,
            "retry_timeout": timedelta(seconds=self.retry_timeout_s),
            "backoff": {
                "init_backoff": timedelta(seconds=self.init_backoff_s),
                "max_backoff": timedelta(seconds=self.max_backoff_s),
                "base": self.base,
            },
        }
