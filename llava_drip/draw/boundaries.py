"""What towers decide about an image, side by side: boundary probabilities, and the segments of each token budget.

`reading.read_boundaries` asks a tower, `draw_boundaries` draws the answers of one or several towers about one image.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from llava_drip.draw.overlay import draw_segments, enlarge
from llava_drip.draw.reading import Cut, Reading
from llava_drip.draw.results import check_ending, save
from llava_drip.towers.scan import scan_order

Unpool = Literal["colour", "features"]

_COLOURS = colormaps["inferno"]  # dark where a boundary is improbable
_PANEL = 2.3  # inches


def draw_boundaries(
    labels: Sequence[str],
    readings: Sequence[Reading],
    path: str | os.PathLike,
    title: str = "",
    unpool: Unpool | None = None,
) -> None:
    """Write a figure: a row a tower with its image, its boundary probabilities, and its segments at each budget.

    Args:
        labels: one a tower, beside its row; of any number of lines.
        readings: of one image by each tower, at the same budgets.
        path: .png, .svg or .pdf; it appears complete or not at all.
        unpool: a second row a tower in which each patch shows the token that it went into: "colour", the mean of its
            segment's pixels; "features", the tokens' first three principal components as red, green and blue.

    Raises:
        ValueError: another ending, lengths that differ, or an unknown `unpool`.
    """
    check_ending(path)
    if not readings or len(labels) != len(readings) or len({len(reading.cuts) for reading in readings}) > 1:
        raise ValueError(f"{path}: needs a label for each reading, at least one, and equally many budgets of each")
    if unpool is not None and unpool not in get_args(Unpool):
        raise ValueError(f"unpool must be one of {', '.join(get_args(Unpool))}, got {unpool!r}")
    across, lines = 2 + len(readings[0].cuts), 1 + bool(unpool)
    heights = []
    for reading in readings:
        height = _PANEL * reading.image.height / reading.image.width
        heights += [height + 0.3, height + 0.12][:lines]
    size = (0.9 + across * (_PANEL + 0.08), sum(heights) + (0.35 if title else 0.05))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    axes = empty_panels(figure, heights, across)
    for label, reading, first in zip(labels, readings, axes[::lines], strict=True):
        first[0].set_ylabel(wrap_label(label), fontsize=8, labelpad=5)
        show_panel(first[0], enlarge(reading.image, reading.grid_size)[0], _describe_image(reading))
        _show_probabilities(first[1], reading)
        for panel, cut in zip(first[2:], reading.cuts, strict=True):
            what = _describe_cut(cut, reading.probabilities is not None)
            show_panel(panel, draw_segments(reading.image, cut.segments, reading.grid_size, "tint"), what)
    if unpool:
        what = {"colour": "mean colour\nof its segment", "features": "first three\nprincipal components"}[unpool]
        note = {"s": f"each patch shows\nits token:\n{what}", "fontsize": 8, "color": "0.35", "linespacing": 1.3}
        for reading, second in zip(readings, axes[1::lines], strict=True):
            for panel, picture in zip(second[2:], _unpooled(reading, unpool), strict=True):
                show_panel(panel, picture, "")
            second[1].text(0.95, 0.5, ha="right", va="center", **note)
    if title:
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    save(figure, path)


def draw_probabilities(
    image: Image.Image, probabilities: Tensor, grid_size: tuple[int, int], scan: str = "raster", high: float = 1.0
) -> Image.Image:
    """The image in dark grey, and each place that could be a boundary as a line, the brighter the more probable.

    Args:
        probabilities: [N] that a segment ends with each patch, in raster order; the scan's last is not drawn, it always does.
        grid_size: (rows, columns) of patches.
        scan: the order in which the tower reads patches. A line stands at the edge between a patch and the next one; where the
            next one lies elsewhere (raster, at the end of a row) within the patch, at its right side.
        high: probability of the brightest colour.

    Returns:
        RGB picture of the size of `draw_segments`.

    Raises:
        ValueError: `probabilities` do not fit the grid.
    """
    rows, columns = grid_size
    if probabilities.shape != (rows * columns,):
        raise ValueError(
            f"probabilities must be [{rows * columns}] for {rows} x {columns} patches, got {list(probabilities.shape)}"
        )
    picture, cell = enlarge(image, grid_size)
    grey = np.asarray(picture.convert("L"), dtype=np.float32)
    picture = Image.fromarray((0.45 * grey).astype(np.uint8)).convert("RGB")
    draw = ImageDraw.Draw(picture)
    order = scan_order(scan, rows, columns).tolist()
    half = max(1, cell // 10)
    inset = max(1, cell // 24)  # lines that meet at a corner stay apart
    chances = probabilities.tolist()
    for here, there in sorted(zip(order, order[1:], strict=False), key=lambda pair: chances[pair[0]]):
        (r, c), (s, d) = divmod(here, columns), divmod(there, columns)
        if abs(r - s) + abs(c - d) != 1:
            s, d = r, c + 1
            centre = (c + 1) * cell - half - 1
        else:
            centre = max(c, d) * cell if r == s else max(r, s) * cell
        colour = tuple(round(255 * part) for part in _COLOURS(min(chances[here] / high, 1.0))[:3])
        if r == s:
            box = (centre - half, r * cell + inset, centre + half - 1, (r + 1) * cell - inset - 1)
        else:
            box = (c * cell + inset, centre - half, (c + 1) * cell - inset - 1, centre + half - 1)
        draw.rectangle(box, fill=colour)
    return picture


def wrap_label(label: str) -> str:
    """Lines that fit beside a panel; of one that does not, a path say, the end."""
    fits = [line if len(line) <= 76 else f"…{line[-75:]}" for line in label.splitlines()]
    return "\n".join(part for line in fits for part in textwrap.wrap(line, 38))


def check_rows(labels: Sequence[str], readings: Sequence, path: str | os.PathLike) -> None:
    """ValueError for a figure that is no picture by its ending, or has not one label for each reading."""
    check_ending(path)
    if not readings or len(labels) != len(readings):
        raise ValueError(f"{path}: needs a label for each reading, and at least one")


def empty_panels(figure: Figure, heights: Sequence[float], across: int) -> np.ndarray:
    """Axes [len(heights), across] without ticks and frames."""
    axes = figure.subplots(len(heights), across, squeeze=False, height_ratios=heights)
    for single in axes.flat:
        single.set(xticks=[], yticks=[])
        single.spines[:].set_visible(False)
    return axes


def show_panel(axes: Axes, picture: Image.Image, title: str, fontsize: float = 8) -> None:
    axes.imshow(picture, interpolation="antialiased")
    axes.set_title(title, fontsize=fontsize, pad=3)


def _show_probabilities(axes: Axes, reading: Reading) -> None:
    """The panel with its colour bar, or a word where nothing was decided."""
    places = scan_order(reading.scan, *reading.grid_size)[:-1]  # the scan's last patch ends a segment anyway
    if reading.probabilities is None or not len(places):
        dropped = any(int(cut.segments.min()) < 0 for cut in reading.cuts)
        what = "patches are kept or dropped" if dropped else "every patch is a token"
        axes.text(0.5, 0.5, f"{what}:\nno boundary to decide", ha="center", va="center", fontsize=8)
        return
    high = max(0.1, math.ceil(10 * float(reading.probabilities[places].max()) - 1e-6) / 10)
    picture = draw_probabilities(reading.image, reading.probabilities, reading.grid_size, reading.scan, high)
    scan = "" if reading.scan == "raster" else f", {reading.scan} scan"
    show_panel(axes, picture, f"{reading.measure}{scan}")
    bar = axes.figure.colorbar(
        ScalarMappable(Normalize(0, high), _COLOURS),
        cax=axes.inset_axes((1.02, 0, 0.035, 1)),
        ticks=[0, high / 2, high],
        format="{x:g}",
    )
    bar.ax.tick_params(labelsize=7, length=2, pad=1)
    bar.outline.set_visible(False)


def _describe_image(reading: Reading) -> str:
    rows, columns = reading.grid_size
    return f"{reading.image.width} × {reading.image.height} pixels, {rows} × {columns} patches"


def _describe_cut(cut: Cut, decides: bool) -> str:
    """decides: whether there was anything to decide."""
    tokens = f"{cut.tokens} token{'s' * (cut.tokens != 1)}"
    if cut.compression is None:
        who = "as it was made: " if int(cut.segments.min()) < 0 else "image decides: " * decides
        return f"{who}{tokens} ({len(cut.segments) / cut.tokens:.1f}x)"
    return f"{cut.compression:g}x: {tokens}"


def _unpooled(reading: Reading, unpool: Unpool) -> list[Image.Image]:
    """A picture a budget in which each patch shows its token."""
    if unpool == "colour":
        return [
            draw_segments(reading.image, cut.segments, reading.grid_size, "mean", borders=False) for cut in reading.cuts
        ]
    kept = torch.cat([cut.segments for cut in reading.cuts]) >= 0
    colours = torch.zeros(len(kept), 3, dtype=torch.uint8)  # black: dropped
    colours[kept] = _principal_colours(torch.cat([cut.features for cut in reading.cuts])[kept].double())
    colours = colours.view(len(reading.cuts), *reading.grid_size, 3).numpy()
    size = enlarge(reading.image, reading.grid_size)[0].size
    return [Image.fromarray(of_cut).resize(size, Image.Resampling.NEAREST) for of_cut in colours]


def _principal_colours(features: Tensor) -> Tensor:
    """[M, D] → [M, 3] uint8: the first three principal components, each from its 2nd to its 98th percentile."""
    centred = features - features.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    places = centred @ (axes * largest.sign()).T  # a direction and its opposite are equally principal
    low, high = (places.quantile(q, dim=0) for q in (0.02, 0.98))
    shares = ((places - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
    return (255 * torch.nn.functional.pad(shares, (0, 3 - shares.shape[1]))).round().to(torch.uint8)
