"""The plot of what was measured of boundaries: how well each tower's agree with true changes, and what that did for its task."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llava_drip.draw.results import MARKERS, PALETTE, check_ending, save


@dataclass(frozen=True)
class Scored:
    """Towers that differ in their seed only; one value a seed.

    Attributes:
        label: what is written beside its row. colour_by, shape_by: towers of the same word share a colour, a marker.
        f1, untrained: F1 of its boundaries after and before training. chance: of as many at random. task: its task's score.
    """

    label: str
    colour_by: str
    shape_by: str
    f1: Sequence[float]
    untrained: Sequence[float]
    chance: float
    task: Sequence[float]


def draw_boundary_scores(path: str | os.PathLike, towers: Sequence[Scored], title: str, metric: str) -> None:
    """Left: F1 of each tower, best first, with chance and the untrained tower. Right: the task's score against F1.

    path: .png, .svg or .pdf; it appears complete or not at all. metric: of the task.
    Raises:
        ValueError: another ending, or nothing to draw.
    """
    if not towers:
        raise ValueError(f"{path}: nothing to draw")
    check_ending(path)
    towers = sorted(towers, key=lambda tower: statistics.mean(tower.f1))
    figure = Figure(figsize=(13, max(4.6, 1.6 + 0.27 * len(towers))), dpi=125, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    colours, shapes = ({} for _ in range(2))
    for tower in reversed(towers):  # best first gets the first colour
        colours.setdefault(tower.colour_by, PALETTE[len(colours) % len(PALETTE)])
        shapes.setdefault(tower.shape_by, MARKERS[len(shapes) % len(MARKERS)])
    _draw_f1(left, towers, colours)
    _draw_task(right, towers, colours, shapes, metric)
    figure.suptitle(title, fontsize=11)
    save(figure, path)


def _draw_f1(axes: Axes, towers: Sequence[Scored], colours: dict[str, str]) -> None:
    for y, tower in enumerate(towers):
        colour, f1 = colours[tower.colour_by], statistics.mean(tower.f1)
        before = statistics.mean(tower.untrained)
        axes.plot([before, f1], [y, y], color=colour, linewidth=1.2, alpha=0.5, zorder=1)
        axes.plot([before], [y], "o", color=colour, markerfacecolor="white", markersize=6, zorder=2)
        axes.errorbar([f1], [y], xerr=_bar(tower.f1), fmt="o", color=colour, markersize=7, capsize=3, zorder=3)
        axes.plot([tower.chance], [y], "|", color="0.35", markersize=10, zorder=2)
    axes.set_yticks(range(len(towers)), [tower.label for tower in towers], fontsize=8.5)
    axes.set_ylim(-0.7, len(towers) - 0.3)
    axes.set_xlim(0, 1)
    axes.set_xlabel("F1 of boundaries against true changes, every image at the same number of tokens")
    marks = [
        axes.plot([], [], "o", color="0.3", label="trained (bar: range over seeds)")[0],
        axes.plot([], [], "o", color="0.3", markerfacecolor="white", label="untrained")[0],
        axes.plot([], [], "|", color="0.35", markersize=10, linestyle="none", label="as many at random")[0],
    ]
    axes.legend(handles=marks, fontsize=8.5, frameon=False, loc="lower right")
    _finish(axes)


def _draw_task(
    axes: Axes, towers: Sequence[Scored], colours: dict[str, str], shapes: dict[str, str], metric: str
) -> None:
    for tower in towers:
        look = {"color": colours[tower.colour_by], "fmt": shapes[tower.shape_by], "markersize": 7, "capsize": 2}
        x, y = statistics.mean(tower.f1), statistics.mean(tower.task)
        axes.errorbar([x], [y], xerr=_bar(tower.f1), yerr=_bar(tower.task), elinewidth=0.8, alpha=0.85, **look)
    for word, colour in colours.items():
        axes.plot([], [], "s", color=colour, linestyle="none", label=word)
    if len(shapes) > 1:
        for word, shape in shapes.items():
            axes.plot([], [], shape, color="0.4", markerfacecolor="white", linestyle="none", label=word)
    axes.legend(fontsize=8.5, frameon=False, loc="best")
    axes.set_xlabel("F1 of boundaries")
    axes.set_ylabel(f"task: {metric}")
    _finish(axes)


def _bar(values: Sequence[float]) -> list[list[float]]:
    """Range around the mean, as errorbar takes it."""
    mean = statistics.mean(values)
    return [[mean - min(values)], [max(values) - mean]]


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
