"""Scenes of the world as arrays with labels: what small towers are trained on, to measure where they cut."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from llava_drip.world.edges import changes_along, shown_by_patches
from llava_drip.world.scenes import COLOURS, QUADRANTS, SHAPES, Split, render, scene_at

PATCH_CLASSES = ("background", *COLOURS)  # what a patch can show
QUADRANT_LABELS = (*COLOURS, *SHAPES)  # what can lie in a quadrant


@dataclass(frozen=True)
class LabelledScenes:
    """n scenes with N patches each; patches in raster order.

    Attributes:
        pixels: [n, 3, IMAGE_SIZE, IMAGE_SIZE] float32 in -1 .. 1.
        shown: [n, N] int64, which thing most of a patch shows: 0 background, i + 1 is object i.
        patch_class: [n, N] int64, the same as an index of PATCH_CLASSES.
        in_quadrant: [n, QUADRANTS, QUADRANT_LABELS] float32, 1 where such a colour or shape lies in the quadrant.
    """

    pixels: np.ndarray
    shown: np.ndarray
    patch_class: np.ndarray
    in_quadrant: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def changes(self, order: ArrayLike | None = None) -> np.ndarray:
        """[n, N - 1] bool: where the thing shown changes along a scan; order as in `edges.true_boundaries`."""
        return changes_along(self.shown, order)


def labelled_scenes(
    seed: int, count: int, grid_size: tuple[int, int], first: int = 0, split: Split = "train"
) -> LabelledScenes:
    """Scenes number first .. first + count - 1 of a split, rendered (about 2,000 a second).

    grid_size: (rows, columns) of patches, which must divide IMAGE_SIZE (else ValueError).
    """
    scenes = [scene_at(seed, split, i) for i in range(first, first + count)]
    pixels, masks = zip(*(render(scene) for scene in scenes), strict=True)
    shown = np.stack([shown_by_patches(mask, grid_size) for mask in masks]).astype(np.int64)
    patch_class = np.zeros_like(shown)
    in_quadrant = np.zeros((count, len(QUADRANTS), len(QUADRANT_LABELS)), dtype=np.float32)
    for row, scene in enumerate(scenes):
        for number, thing in enumerate(scene.objects, start=1):
            patch_class[row, shown[row] == number] = PATCH_CLASSES.index(thing.colour)
            for label in (thing.colour, thing.shape):
                in_quadrant[row, QUADRANTS.index(thing.quadrant), QUADRANT_LABELS.index(label)] = 1
    images = np.stack(pixels).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    return LabelledScenes(images, shown, patch_class, in_quadrant)
