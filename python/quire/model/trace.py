"""Every step of the machine as data: what a walk read, why a fault came, which frame it took."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Event", "Trace"]

Value = int | str | bool | None


@dataclass(frozen=True)
class Event:
    """One step: its kind and what there is to know of it."""

    kind: str
    facts: dict[str, Value]

    def __str__(self) -> str:
        return f"{self.kind:<10} " + " ".join(
            f"{name}={_shown(name, value)}" for name, value in self.facts.items()
        )


@dataclass
class Trace:
    """The events since it was switched on; off, it costs one test for each step."""

    on: bool = False
    events: list[Event] = field(default_factory=list)

    def add(self, kind: str, **facts: Value) -> None:
        """Notes one step."""
        if self.on:
            self.events.append(Event(kind, facts))

    def take(self) -> list[Event]:
        """The events so far, which are then forgotten."""
        taken, self.events = self.events, []
        return taken


_HEXADECIMAL = {"address", "start", "end", "physical", "entry", "page"}


def _shown(name: str, value: Value) -> str:
    return f"{value:#x}" if name in _HEXADECIMAL and isinstance(value, int) else str(value)
