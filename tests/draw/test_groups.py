"""Drawings of a SeNaTra: what is read is what it does, and colours are where its maps are."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from llava_drip.draw.groups import GroupReading, draw_groups, draw_soft_means, read_groups
from llava_drip.draw.reading import read_boundaries

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8))


def tower(**arguments):
    torch.manual_seed(0)
    return timm.create_model("senatra_mini_64", **{"num_classes": 5, **arguments})


def test_read_as_the_tower_groups():
    made = tower().train()
    reading = read_groups(made, IMAGE)
    assert made.training and reading.grid_size == (32, 32) and reading.image.size == (64, 64)
    assert reading.tokens == (256, 64, 16) and reading.maps.shape == (16, 32, 32)
    assert [int(level.max()) < n for level, n in zip(reading.levels, reading.tokens)] == [True] * 3
    torch.testing.assert_close(reading.maps.sum(0), torch.ones(32, 32))
    # Locally a patch goes to a token nearby: at most one place of 2 x 2 patches away.
    row, column = reading.levels[0].view(32, 32) // 16, reading.levels[0].view(32, 32) % 16
    own = torch.arange(32) // 2
    assert ((row - own[:, None]).abs() <= 1).all() and ((column - own).abs() <= 1).all()
    assert reading.classes.shape == (1024,) and int(reading.classes.max()) < 5
    assert read_groups(tower(num_classes=0), IMAGE).classes is None


def test_soft_means_are_the_maps_means():
    left = torch.zeros(2, 32, 32)
    left[0, :, :16] = left[1, :, 16:] = 1
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:32, :32], pixels[32:, :32], pixels[:, 32:] = 200, 100, (10, 20, 30)
    levels = (left.argmax(0).flatten(),)
    reading = GroupReading(Image.fromarray(pixels), (32, 32), levels, (2,), left, None)
    means = np.asarray(draw_soft_means(reading)).astype(int)
    assert np.abs(means[:, : means.shape[1] // 2] - 150).max() <= 2  # the left half is one token
    assert np.abs(means[:, means.shape[1] // 2 :] - (10, 20, 30)).max() <= 2
    even = GroupReading(reading.image, (32, 32), levels, (2,), torch.full((2, 32, 32), 0.5), None)
    assert np.ptp(np.asarray(draw_soft_means(even)).reshape(-1, 3), axis=0).max() == 0  # maps that tell nothing apart


def test_one_figure(tmp_path):
    readings = [read_groups(tower(), IMAGE), read_groups(tower(num_classes=0), IMAGE)]
    draw_groups(["with classes", "without"], readings, tmp_path / "a.png", "title")
    draw_groups(["with classes", "without"], readings, tmp_path / "b.png", "title")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).std() > 10


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="no grouping layers; a senatra_"):
        read_groups(timm.create_model("drip_mini_patch8_64_4x"), IMAGE)
    reading = read_boundaries(tower(), IMAGE, [4, 10])  # the same at each budget
    assert [cut.compression for cut in reading.cuts] == [None, None]
    with pytest.raises(ValueError, match="a label for each reading"):
        draw_groups([], [], tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.gif"):
        draw_groups(["a"], [read_groups(tower(), IMAGE)], tmp_path / "a.gif")
