"""The plot of a comparison: accuracy against tokens of an image, a point for each tower, with its spread over seeds."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from llava_drip.draw.results import MARKERS, PALETTE, check_ending, save

_TOGETHER = 0.12  # points closer than this, in doublings of tokens, stand side by side
_APART = 0.04  # by this much
_LEAST_SPAN = 4.0  # of the accuracy axis, in percent: less would make noise look like a difference


@dataclass(frozen=True)
class TokenPoint:
    """label: what the legend says; points of one label are joined by a line (budgets of one checkpoint). tokens: of an image,
    above 0. value: a share 0 .. 1, say. deviation: half the length of its bar, None for none."""

    label: str
    tokens: float
    value: float
    deviation: float | None = None


def draw_comparison(
    path: str | os.PathLike,
    title: str,
    points: Sequence[TokenPoint],
    reference: tuple[str, float] | None = None,
    percent: bool = True,
) -> None:
    """Args:
        path: .png, .svg or .pdf; it appears complete or not at all.
        title: of the metric, "top-1 accuracy" say.
        reference: a name and a value, drawn as a level line.
        percent: values are shares of 1, to be shown in percent.
    Raises:
        ValueError: another ending, or nothing to draw.
    """
    check_ending(path)
    if not points:
        raise ValueError(f"{path}: nothing to draw")
    labels = list(dict.fromkeys(point.label for point in points))
    figure = Figure(figsize=(9.6, max(4.8, 0.9 + 0.21 * len(labels))), dpi=125, layout="constrained")
    draw_token_points(figure.subplots(), title, points, reference, percent)
    save(figure, path)


def draw_token_points(
    axes: Axes,
    title: str,
    points: Sequence[TokenPoint],
    reference: tuple[str, float] | None = None,
    percent: bool = True,
) -> None:
    """draw_comparison, on given axes."""
    scale, unit = (100, " %") if percent else (1, "")
    places = side_by_side([point.tokens for point in points])
    for number, label in enumerate(dict.fromkeys(point.label for point in points)):
        mine = sorted((x, point) for x, point in zip(places, points, strict=True) if point.label == label)
        look = {**look_of(number), "linestyle": ":" if len(mine) > 1 else "none"}
        bars = [scale * (point.deviation or 0) for _, point in mine]
        values = [scale * point.value for _, point in mine]
        axes.errorbar(
            [x for x, _ in mine], values, yerr=bars, **look, markersize=6.5, linewidth=1, capsize=2.5, label=label
        )
    if reference is not None:
        axes.axhline(scale * reference[1], color="0.45", linewidth=1, linestyle="--", zorder=0)
        axes.annotate(
            f"{reference[0]}: {scale * reference[1]:.1f}{unit}",
            (0.005, scale * reference[1]),
            (0, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=8.5,
            color="0.35",
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(places) / 2**0.25, max(places) * 2**0.25)
    axes.set_xlabel("tokens of an image (logarithmic; equal numbers stand side by side)")
    axes.set_ylabel(f"{title} (%)" if percent else title)
    low, high = axes.get_ylim()
    if percent:
        missing = max(0.0, _LEAST_SPAN - (high - low)) / 2
        axes.set_ylim(low - missing, high + missing)
    else:
        axes.set_ylim(0, high)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def look_of(number: int) -> dict[str, str]:
    """Colour and marker, another pair for each of 64 labels."""
    return {
        "color": PALETTE[number % len(PALETTE)],
        "marker": MARKERS[(number + number // len(PALETTE)) % len(MARKERS)],
    }


def side_by_side(tokens: Sequence[float]) -> list[float]:
    """Where each point stands: at its tokens; those that would cover each other beside each other, around their middle."""
    order = sorted(range(len(tokens)), key=lambda i: (tokens[i], i))
    groups: list[list[int]] = []
    for i in order:
        if groups and math.log2(tokens[i]) - math.log2(tokens[groups[-1][0]]) < _TOGETHER:
            groups[-1].append(i)
        else:
            groups.append([i])
    places = [0.0] * len(tokens)
    for group in groups:
        middle = sum(math.log2(tokens[i]) for i in group) / len(group)
        for place, i in enumerate(sorted(group)):
            alone = len(group) == 1
            places[i] = tokens[i] if alone else 2 ** (middle + _APART * (place - (len(group) - 1) / 2))
    return places
