"""Where each learned token of a TokenLearner looks: the image in grey once a token, in the colour of the weight of each patch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from llava_drip.draw.boundaries import check_rows, empty_panels, show_panel, wrap_label
from llava_drip.draw.overlay import enlarge
from llava_drip.draw.results import save
from llava_drip.towers.contract import evaluating
from llava_drip.towers.inputs import prepare

_ACROSS = 8  # maps in a row
_PANEL = 1.6  # inches
_COLOURS = colormaps["inferno"]  # dark where a token does not look
_STRENGTH = 0.65  # of the colour, over the image


@dataclass(frozen=True)
class TokenMaps:
    """What one tower made of one image.

    Attributes:
        image: the image as the tower saw it, resized and cropped.
        maps: [S, rows, columns] fp32, the weight of each patch in each of S tokens.
    """

    image: Image.Image
    maps: Tensor


@torch.no_grad()
def read_token_maps(tower: nn.Module, image: Image.Image) -> TokenMaps:
    """Run a tower on one image (RGB of any size), resized and cropped as in evaluation; its mode is left as it was.

    Raises:
        ValueError: a tower whose tokens come without maps (TokenBatch.token_maps).
    """
    seen, pixels = prepare(tower, image)
    with evaluating(tower):
        maps = tower.forward_features(pixels.to(next(tower.parameters()).device)).token_maps
    if maps is None:
        raise ValueError(f"{type(tower).__name__}: has no learned tokens whose maps could be drawn")
    return TokenMaps(seen, maps[0].cpu())


def draw_token_map(image: Image.Image, weights: Tensor) -> Image.Image:
    """The image in grey (enlarged so that a patch is a whole number of pixels) under the colour of each patch's weight, RGB.

    weights: [rows, columns], 0 or more; the largest gets the brightest colour.
    """
    picture, cell = enlarge(image, tuple(weights.shape))
    share = (weights / weights.max().clamp(min=1e-12)).numpy()
    colours = 255 * _COLOURS(share)[..., :3].repeat(cell, axis=0).repeat(cell, axis=1)
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    return Image.fromarray((grey + _STRENGTH * (colours - grey) + 0.5).astype(np.uint8))


def draw_token_maps(
    labels: Sequence[str], readings: Sequence[TokenMaps], path: str | os.PathLike, title: str = ""
) -> None:
    """Write a figure: for each tower the image, and beside it a panel a token, each with colours up to its own largest weight.

    Args:
        labels: one a tower, beside its row.
        readings: of one image by each tower.
        path: .png, .svg or .pdf; it appears complete or not at all.

    Raises:
        ValueError: another ending, or lengths that differ.
    """
    check_rows(labels, readings, path)
    across = 1 + min(_ACROSS, max(len(reading.maps) for reading in readings))
    lines = [-(-len(reading.maps) // _ACROSS) for reading in readings]
    heights = [
        _PANEL * reading.image.height / reading.image.width + 0.25
        for reading, of in zip(readings, lines, strict=True)
        for _ in range(of)
    ]
    figure = Figure(figsize=(0.6 + across * _PANEL, sum(heights) + 0.4), dpi=150, layout="constrained")
    axes = empty_panels(figure, heights, across)
    for label, reading, of in zip(labels, readings, lines, strict=True):
        rows, axes = axes[:of], axes[of:]
        rows[0, 0].set_ylabel(wrap_label(label), fontsize=7)
        size = tuple(reading.maps.shape[1:])
        show_panel(rows[0, 0], enlarge(reading.image, size)[0], f"{size[0]} × {size[1]} patches", fontsize=6)
        for i, weights in enumerate(reading.maps):
            # A token that weighs all patches alike has peak 1.
            peak = float(weights.max() / weights.mean().clamp(min=1e-12))
            panel = rows[i // _ACROSS, 1 + i % _ACROSS]
            show_panel(
                panel, draw_token_map(reading.image, weights), f"token {i + 1}: peak {peak:.1f}x mean", fontsize=6
            )
    if title:
        figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    save(figure, path)
