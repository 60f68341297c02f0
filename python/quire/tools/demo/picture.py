"""The picture of one run: `python -m quire.tools.demo.picture ORDER.json`.

Keys of the order: watch (the `.npz` of `watch.py`), phases (name, begin, end in seconds of the
monotonic clock), began_s, array_bytes, budget_bytes, slack_bytes, title, picture (the PNG file).

Three panels share the time axis: which parts of the array were resident, memory against the
budget, and what had come over the wire.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from quire.tools.demo import messages

MIB = 1 << 20
COLUMNS = 600
LETTER_PART = 0.008
INK, MUTED, FILL, LINE, ALARM = "#1f2933", "#7b8794", "#9cc3e6", "#1d5b94", "#c0392b"


def draw(order: dict[str, Any]) -> dict[str, Any]:
    """Draws the PNG and says where it is."""
    plt.switch_backend("Agg")
    with np.load(order["watch"]) as loaded:
        watch = {name: loaded[name] for name in loaded.files}
    time_s = watch["time_s"] - order["began_s"]
    plt.rcParams.update(
        {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED}
    )
    figure, panels = plt.subplots(
        3, 1, sharex=True, figsize=(11, 8.5), height_ratios=(2.2, 2, 1), layout="constrained"
    )
    _residency(figure, panels[0], time_s, watch["bands"], order)
    _memory(panels[1], time_s, watch, order)
    _fetched(panels[2], time_s, watch["bytes_fetched"] / MIB)
    _phases(panels, order)
    figure.suptitle(order["title"], fontsize=13, fontweight="bold")
    figure.savefig(order["picture"], dpi=120)
    return {"picture": order["picture"]}


def _residency(figure: Any, panel: Any, time_s: Any, bands: Any, order: dict[str, Any]) -> None:
    grid = np.linspace(time_s[0], time_s[-1], COLUMNS)
    nearest = np.clip(np.searchsorted(time_s, grid), 0, len(time_s) - 1)
    image = panel.imshow(
        bands[nearest].T,
        aspect="auto",
        origin="lower",
        cmap="Blues",
        vmin=0,
        vmax=1,
        interpolation="nearest",
        extent=(time_s[0], time_s[-1], 0, order["array_bytes"] / MIB),
    )
    panel.set_ylabel("position in the array, MiB")
    figure.colorbar(image, ax=panel, label="part that is resident", pad=0.01, aspect=18)


def _memory(panel: Any, time_s: Any, watch: dict[str, Any], order: dict[str, Any]) -> None:
    budget, slack = order["budget_bytes"] / MIB, order["slack_bytes"] / MIB
    resident, growth = watch["resident_bytes"] / MIB, watch["growth_bytes"] / MIB
    panel.fill_between(time_s, resident, color=FILL, label="quire's pages and buffers")
    panel.plot(time_s, growth, color=LINE, linewidth=1.2, label="growth of the whole process")
    panel.axhline(budget, color=ALARM, linestyle="--", label=f"budget, {budget:.0f} MiB")
    panel.axhline(
        budget + slack, color=MUTED, linestyle=":", label=f"most it may grow, +{slack:.0f} MiB"
    )
    panel.set_ylim(0, max(budget + slack, growth.max()) * 1.3)
    panel.set_ylabel("memory, MiB")
    panel.legend(loc="upper center", ncols=4, fontsize=9, frameon=False)


def _fetched(panel: Any, time_s: Any, fetched: Any) -> None:
    panel.plot(time_s, fetched, color=LINE, linewidth=1.5)
    panel.set_ylim(0, max(float(fetched[-1]) * 1.15, 1))
    panel.set_ylabel("fetched from the\nsource, MiB")
    panel.set_xlabel("time since open, s")
    panel.annotate(
        f"{fetched[-1]:,.0f} MiB",
        (time_s[-1], fetched[-1]),
        xytext=(-6, 4),
        textcoords="offset points",
        ha="right",
        fontsize=9,
    )


def _phases(panels: Any, order: dict[str, Any]) -> None:
    """A thin line through all panels where each kind of work begins, its name above."""
    began, last = order["began_s"], order["phases"][-1][2]
    for name, start, end in order["phases"]:
        for panel in panels:
            panel.axvline(start - began, color=MUTED, linewidth=0.6)
        narrow = (end - start) / (last - began) < LETTER_PART * len(name)
        panels[0].annotate(
            name,
            ((start + end) / 2 - began, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 16 if narrow else 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    panels[0].set_xlim(0, last - began)


if __name__ == "__main__":
    sys.exit(messages.answer(sys.argv[1], draw))
