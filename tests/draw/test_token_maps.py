"""Drawings of learned tokens: the maps are the tower's own, and colours are where they are high."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from matplotlib import colormaps
from PIL import Image
from timm.data import create_transform, resolve_data_config

from llava_drip.draw.token_maps import TokenMaps, draw_token_map, draw_token_maps, read_token_maps

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8))


def tower(name: str = "tokenlearner_mini_patch8_64", **arguments):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0, **arguments).eval()


@pytest.mark.parametrize("arguments", [{}, {"version": "1.0", "num_tokens": 3}, {"use_fuser": True}])
def test_maps_are_those_of_the_tower_on_the_picture_that_is_shown(arguments):
    model = tower(**arguments).train()
    reading = read_token_maps(model, IMAGE)
    assert model.training and reading.image.size == (64, 64)
    config = resolve_data_config({"input_size": (3, 64, 64)}, model=model)
    x = create_transform(**{key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct")})
    with torch.no_grad():
        expected = model.eval().forward_features(x(IMAGE)[None]).token_maps[0]
    torch.testing.assert_close(reading.maps, expected)
    assert reading.maps.shape == (model.num_tokens, 8, 8)


def test_colours_follow_the_weights():
    weights = torch.zeros(2, 3)
    weights[0, 1], weights[1, 2] = 0.5, 0.25
    drawn = draw_token_map(Image.new("RGB", (48, 32), (100, 100, 100)), weights)
    cell = drawn.width // 3
    assert drawn.size == (3 * cell, 2 * cell)
    for row in range(2):
        for column in range(3):
            share = float(weights[row, column]) / 0.5
            colour = [round(100 + 0.65 * (255 * part - 100)) for part in colormaps["inferno"](share)[:3]]
            got = drawn.getpixel((column * cell + cell // 2, row * cell + cell // 2))
            assert max(abs(a - b) for a, b in zip(got, colour, strict=True)) <= 1


def test_a_panel_a_token(tmp_path):
    def size(name: str, *arguments: dict) -> tuple[int, int]:
        readings = [read_token_maps(tower(**each), IMAGE) for each in arguments]
        draw_token_maps([f"tower {i}" for i in range(len(readings))], readings, tmp_path / name, "photo.jpg")
        return Image.open(tmp_path / name).size

    four, eight = size("four.png", {"num_tokens": 4}), size("eight.png", {})
    assert eight[0] > 1.6 * four[0] and eight[1] == four[1]
    two_rows = size("twelve.png", {"num_tokens": 12})
    assert two_rows[0] == eight[0] and two_rows[1] > 1.7 * eight[1]
    assert size("both.png", {"num_tokens": 4}, {}) == two_rows
    assert size("again.png", {}) == eight
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "eight.png").read_bytes()


def test_mistakes_are_named(tmp_path):
    reading = read_token_maps(tower(), IMAGE)
    assert isinstance(reading, TokenMaps)
    with pytest.raises(ValueError, match="Drip: has no learned tokens"):
        read_token_maps(tower("drip_mini_patch8_64_4x"), IMAGE)
    with pytest.raises(ValueError, match="must end in .png"):
        draw_token_maps(["a"], [reading], tmp_path / "a.gif")
    with pytest.raises(ValueError, match="a label for each reading"):
        draw_token_maps(["a", "b"], [reading], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
