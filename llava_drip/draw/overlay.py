"""Pictures of how a tower cut an image into segments: borders, tints, and what is left at one colour per segment.

The image has to be the one the tower saw, i.e. after resizing and cropping. Patches are laid over it in raster order, however the
tower scans them: a border is an edge between patches of different segments, whether or not they follow one another.
"""

from __future__ import annotations

import colorsys
import os
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from llava_drip.files import whole

Fill = Literal["none", "tint", "mean"]

_LONG_SIDE = 448  # pixels, at least, of a drawn picture: borders stay readable on small images
_TINT_STRENGTH = 0.3
_DROPPED = 0.25  # brightness that is left of a patch that went into no token


def draw_segments(
    image: Image.Image, segments: Tensor, grid_size: tuple[int, int], fill: Fill = "none", borders: bool = True
) -> Image.Image:
    """Draw one image's segments.

    Args:
        image: What the tower saw. It is enlarged so that a patch is a whole number of pixels.
        segments: [patches] integers; segments[i] is the token of patch i, patches in raster order; -1: it was dropped, and is
            darkened.
        grid_size: (rows, columns) of patches.
        fill: "none" shows the image; "tint" lays a colour of its own over each segment, which shows where a segment
            goes on (in the next row, along a curve); "mean" fills each segment with its mean colour.
        borders: Whether to draw the patch edges where the segment changes.

    Returns:
        RGB picture of rows * cell by columns * cell pixels.

    Raises:
        ValueError: `segments` does not fit the grid, or `fill` is unknown.
    """
    segments_RC = _as_grid(segments, grid_size)
    if fill not in get_args(Fill):
        raise ValueError(f"fill must be one of {', '.join(get_args(Fill))}, got {fill!r}")
    picture, cell = enlarge(image, grid_size)
    pixels = np.asarray(picture, dtype=np.float32)
    owner = segments_RC.repeat(cell, axis=0).repeat(cell, axis=1)  # the segment of each pixel
    dropped, seen = owner[..., None] < 0, pixels
    if fill == "mean":
        pixels = _mean_colours(pixels, owner)[owner]
    elif fill == "tint":
        colours = np.stack([_tint(i) for i in range(max(1, segments_RC.max() + 1))])
        pixels = pixels + _TINT_STRENGTH * (colours[owner] - pixels)
    pixels = np.where(dropped, _DROPPED * seen, pixels)
    picture = Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))
    if borders:
        _draw_borders(picture, segments_RC, cell)
    return picture


def enlarge(image: Image.Image, grid_size: tuple[int, int]) -> tuple[Image.Image, int]:
    """The image in RGB, so large that a patch is a whole number of pixels and lines can be seen on it; and that number."""
    rows, columns = grid_size
    cell = max(-(-max(image.size) // max(rows, columns)), -(-_LONG_SIDE // max(rows, columns)))
    # Few pixels are shown as they are; a photo is smoothed.
    resample = Image.Resampling.NEAREST if max(image.size) <= 128 else Image.Resampling.BICUBIC
    return image.convert("RGB").resize((columns * cell, rows * cell), resample), cell


def overlay_grid(
    images: Sequence[Image.Image],
    segments: Tensor | Sequence[Tensor],
    grid_size: tuple[int, int],
    titles: Sequence[str],
    path: str | os.PathLike,
) -> None:
    """Write a contact sheet: for each image the original, its segments, and its segments' mean colours.

    Args:
        images: B images as the tower saw them.
        segments: [B, patches] integers, or B tensors [patches]; see `draw_segments`.
        grid_size: (rows, columns) of patches.
        titles: B titles; the number of tokens is added to each.
        path: PNG file to write; it appears complete or not at all.

    Raises:
        ValueError: There is no image, the lengths differ, or the segments do not fit the grid.
    """
    if not images or not len(images) == len(segments) == len(titles):
        numbers = f"{len(images)} images, {len(segments)} segments and {len(titles)} titles"
        raise ValueError(f"overlay_grid needs as many images as segments and titles, at least one; got {numbers}")
    across = 2 if len(images) > 3 else 1  # images side by side
    down = -(-len(images) // across)
    aspect = images[0].height / images[0].width
    figure = Figure(figsize=(across * 6.9, down * (2.2 * aspect + 0.48)), dpi=110, layout="constrained")
    blocks = np.atleast_1d(figure.subfigures(down, across, wspace=0.03)).ravel()
    for block, image, of_image, title in zip(
        blocks, images, segments, titles, strict=False
    ):  # the last block may stay empty
        tokens = int((np.unique(_as_grid(of_image, grid_size)) >= 0).sum())
        block.suptitle(f"{title} · {tokens} of {grid_size[0] * grid_size[1]} tokens", fontsize=9)
        panels = {
            "image": enlarge(image, grid_size)[0],
            "segments": draw_segments(image, of_image, grid_size, fill="tint"),
            "mean colour of each": draw_segments(image, of_image, grid_size, fill="mean", borders=False),
        }
        for axes, (name, picture) in zip(block.subplots(1, len(panels)), panels.items(), strict=True):
            axes.imshow(picture, interpolation="antialiased")
            axes.set_axis_off()
            axes.set_title(name, fontsize=8, color="0.4", pad=3)
    with whole(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})


def _as_grid(segments: Tensor, grid_size: tuple[int, int]) -> np.ndarray:
    """[rows, columns] int64."""
    rows, columns = grid_size
    if segments.ndim != 1 or segments.numel() != rows * columns or rows < 1 or columns < 1:
        raise ValueError(
            f"segments must be [{rows * columns}] for a grid of {rows} x {columns} patches, got {list(segments.shape)}"
        )
    if segments.is_floating_point() or int(segments.min()) < -1:
        raise ValueError("segments must be token indices: integers, 0 or more, or -1 for a dropped patch")
    return segments.detach().cpu().numpy().astype(np.int64).reshape(rows, columns)


def _mean_colours(pixels: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Mean of each segment's pixels: [segments + 1, 3]; rows of absent indices are 0, the last is that of dropped patches."""
    owner = np.where(owner < 0, owner.max() + 1, owner).ravel()
    sizes = np.bincount(owner)
    sums = [np.bincount(owner, weights=pixels[..., channel].ravel()) for channel in range(3)]
    return np.stack(sums, axis=1) / np.maximum(sizes, 1)[:, None]


def _tint(index: int) -> np.ndarray:
    """A colour whose hue is far from those of nearby indices (steps of the golden ratio): [3] float in 0..255."""
    return 255 * np.array(colorsys.hsv_to_rgb(0.618034 * index % 1, 0.8, 1.0))


def _draw_borders(picture: Image.Image, segments_RC: np.ndarray, cell: int) -> None:
    """White lines with dark sides, visible on any image, along the patch edges between different segments."""
    draw = ImageDraw.Draw(picture)
    rows, columns = segments_RC.shape
    lines = []
    for r, c in np.argwhere(segments_RC[:, 1:] != segments_RC[:, :-1]):
        lines.append(((c + 1) * cell, r * cell, (c + 1) * cell, (r + 1) * cell))
    for r, c in np.argwhere(segments_RC[1:] != segments_RC[:-1]):
        lines.append((c * cell, (r + 1) * cell, (c + 1) * cell, (r + 1) * cell))
    white = max(2, cell // 14)
    for width, colour in ((white + 2, (20, 20, 20)), (white, (255, 255, 255))):
        before, after = width // 2, width - width // 2 - 1
        for x0, y0, x1, y1 in lines:
            draw.rectangle((x0 - before, y0 - before, x1 + after, y1 + after), fill=colour)
