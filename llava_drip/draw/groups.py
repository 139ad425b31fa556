"""What a tower of grouping layers (SeNaTra) made of an image: segments after each layer, the soft maps of the final tokens, and
where it has a classifier the class of each place.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from llava_drip.draw.boundaries import check_rows, empty_panels, show_panel, wrap_label
from llava_drip.draw.overlay import draw_segments, enlarge
from llava_drip.draw.results import save
from llava_drip.towers.contract import evaluating
from llava_drip.towers.inputs import prepare
from llava_drip.towers.senatra.assignment import hard_segments

_PANEL = 2.3  # inches
_BORDERED = 400  # tokens, at most, that are drawn with borders


@dataclass(frozen=True)
class GroupReading:
    """What one tower made of one image of N = rows x columns patches.

    Attributes:
        image: the image as the tower saw it, resized and cropped.
        grid_size: (rows, columns) of patches.
        levels: after each grouping layer [N] int64, the token that each patch went into most; in raster order.
        tokens: how many there are after each layer, those included that no patch went into most.
        maps: [K, rows, columns] fp32, how much of each patch went into each final token.
        classes: [N] int64, the class with the largest logit at each patch; None without classifier.
    """

    image: Image.Image
    grid_size: tuple[int, int]
    levels: tuple[Tensor, ...]
    tokens: tuple[int, ...]
    maps: Tensor
    classes: Tensor | None


def has_groups(tower: nn.Module) -> bool:
    """Whether read_groups can ask this tower."""
    return hasattr(tower, "forward_segmentation")


@torch.no_grad()
def read_groups(tower: nn.Module, image: Image.Image) -> GroupReading:
    """Run a tower on one image, in eval mode; its own mode is left as it was.

    Args:
        tower: with `forward_segmentation`: a Senatra.
        image: RGB of any size. It is resized and cropped at the centre as in evaluation, by the tower's pretrained_cfg.

    Raises:
        ValueError: a tower without grouping layers.
    """
    if not has_groups(tower):
        raise ValueError(f"{type(tower).__name__}: it has no grouping layers; a senatra_* tower has")
    seen, pixels = prepare(tower, image)
    pixels = pixels.to(next(tower.parameters()).device)
    with evaluating(tower):
        found = tower.forward_segmentation(pixels)
        classes = tower.forward_semantic(pixels)[0].argmax(0).flatten().cpu() if tower.num_classes else None
    depths = range(1, len(found.assignments) + 1)
    return GroupReading(
        image=seen,
        grid_size=tower.patch_embed.grid_size,
        levels=tuple(hard_segments(found.assignments[:depth])[0].cpu() for depth in depths),
        tokens=tuple(int(np.prod(assignment.out_grid)) for assignment in found.assignments),
        maps=found.maps[0].cpu(),
        classes=classes,
    )


def draw_soft_means(reading: GroupReading) -> Image.Image:
    """Each token's mean colour, and at each patch the mean of these by the soft maps: what is left of the picture."""
    picture, _ = enlarge(reading.image, reading.grid_size)
    rows, columns = reading.grid_size
    colours = np.asarray(picture.resize((columns, rows), Image.Resampling.BOX), dtype=np.float32).reshape(-1, 3)
    maps = reading.maps.flatten(1).numpy()
    means = maps @ colours / np.maximum(maps.sum(1, keepdims=True), 1e-6)
    patches = np.clip(maps.T @ means + 0.5, 0, 255).astype(np.uint8).reshape(rows, columns, 3)
    return Image.fromarray(patches).resize(picture.size, Image.Resampling.NEAREST)


def draw_groups(
    labels: Sequence[str], readings: Sequence[GroupReading], path: str | os.PathLike, title: str = ""
) -> None:
    """Write a figure: a row a tower with its image, the segments after each grouping layer, the mean colours of the final ones,
    by the soft maps and by the hard segments, and the class of each patch.

    Args:
        labels: one a tower, beside its row.
        readings: of one image by each tower.
        path: .png, .svg or .pdf; it appears complete or not at all.

    Raises:
        ValueError: another ending, or lengths that differ.
    """
    check_rows(labels, readings, path)
    panels = [_panels(reading) for reading in readings]
    across = max(map(len, panels))
    heights = [_PANEL * reading.image.height / reading.image.width + 0.3 for reading in readings]
    size = (0.9 + across * (_PANEL + 0.08), sum(heights) + (0.35 if title else 0.05))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = empty_panels(figure, heights, across)
    for label, row, places in zip(labels, panels, axes, strict=True):
        places[0].set_ylabel(wrap_label(label), fontsize=8, labelpad=5)
        for place, (name, picture) in zip(places, row, strict=False):
            show_panel(place, picture, name)
    if title:
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    save(figure, path)


def _panels(reading: GroupReading) -> list[tuple[str, Image.Image]]:
    image, grid = reading.image, reading.grid_size
    panels = [(f"{image.width} × {image.height} pixels, {grid[0]} × {grid[1]} patches", enlarge(image, grid)[0])]
    for segments, tokens in zip(reading.levels, reading.tokens, strict=True):
        used = len(segments.unique())
        note = f"{tokens:,} tokens" if used == tokens else f"{tokens:,} tokens, {used:,} seen"
        if tokens > _BORDERED:  # borders would hide the picture
            panels.append((f"{note}, mean colours", draw_segments(image, segments, grid, "mean", borders=False)))
        else:
            panels.append((note, draw_segments(image, segments, grid, "tint")))
    panels.append(("mean colours, soft maps", draw_soft_means(reading)))
    panels.append(("mean colours, segments", draw_segments(image, reading.levels[-1], grid, "mean", borders=False)))
    if reading.classes is not None:
        shown = reading.classes.unique().tolist()
        note = f"classes {', '.join(map(str, shown))}" if len(shown) <= 6 else f"{len(shown)} classes"
        panels.append((note, draw_segments(image, reading.classes, grid, "tint")))
    return panels
