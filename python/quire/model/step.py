"""What a session answers to one line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quire.model.errors import ModelError

if TYPE_CHECKING:
    from quire.model.trace import Event, Value

__all__ = ["SessionError", "Step"]


class SessionError(ModelError, ValueError):
    """A line that cannot be understood."""


@dataclass(frozen=True)
class Step:
    """What came of one line: its events in order, and the answer or the error."""

    line: str
    events: list[Event] = field(default_factory=list)
    result: str = ""
    error: str | None = None

    def as_json(self) -> dict[str, object]:
        """As one object."""
        events: list[dict[str, Value]] = [{"event": e.kind, **e.facts} for e in self.events]
        return {"line": self.line, "events": events, "result": self.result, "error": self.error}

    def __str__(self) -> str:
        lines = [f"> {self.line}", *(f"    {event}" for event in self.events)]
        lines += [f"  {line}" for line in (self.error or self.result).splitlines()]
        return "\n".join(lines)
