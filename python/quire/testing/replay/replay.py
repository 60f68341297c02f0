"""Replaying rows on the model or on the kernel, and counting what agreed."""

from __future__ import annotations

import importlib
import os
import platform
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.model import GEOMETRIES, Machine
from quire.testing.replay.model_world import ModelWorld
from quire.testing.replay.rows import same

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from quire.testing.replay.rows import Outcome, Row

__all__ = ["Setting", "Total", "outcomes", "replay"]


@dataclass(frozen=True)
class Setting:
    """On what rows are replayed."""

    on: str = "model"
    frames: int | None = None
    tlb: int = 64
    geometry: str = "x86-64"
    checked: bool = False

    def machine(self, row: Row) -> Machine:
        """A fresh machine of this kind, with the pool of huge pages that the row is about."""
        machine = Machine(
            GEOMETRIES[self.geometry],
            frames=self.frames,
            swap=0 if self.frames is None else None,
            tlb=self.tlb,
            huge_pages=row.huge_pages,
        )
        machine.pageout.acts_ample = True  # rows were recorded with memory to spare
        return machine


@dataclass
class Total:
    """What came of a replay."""

    rows: int = 0
    ops: int = 0
    mismatches: list[dict[str, Any]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        """As one object."""
        return {
            "rows": self.rows,
            "ops": self.ops,
            "mismatches": self.mismatches,
            "skipped": dict(self.skipped),
        }


def replay(rows: Iterable[Row], setting: Setting) -> Total:
    """Replays rows; each stops at its first mismatch, for later operations depend on it."""
    total = Total()
    for row in rows:
        reason = _not_applicable(row, setting)
        if reason is not None:
            total.skipped[reason] += 1
            continue
        total.rows += not row.again
        end = len(row.ops) if row.advisory_from is None else row.advisory_from
        if end < len(row.ops):
            total.skipped["operations after advisory_from"] += len(row.ops) - end
        for index, given in enumerate(outcomes(row, setting, end)):
            total.ops += 1
            wanted = row.outcomes[index]
            if not same(wanted, given, residency=setting.frames is None):
                total.mismatches.append(
                    {
                        "row": row.name,
                        "index": index,
                        "op": row.ops[index],
                        "wanted": wanted,
                        "given": given,
                    }
                )
                break
    return total


def outcomes(row: Row, setting: Setting, end: int | None = None) -> Iterator[Outcome]:
    """The outcomes of a row's operations, one after the other."""
    if setting.on == "kernel":
        # Loaded here alone: the model runs where the kernel's side cannot even be imported.
        kernel_world = importlib.import_module("quire.testing.replay.kernel_world")
        with kernel_world.KernelWorld(row) as world:
            for op in row.ops[:end]:
                yield world.do(op)
        return
    model = ModelWorld(row, setting.machine(row), checked=setting.checked)
    for op in row.ops[:end]:
        yield model.do(op)


_MODELLED = {"overcommit": "0", "pku": "false"}
"""The environment of the model, in the words of the tags `env:KEY=VALUE`.

Its pool of huge pages is as large as a row wants it.
"""
_MODELLED_RELEASE = (6, 18)


def _not_applicable(row: Row, setting: Setting) -> str | None:
    """The first tag by which a row is about another system than the one it is to run on."""
    on_kernel = setting.on == "kernel"
    release = _release(platform.release()) if on_kernel else _MODELLED_RELEASE
    pool = {"nr_hugepages": str(row.huge_pages)}
    environment = _kernel_environment() if on_kernel else {**_MODELLED, **pool}
    machine = "x86-64" if on_kernel else setting.geometry
    for tag in row.tags:
        kind, _, value = tag.partition(":")
        name, _, wanted = value.partition("=")
        if (
            (kind == "arch" and not machine.startswith(value))
            or (kind == "env" and environment.get(name) != wanted)
            or (tag.startswith("version>=") and release < _release(tag))
            or (tag == "privileged" and on_kernel and os.geteuid() != 0)
        ):
            return tag
    return None


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _kernel_environment() -> dict[str, str]:
    lines = Path("/proc/meminfo").read_text().splitlines()
    pool = {line.split(":")[0]: int(line.split()[1]) for line in lines if line[:4] == "Huge"}
    return {
        "nr_hugepages": str(pool["HugePages_Free"] - pool["HugePages_Rsvd"]),
        "overcommit": Path("/proc/sys/vm/overcommit_memory").read_text().strip(),
        "pku": str(" ospke " in Path("/proc/cpuinfo").read_text()).lower(),
    }
