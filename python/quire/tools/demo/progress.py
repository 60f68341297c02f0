"""Progress bars on standard error, silent where that is no terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


class Bars:
    """The bars of one run, one below the other, between `with` and its end."""

    def __init__(self, *, quiet: bool | None = None) -> None:
        """`quiet` None: quiet unless standard error is a terminal."""
        self._progress = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty() if quiet is None else quiet,
        )
        self._tasks: dict[str, TaskID] = {}

    def update(self, name: str, done: int, total: int) -> None:
        """Sets how far the bar `name` is; the first call makes it."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._tasks[name], completed=done, total=total)

    def bar(self, name: str, total: int) -> Callable[[int], None]:
        """A function that sets how far the bar `name` is, of `total`."""
        self.update(name, 0, total)
        return lambda done: self.update(name, done, total)

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
