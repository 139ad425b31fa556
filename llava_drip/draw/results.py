"""Plots of training results: a metric against epochs, and against what an image costs.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), told apart with any colour vision; every curve has a
marker of its own, too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from llava_drip.files import whole

ENDINGS = (".png", ".svg", ".pdf")
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = "osD^vPX*"
LINES = ("-", "--", ":")
_LEAST_SPAN = 0.04  # of a percentage axis, as a share of 100: less would make noise look like a difference


@dataclass(frozen=True)
class Curve:
    """A metric over epochs; low and high, where there are several runs, bound the band around the mean."""

    label: str
    epochs: Sequence[int]
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Point:
    """A tower: billions of multiply-accumulates of an image, the metric, its range over runs, and what is written beside it."""

    label: str
    gmacs: float
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass
class Style:
    """A colour and a marker for each label, the same in every plot."""

    labels: list[str] = field(default_factory=list)

    def of(self, label: str) -> dict:
        if label not in self.labels:
            self.labels.append(label)
        i = self.labels.index(label)
        line = LINES[i // len(PALETTE) % len(LINES)]
        return {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)], "linestyle": line}


def draw_results(
    path: str | os.PathLike, title: str, curves: Sequence[Curve], points: Sequence[Point] = (), percent: bool = True
) -> None:
    """Both plots side by side; one alone where the other has nothing to show.

    Args:
        path: .png, .svg or .pdf; it appears complete or not at all.
        title: of the metric, e.g. "top-1 accuracy".
        percent: values are shares of 1, to be shown in percent.
    Raises:
        ValueError: another ending, or nothing to draw.
    """
    if not curves and not points:
        raise ValueError(f"{path}: nothing to draw")
    check_ending(path)
    panels = bool(curves) + bool(points)
    figure = Figure(figsize=(6.4 * panels, 4.6), dpi=125, layout="constrained")
    axes = iter(figure.subplots(1, panels, squeeze=False)[0])
    style = Style()
    if curves:
        draw_curves(next(axes), title, curves, percent, style)
    if points:
        draw_points(figure, next(axes), title, points, percent, style)
    save(figure, path)


def draw_curves(axes: Axes, title: str, curves: Sequence[Curve], percent: bool, style: Style) -> None:
    """The metric against epochs: a line a curve, a band where it is a mean."""
    scale = 100 if percent else 1
    last = max(epoch for curve in curves for epoch in curve.epochs)
    for i, curve in enumerate(curves):
        look = style.of(curve.label)
        every = max(1, len(curve.epochs) // 12)
        marked = (i % every, every)  # beside each other where curves run together
        values = [value * scale for value in curve.values]
        axes.plot(curve.epochs, values, **look, linewidth=1.8, markersize=5, markevery=marked, label=curve.label)
        if curve.low is not None and curve.high is not None:
            low, high = ([value * scale for value in bound] for bound in (curve.low, curve.high))
            axes.fill_between(curve.epochs, low, high, color=look["color"], alpha=0.18, linewidth=0)
    axes.set_xlim(0, last * 1.02 if last > 1 else 2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    bounds = [value for curve in curves for value in (*curve.values, *(curve.low or ()), *(curve.high or ()))]
    _finish(axes, title, bounds, percent)
    axes.legend(fontsize=9, frameon=False, loc="best")


def draw_points(figure: Figure, axes: Axes, title: str, points: Sequence[Point], percent: bool, style: Style) -> None:
    """The metric against GMACs of an image: a marker a tower, its label and note beside it, a bar where it is a mean."""
    scale = 100 if percent else 1
    for point in points:
        look = style.of(point.label) | {"linestyle": "none"}
        bar = None
        if point.low is not None and point.high is not None:
            bar = [[(point.value - point.low) * scale], [(point.high - point.value) * scale]]
        axes.errorbar([point.gmacs], [point.value * scale], yerr=bar, **look, markersize=9, capsize=3)
    axes.set_xlim(0, max(point.gmacs for point in points) * 1.12)
    axes.set_xlabel("GMACs of an image ($10^9$ multiply-accumulates, at its mean tokens)")
    bounds = [value for point in points for value in (point.value, point.low, point.high) if value is not None]
    _finish(axes, title, bounds, percent)
    words = [f"{point.label}\n{point.note}" if point.note else point.label for point in points]
    places = [(point.gmacs, point.value * scale) for point in points]
    _annotate(figure, axes, list(zip(places, words, (style.of(point.label)["color"] for point in points), strict=True)))


def _finish(axes: Axes, title: str, values: Sequence[float], percent: bool) -> None:
    """Axis of the metric: the values with room around them; percentages never beyond 0 and 100, nor a span of next to nothing."""
    low, high = min(values), max(values)
    if percent:
        missing = max(0.0, _LEAST_SPAN - (high - low)) / 2
        low, high = low - missing, high + missing
        room = 0.08 * (high - low)
        axes.set_ylim(100 * max(-0.005, low - room), 100 * min(1.005, high + room))
    else:
        room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room)
    axes.set_ylabel(f"{title} (%)" if percent else title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _annotate(figure: Figure, axes: Axes, marks: Sequence[tuple[tuple[float, float], str, str]]) -> None:
    """Writes beside each marker, (its place, a text, its colour), where the text covers least of markers and other texts and
    stays within the axes. A text that has to stand apart gets a line to its marker."""
    figure.draw_without_rendering()  # the layout settles where the axes are
    renderer, frame = FigureCanvasAgg(figure).get_renderer(), axes.get_window_extent().extents
    pixels = [axes.transData.transform(place) for place, *_ in marks]
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in pixels]
    for place, text, colour in marks:
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 6}
        style = {"fontsize": 8.5, "linespacing": 1.15, "zorder": 2, "arrowprops": line}
        note = axes.annotate(text, place, (0, 0), textcoords="offset points", **style)
        note.set_in_layout(False)

        def stand(where: tuple, note=note) -> tuple[float, float, float, float]:
            note.set(position=where[:2], ha=where[2], va=where[3])
            note.update_positions(renderer)
            return tuple(Text.get_window_extent(note, renderer).extents)  # without the line

        def cost(where: tuple, stand=stand) -> float:
            box = stand(where)
            return sum(_overlap(box, other) for other in taken) + _overlap(box, box) - _overlap(box, frame)

        best = min(_BESIDE, key=cost)
        taken.append(stand(best))
        note.arrow_patch.set_visible(abs(best[1]) > 20)


# Where a text may stand: offset in points, horizontal and vertical alignment. The first is taken where all are free.
_BESIDE = (
    *((9, 0, "left", "center"), (-9, 0, "right", "center"), (0, 9, "center", "bottom"), (0, -9, "center", "top")),
    *((x, y, side, edge) for y, edge in ((7, "bottom"), (-7, "top")) for x, side in ((7, "left"), (-7, "right"))),
    *((0, far, "center", edge) for step in (36, 63, 90) for far, edge in ((step, "bottom"), (-step, "top"))),
)


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> float:
    """Area that two rectangles (x0, y0, x1, y1) share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def check_ending(path: str | os.PathLike) -> None:
    """ValueError for a file name that names no format of a plot."""
    if Path(path).suffix not in ENDINGS:
        raise ValueError(f"{path}: a plot's name must end in {', '.join(ENDINGS)}")


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a figure; the file appears complete or not at all."""
    with whole(path) as partial:
        figure.savefig(partial, format=Path(path).suffix[1:])
