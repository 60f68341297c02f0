"""Figures and targets of a topic, and how they are shown and kept."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from bench.timing import median

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class Context:
    """What a topic is told: the data folder, rounds, the seed, and where to build things."""

    data: str
    out: str
    rounds: int
    seed: int


@dataclass(frozen=True)
class Figure:
    """One measured quantity: its unit, and the value of each round."""

    name: str
    unit: str
    values: list[float]

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return median(self.values)


@dataclass(frozen=True)
class Target:
    """What was promised: `measured` is to be at least, or at most, `limit`."""

    name: str
    limit: float
    measured: float
    at_least: bool
    unit: str

    @property
    def met(self) -> bool:
        """Whether the promise holds.

        >>> Target("speed", 2.0, 3.0, True, " times").met
        True
        """
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def cells(self) -> tuple[str, str, str, str]:
        """Name, target, measured and verdict as text."""
        sign = "≥" if self.at_least else "≤"
        wanted = f"{sign} {self.limit:g}{self.unit}"
        return self.name, wanted, number(self.measured) + self.unit, "yes" if self.met else "NO"


@dataclass
class Topic:
    """What one benchmark file found. `checks` says which answers were compared."""

    name: str
    figures: list[Figure] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, times: dict[str, list[float]], unit: str, scale: float, what: str) -> None:
        """Adds figures `WHAT: contender`, the times multiplied by `scale`."""
        for name, values in times.items():
            scaled = [value * scale for value in values]
            self.figures.append(Figure(f"{what}: {name}", unit, scaled))

    def want(
        self, name: str, measured: float, limit: float, *, at_least: bool, unit: str = " times"
    ) -> None:
        """Adds a target."""
        self.targets.append(Target(name, limit, measured, at_least, unit))


def require(equal: bool, what: str) -> None:
    """Ends the benchmark with `RuntimeError` when an answer is wrong: its time means nothing."""
    if not equal:
        raise RuntimeError(f"{what}: not equal to the plain file's")


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """How many times longer `slow` takes than `fast`, by medians."""
    return median(times[slow]) / median(times[fast])


def topic_main(run: Callable[[Context], Topic]) -> None:
    """A topic as a program: reads the context as JSON from its argument, prints its topic."""
    topic = run(Context(**json.loads(sys.argv[1])))
    print(json.dumps(asdict(topic)))


def topic_from(found: dict[str, Any]) -> Topic:
    """The topic that `topic_main` printed."""
    figures = [Figure(**one) for one in found["figures"]]
    targets = [Target(**one) for one in found["targets"]]
    return Topic(found["name"], figures, targets, found["checks"], found["notes"])


def number(value: float) -> str:
    """Three digits that count, never with an exponent.

    >>> number(0.01234), number(3.14159), number(31415.9)
    ('0.0123', '3.14', '31,416')
    """
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    shown = []
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        shown.append(f"| {' | '.join(cells)} |")
    return "\n".join(shown)


def figure_table(topic: Topic) -> str:
    """Medians of a topic, with the least and most of the rounds."""
    rows = [
        (
            one.name,
            f"{number(one.median)} {one.unit}",
            f"{number(min(one.values))}..{number(max(one.values))}",
        )
        for one in topic.figures
    ]
    return table(("", "median", "range"), rows)


def target_table(topics: Sequence[Topic]) -> str:
    """Every target of every topic: target, measured, met?"""
    rows = [target.cells() for topic in topics for target in topic.targets]
    return table(("", "target", "measured", "met?"), rows)


def write_json(path: Path, topics: Sequence[Topic], about: dict[str, Any]) -> None:
    """Everything measured, by round, with what it was measured on."""
    text = json.dumps({"about": about, "topics": [asdict(topic) for topic in topics]}, indent=1)
    path.write_text(text + "\n")


def record(readme: Path, about: str, topics: Sequence[Topic]) -> None:
    """Puts what was measured under the heading `## Measured`, the last one of the file."""
    before, heading, _ = readme.read_text().partition("## Measured\n")
    parts = [before + heading, *(f"- {line}" for line in about.splitlines())]
    parts += ["", target_table(topics)]
    for topic in topics:
        parts += ["", f"### {topic.name}", "", figure_table(topic), ""]
        parts += [f"- {line}" for line in topic.checks + topic.notes]
    readme.write_text("\n".join(parts) + "\n")
