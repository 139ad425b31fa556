"""Plots of what answers cost: an API under load over time; first token and tokens a second of assistants side by side."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llava_drip.draw.results import PALETTE, check_ending, save


def draw_load(path: str | os.PathLike, series: dict, title: str = "") -> None:
    """Tokens a second, times to the first token, and resident memory over time, one above the other; phases are shaded.

    Args:
        path: .png, .svg or .pdf; it appears complete or not at all.
        series: {"phases": [{"name", "clients", "from", "to"}], "seconds", "tokens_per_second", "first_p50_ms", "first_p95_ms",
            "memory": [[second, MiB]]}.
    Raises:
        ValueError: another ending.
    """
    check_ending(path)
    figure = Figure(figsize=(9.6, 7.6), dpi=125, layout="constrained")
    speed, first, memory = figure.subplots(3, 1, sharex=True)
    speed.plot(series["seconds"], series["tokens_per_second"], color=PALETTE[0], linewidth=1.8)
    speed.set_ylabel("tokens a second")
    for name, colour, line in (("p50", PALETTE[0], "-"), ("p95", PALETTE[1], "--")):
        values = [math.nan if value is None else value for value in series[f"first_{name}_ms"]]
        first.plot(series["seconds"], values, color=colour, linestyle=line, linewidth=1.8, label=name)
    first.set_ylabel("first token (ms)")
    first.legend(fontsize=9, frameon=False)
    if series["memory"]:
        seconds, mib = zip(*series["memory"])
        memory.plot(seconds, mib, color=PALETTE[2], linewidth=1.8)
    memory.set_ylabel("memory of the server (MiB)")
    memory.set_xlabel("seconds")
    for axes in (speed, first, memory):
        for phase in series["phases"]:
            if phase["clients"] > 1:
                axes.axvspan(phase["from"], phase["to"], color="0.93", zorder=0)
        axes.set_ylim(bottom=0)
        _bare(axes)
    for phase in series["phases"]:
        words = f"{phase['name']}: {phase['clients']} client{'s' if phase['clients'] > 1 else ''}"
        place = ((phase["from"] + phase["to"]) / 2, 1.02)
        speed.annotate(words, place, xycoords=("data", "axes fraction"), ha="center", fontsize=8.5, color="0.3")
    if title:
        figure.suptitle(title, fontsize=11)
    save(figure, path)


@dataclass(frozen=True)
class Bar:
    """A case: its median and its range over rounds."""

    label: str
    value: float
    low: float
    high: float


def draw_bars(path: str | os.PathLike, panels: Sequence[tuple[str, Sequence[Bar]]]) -> None:
    """One panel for each (title, bars), side by side, whiskers for ranges, values written on. ValueError: another ending."""
    check_ending(path)
    figure = Figure(figsize=(4.6 * len(panels), 4.4), dpi=125, layout="constrained")
    for axes, (title, bars) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        spread = [[bar.value - bar.low for bar in bars], [bar.high - bar.value for bar in bars]]
        colours = [PALETTE[number % len(PALETTE)] for number in range(len(bars))]
        drawn = axes.bar(range(len(bars)), [bar.value for bar in bars], yerr=spread, color=colours, capsize=4)
        axes.bar_label(drawn, [_short(bar.value) for bar in bars], fontsize=9, label_type="center", color="white")
        axes.set_xticks(range(len(bars)), [bar.label for bar in bars], fontsize=9)
        axes.set_title(title, fontsize=10.5)
        axes.set_ylim(bottom=0)
        _bare(axes)
    save(figure, path)


def _bare(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _short(value: float) -> str:
    """Three figures, and no powers of ten."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"
