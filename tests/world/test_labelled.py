"""Scenes with labels: the labels are those of the scenes that are shown."""

from __future__ import annotations

import numpy as np
import pytest

from llava_drip.world.edges import true_boundaries
from llava_drip.world.labelled import PATCH_CLASSES, QUADRANT_LABELS, labelled_scenes
from llava_drip.world.scenes import COLOURS, QUADRANTS, render, scene_at

GRID = (8, 8)


def test_labels_are_those_of_the_scenes():
    scenes = labelled_scenes(3, 20, GRID, first=5)
    assert len(scenes) == 20 and scenes.pixels.shape == (20, 3, 64, 64) and scenes.pixels.dtype == np.float32
    backwards = np.arange(64)[::-1]
    for row in range(20):
        scene = scene_at(3, "train", 5 + row)
        pixels, mask = render(scene)
        assert np.allclose((scenes.pixels[row].transpose(1, 2, 0) + 1) * 127.5, pixels, atol=1e-3)
        assert (scenes.changes()[row] == true_boundaries(mask, GRID)).all()
        assert (scenes.changes(backwards)[row] == true_boundaries(mask, GRID)[::-1]).all()
        there = {
            (quadrant, label)
            for q, quadrant in enumerate(QUADRANTS)
            for k, label in enumerate(QUADRANT_LABELS)
            if scenes.in_quadrant[row, q, k]
        }
        assert there == {(thing.quadrant, label) for thing in scene.objects for label in (thing.colour, thing.shape)}


def test_a_patch_has_the_colour_of_what_it_shows():
    scenes = labelled_scenes(0, 50, GRID)
    background = scenes.patch_class == 0
    assert (background == (scenes.shown == 0)).all() and 0.1 < 1 - background.mean() < 0.5
    # By pixels: patches of one class are nearest to that colour far more often than chance; stripes and thin shapes are darker.
    colours = np.array(list(COLOURS.values())) / 127.5 - 1
    patches = scenes.pixels.reshape(50, 3, 8, 8, 8, 8).mean((3, 5)).reshape(50, 3, 64).transpose(0, 2, 1)
    directions = colours - colours.mean(1, keepdims=True)
    nearest = ((patches - patches.mean(-1, keepdims=True)) @ directions.T).argmax(-1) + 1
    assert (nearest == scenes.patch_class)[~background].mean() > 0.8
    assert len(PATCH_CLASSES) == len(COLOURS) + 1


def test_a_grid_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match="does not divide"):
        labelled_scenes(0, 1, (7, 8))
