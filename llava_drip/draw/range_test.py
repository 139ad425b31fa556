"""The plot of a learning-rate range test: losses against rates, suggestions marked."""

from __future__ import annotations

import math
import os

import numpy as np
from matplotlib.figure import Figure

from llava_drip.draw.results import check_ending, save
from llava_drip.training.range_test import RangeTest


def draw(result: RangeTest, path: str | os.PathLike, title: str = "") -> None:
    """Losses against rates, logarithmic: single losses faint, the average bold, the suggestions marked with their values.

    path: .png, .svg or .pdf; it appears complete or not at all. title: tower and data, say. ValueError: another ending.
    """
    check_ending(path)
    figure = Figure(figsize=(7.2, 4.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(result.lrs, result.losses, color="0.72", linewidth=0.9, label="loss of a step")
    axes.plot(
        result.centres,
        result.smoothed,
        color="#0072B2",
        linewidth=2,
        label=f"exponential average, beta {result.beta:g}",
    )
    marks = [  # Okabe and Ito's colours, and a shape each: readable without colour
        ("steepest descent", result.steepest, "#D55E00", "o"),
        ("tenth of the minimum's rate", result.tenth_of_minimum, "#009E73", "s"),
    ]
    for name, rate, colour, marker in marks:
        if rate is not None:
            height = float(np.interp(np.log(rate), np.log(result.centres), result.smoothed))
            axes.axvline(rate, color=colour, linewidth=1, linestyle=":")
            axes.plot([rate], [height], marker, color=colour, markersize=8, zorder=3, label=f"{name}: {rate:.2e}")
    if result.diverges is not None:
        axes.axvspan(result.diverges, result.lrs[-1], color="0.9", label=f"diverges: {result.diverges:.2e}", zorder=0)
    axes.set_ylim(*_limits(result))
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, frameon=False, loc="lower left")
    save(figure, path)


def _limits(result: RangeTest) -> tuple[float, float]:
    """Of the loss's axis: the part before divergence with room around it, so that an explosion does not flatten the rest."""
    end = len(result.lrs) if result.diverges is None else result.lrs.index(result.diverges)
    finite = [value for value in result.smoothed[: max(end, 1)] if math.isfinite(value)]
    low, high = min(finite), max(finite)
    room = 0.35 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room
