"""The report of a run: tables on a terminal, text elsewhere, one JSON object for programs."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text

from quire.tools.demo import features
from quire.tools.demo.settings import MIB, SLACK_BYTES, Data, Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from quire.tools.demo.check import Check

TEXT_CHARS = 88


@dataclass(frozen=True)
class Section:
    """A titled table."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def values_of(
    settings: Settings,
    data: Data,
    ours: dict[str, Any],
    plain: dict[str, Any],
    checks: Sequence[Check],
) -> dict[str, Any]:
    """Everything the run found out, for `--json`. Sizes in bytes, times in the unit of the name."""
    outcome, statistics, theirs = ours["outcome"], ours["statistics"], plain["outcome"]
    growth, allowed = ours["peak_rss_growth_bytes"], settings.budget_bytes + SLACK_BYTES
    packed, lines = data.packed_bytes, len(data.lines)
    return {
        "correct": all(one.passed for one in checks),
        "budget_held": growth <= allowed
        and statistics["peak_resident_bytes"] <= settings.budget_bytes,
        "source": data.source,
        "array_shape": ours["array"]["shape"],
        "array_dtype": ours["array"]["dtype"],
        "array_bytes": ours["array"]["bytes"],
        "rows": outcome["rows"],
        "row_bytes": outcome["row_bytes"],
        "text_lines": lines or None,
        "text_passes": features.pass_count(outcome["rows"], lines) if lines else None,
        "packed_bytes": packed,
        "compression_ratio": round((data.plain_bytes or 0) / packed, 2) if packed else None,
        "budget_bytes": settings.budget_bytes,
        "peak_resident_bytes": statistics["peak_resident_bytes"],
        "peak_rss_growth_bytes": growth,
        "rss_growth_allowed_bytes": allowed,
        "base_rss_bytes": ours["base_rss_bytes"],
        "pager_process_peak_rss_bytes": ours["pager_process_peak_rss_bytes"],
        "bytes_fetched": statistics["bytes_fetched"],
        "faults": statistics["faults"],
        "fault_us_p50": statistics["fault_ns_p50"] / 1e3,
        "fault_us_p99": statistics["fault_ns_p99"] / 1e3,
        "pmap": ours["pmap"],
        "granule_bytes": ours["granule_bytes"],
        "open_seconds": ours["open_seconds"],
        "scan": outcome["scan"],
        "lookup": outcome["lookup"],
        "hot_lookup": outcome["hot"],
        "plain_scan": theirs and theirs["scan"],
        "plain_lookup": theirs and theirs["lookup"],
        "plain_hot_lookup": theirs and theirs["hot"],
        "nearest_rows": outcome["nearest_rows"],
        "nearest_scores": outcome["nearest_scores"],
        "checked_against": plain["how"],
        "checks": [asdict(one) for one in checks],
        "statistics": statistics,
        "seconds": dict(data.seconds),
        "seed": settings.seed,
        "machine": machine(),
        "picture": None,
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def sections(values: dict[str, Any], settings: Settings, data: Data) -> list[Section]:
    """The report as tables, in the order in which they are shown."""
    found = [_data_section(values)]
    if data.lines:
        found.append(_answer_section(values, settings, data))
    found += [_time_section(values), _memory_section(values), _check_section(values)]
    return found


def _data_section(values: dict[str, Any]) -> Section:
    shape = " by ".join(f"{length:,}" for length in values["array_shape"])
    rows = [
        ("array", f"{shape} {values['array_dtype']}, {_mib(values['array_bytes'])}"),
        ("source", values["source"]),
    ]
    if values["text_lines"]:
        passes = values["text_passes"]
        again = f", used {passes} times (in windows of 1 to {passes} lines)" if passes > 1 else ""
        rows.append(("made from", f"{values['text_lines']:,} lines of Python sources{again}"))
    if values["packed_bytes"]:
        ratio = f"{values['compression_ratio']:.1f} times smaller"
        rows.append(("stored as", f"seekable zstd, {_mib(values['packed_bytes'])}, {ratio}"))
    rows.append(("mapped by", f"{values['pmap']}, granule {values['granule_bytes'] // 1024:,} KiB"))
    return Section("Data", ("", ""), rows)


def _answer_section(values: dict[str, Any], settings: Settings, data: Data) -> Section:
    rows = []
    found = zip(settings.queries, values["nearest_rows"], values["nearest_scores"], strict=True)
    for query, numbers, scores in found:
        for place, (number, score) in enumerate(zip(numbers, scores, strict=True)):
            text = features.row_text(data.lines, number)
            text = text if len(text) <= TEXT_CHARS else text[: TEXT_CHARS - 1] + "…"
            rows.append((query if place == 0 else "", f"{score:.2f}", text))
    return Section("Nearest lines", ("looked for", "cosine", "found"), rows)


def _time_section(values: dict[str, Any]) -> Section:
    kinds = [
        ("x @ q over the whole array", "scan", "plain_scan"),
        ("one row at random", "lookup", "plain_lookup"),
        ("one row of a hot window", "hot_lookup", "plain_hot_lookup"),
    ]
    rows = []
    for name, our_key, their_key in kinds:
        ours, theirs = values[our_key], values[their_key]
        plain = time_text(theirs["us_p50"]) if theirs else "not timed"
        quire = time_text(ours["us_p50"]), time_text(ours["us_p99"])
        rows.append((name, f"{ours['count']:,}", *quire, plain))
    columns = ("", "calls", "quire, median", "p99", "plain numpy in RAM")
    return Section("Time", columns, rows)


def time_text(spent_us: float) -> str:
    """A time in the unit that suits it.

    >>> time_text(0.72), time_text(4321.0), time_text(1_250_000.0)
    ('0.72 µs', '4.32 ms', '1.25 s')
    """
    for scale, unit in ((1e6, "s"), (1e3, "ms")):
        if spent_us >= scale:
            return f"{spent_us / scale:,.2f} {unit}"
    return f"{spent_us:,.2f} µs"


def _memory_section(values: dict[str, Any]) -> Section:
    faults = f"{values['faults']:,}"
    p50, p99 = values["fault_us_p50"], values["fault_us_p99"]
    rows = [
        ("budget", _mib(values["budget_bytes"])),
        ("peak of quire's pages and buffers", _mib(values["peak_resident_bytes"])),
        (
            "peak growth of the process",
            f"{_mib(values['peak_rss_growth_bytes'])} of "
            f"{_mib(values['rss_growth_allowed_bytes'])} allowed",
        ),
        ("fetched from the source", _mib(values["bytes_fetched"])),
        ("faults", f"{faults}: median {p50:,.1f} µs, p99 {p99:,.1f} µs"),
    ]
    if values["pager_process_peak_rss_bytes"]:
        pager = _mib(values["pager_process_peak_rss_bytes"])
        rows.insert(3, ("pager process (its interpreter included)", pager))
    return Section("Memory", ("", ""), rows)


def _check_section(values: dict[str, Any]) -> Section:
    rows = []
    for one in values["checks"]:
        verdict = "equal" if one["passed"] else "WRONG"
        rows.append((one["name"], f"{one['compared']:,}", verdict, one["detail"]))
    title = f"Checked against {values['checked_against']}"
    return Section(title, ("", "values", "", ""), rows)


def closing(values: dict[str, Any]) -> list[str]:
    """The last lines of the report: verdict, picture, time."""
    lines = []
    if not values["correct"]:
        wrong = [one["name"] for one in values["checks"] if not one["passed"]]
        lines.append(f"WRONG: {', '.join(wrong)} differ from plain numpy. Please report this.")
    else:
        lines.append("Every answer is right.")
    if not values["budget_held"]:
        lines.append("The budget did NOT hold. Please report this.")
    if values["picture"]:
        lines.append(f"Picture: {values['picture']}")
    lines.append(f"Took {values['seconds']['total']:.0f} s.")
    return lines


def as_json(values: dict[str, Any]) -> str:
    """One JSON object, one line."""
    return json.dumps(values)


def as_text(found: Sequence[Section]) -> str:
    """The tables as plain text, columns aligned."""
    lines: list[str] = []
    for section in found:
        lines += [section.title, "-" * len(section.title)]
        shown = [section.columns, *section.rows] if any(section.columns) else section.rows
        widths = [max(len(row[place]) for row in shown) for place in range(len(shown[0]))]
        for row in shown:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(cells).rstrip())
        lines.append("")
    return "\n".join(lines)


def show(found: Sequence[Section], console: Console) -> None:
    """The tables on a terminal."""
    for section in found:
        table = Table(title=f"\n{section.title}", title_justify="left", title_style="bold")
        table.show_header = any(section.columns)
        for column in section.columns:
            table.add_column(column, overflow="fold")
        for row in section.rows:
            table.add_row(*map(Text, row))
        console.print(table)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:,.1f} MiB"
