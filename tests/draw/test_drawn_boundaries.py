"""Drawings of boundaries: what is read of a tower is what it does, and lines and colours are where its decisions are."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from matplotlib import colormaps
from PIL import Image
from timm.data import create_transform, resolve_data_config

from llava_drip.draw.boundaries import draw_boundaries, draw_probabilities
from llava_drip.draw.overlay import draw_segments
from llava_drip.draw.reading import read_boundaries
from llava_drip.towers.scan import SCANS, scan_order

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8))


def tower(name: str = "drip_mini_patch8_64_4x", **arguments):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0, **arguments).eval()


def test_read_as_the_tower_decides_at_each_budget():
    model = tower(scan="hilbert")
    reading = read_boundaries(model, IMAGE, [2, 4, 10, 64, None])
    assert reading.grid_size == (8, 8) and reading.scan == "hilbert"
    assert [cut.tokens for cut in reading.cuts[:4]] == [32, 16, 6, 1]
    config = resolve_data_config({"input_size": (3, 64, 64)}, model=model)
    x = create_transform(**{key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct")})(
        IMAGE
    )
    for cut in reading.cuts:
        model.set_compression(cut.compression)
        with torch.no_grad():
            tokens = model.forward_features(x[None])
        assert torch.equal(cut.segments, tokens.segments[0]) and cut.tokens == int(tokens.lengths[0])
        torch.testing.assert_close(cut.features, tokens.values[cut.segments])
        along = cut.segments[scan_order("hilbert", 8, 8)]
        assert along.diff().min() >= 0 and int(along[-1]) == cut.tokens - 1  # runs along the scan
    torch.testing.assert_close(reading.probabilities, tokens.boundary_probs[0])
    assert reading.probabilities[scan_order("hilbert", 8, 8)[-1]] == 1


def test_what_is_drawn_is_called_what_it_is():
    """Scores of the entropy rule are no probabilities."""
    words = {rule: read_boundaries(tower(boundary=rule), IMAGE, [4]).measure for rule in ("gumbel", "entropy")}
    assert words == {"gumbel": "boundary probability", "entropy": "score: entropy of the next patch's code"}


def test_tower_is_left_as_it_was():
    model = tower().train()
    model.set_compression(torch.tensor([2.0, 8.0]), over="batch")
    read_boundaries(model, IMAGE, [4, None])
    assert model.training and model.budget.tolist() == [2.0, 8.0] and model.over == "batch"
    with pytest.raises(ValueError, match="at least 1"):
        read_boundaries(model, IMAGE, [0.5])
    assert model.training and model.budget.tolist() == [2.0, 8.0]


def test_image_is_shown_as_the_tower_saw_it():
    wide = Image.new("RGB", (192, 64), (200, 0, 0))
    wide.paste((0, 0, 200), (64, 0, 128, 64))  # the middle third is what a centre crop keeps
    seen = np.asarray(read_boundaries(tower(), wide, [4]).image)
    assert seen.shape == (64, 64, 3) and (seen == (0, 0, 200)).all()


def test_a_dense_tower_decides_nothing_until_it_is_asked_to():
    model = tower("drip_mini_patch8_64_1x")
    dense = read_boundaries(model, IMAGE, [1])
    assert dense.probabilities is None and dense.cuts[0].tokens == 64
    assert read_boundaries(model, IMAGE, [1, 4]).probabilities.shape == (64,)


@pytest.mark.parametrize("unpool", ["colour", "features"])
def test_a_tower_that_drops_patches(tmp_path, unpool):
    reading = read_boundaries(tower("dynamicvit_mini_patch8_64"), IMAGE, [4, None])
    assert reading.probabilities is None and [cut.tokens for cut in reading.cuts] == [16, 31]
    for cut in reading.cuts:
        assert (cut.segments == -1).sum() == 64 - cut.tokens and (cut.features[cut.segments == -1] == 0).all()
    draw_boundaries(["dynamicvit"], [reading], tmp_path / "figure.png", unpool=unpool)
    drawn = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"))
    assert (drawn.reshape(-1, 3).max(1) < 64).mean() > 0.1  # the dark ones


@pytest.mark.parametrize(
    ("scan", "second"),  # where the place between the scan's second and third patch is drawn: x, y in patches
    [("raster", (2 - 0.05, 0.5)), ("serpentine", (1.5, 1.0)), ("hilbert", (1.0, 1.5))],
)
def test_probabilities_stand_between_patches_that_follow_one_another(scan, second):
    image, cell = Image.new("RGB", (16, 16), (100, 100, 100)), 224
    order = scan_order(scan, 2, 2)
    probabilities = torch.ones(4)
    probabilities[order[:3]] = torch.tensor([0.1, 0.4, 0.2])
    drawn = draw_probabilities(image, probabilities, (2, 2), scan, high=0.5)
    assert drawn.size == draw_segments(image, torch.arange(4), (2, 2)).size
    expected = tuple(round(255 * part) for part in colormaps["inferno"](0.4 / 0.5)[:3])
    x, y = (round(cell * part) for part in second)
    assert drawn.getpixel((x, y)) == expected
    colours = {colour for _, colour in drawn.getcolors(1 << 20)}
    # The dark image and three places: the last patch of the scan, a segment's end whatever happens, is none.
    assert len(colours) == 4 and (45, 45, 45) in colours


@pytest.mark.parametrize("scan", SCANS)
def test_borders_are_where_segments_change_on_any_scan(scan):
    rows, columns, cell = 6, 7, 64
    segments = torch.empty(42, dtype=torch.long)
    torch.manual_seed(1)
    segments[scan_order(scan, rows, columns)] = (torch.rand(42) < 0.3).cumsum(0)
    grid = segments.view(rows, columns)
    image = Image.new("RGB", (112, 96), (90, 120, 60))
    drawn = np.asarray(draw_segments(image, segments, (rows, columns)))
    assert drawn.shape == (rows * cell, columns * cell, 3)
    white = (drawn == 255).all(-1)
    centres = np.arange(cell // 2, 7 * cell, cell)
    beside = white[np.ix_(centres[:rows], np.arange(cell, columns * cell, cell))]
    below = white[np.ix_(np.arange(cell, rows * cell, cell), centres)]
    assert (beside == (grid[:, 1:] != grid[:, :-1]).numpy()).all()
    assert (below == (grid[1:] != grid[:-1]).numpy()).all()


def figure(readings, path, **options):
    draw_boundaries([f"tower {i}" for i in range(len(readings))], readings, path, **options)
    with Image.open(path) as picture:
        return picture.convert("RGB")


def test_a_row_a_tower_and_a_column_a_budget(tmp_path):
    readings = [read_boundaries(tower(), IMAGE, [2, 4]), read_boundaries(tower(patch_size=16), IMAGE, [2, 4])]
    both = figure(readings, tmp_path / "both.png", title="photo.jpg")
    one = figure(readings[:1], tmp_path / "one.png", title="photo.jpg")
    assert both.width == one.width and both.height > 1.8 * one.height
    wider = figure([read_boundaries(tower(), IMAGE, [2, 4, 10, None])], tmp_path / "wider.png")
    assert wider.width > 1.3 * one.width
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.png", "one.png", "wider.png"]
    again = figure(readings, tmp_path / "again.png", title="photo.jpg")
    assert again.tobytes() == both.tobytes()
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "both.png").read_bytes()
    draw_boundaries(["a"], readings[:1], tmp_path / "one.svg")
    assert "<svg" in (tmp_path / "one.svg").read_text()


def test_unpooled_patches_show_their_tokens(tmp_path):
    halves = Image.new("RGB", (64, 64), (200, 40, 0))
    halves.paste((0, 40, 200), (0, 32, 64, 64))
    reading = read_boundaries(tower(), halves, [64])  # one token
    mixed = (100, 40, 100)
    plain = figure([reading], tmp_path / "plain.png")
    assert mixed not in {colour for _, colour in plain.getcolors(1 << 20)}
    colour = figure([reading], tmp_path / "colour.png", unpool="colour")
    assert colour.height > 1.8 * plain.height
    assert {c: n for n, c in colour.getcolors(1 << 20)}.get(mixed, 0) > 50_000  # the whole panel
    many = read_boundaries(tower(), IMAGE, [4, 10])
    features = figure([many], tmp_path / "features.png", unpool="features")
    assert features.size == figure([many], tmp_path / "colours.png", unpool="colour").size
    assert features.tobytes() == figure([many], tmp_path / "again.png", unpool="features").tobytes()


def test_nothing_to_decide_is_said_and_drawn(tmp_path):
    assert figure([read_boundaries(tower("drip_mini_patch8_64_1x"), IMAGE, [1])], tmp_path / "dense.png").width > 500
    single = read_boundaries(tower(patch_size=64), IMAGE, [2])
    assert single.grid_size == (1, 1) and single.cuts[0].tokens == 1
    figure([single], tmp_path / "single.png", unpool="features")


def test_mistakes_are_named(tmp_path):
    reading = read_boundaries(tower(), IMAGE, [4])
    with pytest.raises(ValueError, match="must end in .png"):
        draw_boundaries(["a"], [reading], tmp_path / "a.gif")
    with pytest.raises(ValueError, match="a label for each reading"):
        draw_boundaries([], [reading], tmp_path / "a.png")
    with pytest.raises(ValueError, match="equally many budgets"):
        draw_boundaries(["a", "b"], [reading, read_boundaries(tower(), IMAGE, [2, 4])], tmp_path / "a.png")
    with pytest.raises(ValueError, match="unpool must be one of colour, features, got 'mean'"):
        draw_boundaries(["a"], [reading], tmp_path / "a.png", unpool="mean")
    with pytest.raises(ValueError, match=r"probabilities must be \[64\] for 8 x 8 patches, got \[63\]"):
        draw_probabilities(IMAGE, reading.probabilities[:63], (8, 8))
    with pytest.raises(ValueError, match="no compression"):
        read_boundaries(tower(), IMAGE, [])
    with pytest.raises(ValueError, match="VisionTransformer: not a vision tower"):
        read_boundaries(timm.create_model("vit_tiny_patch16_224", embed_dim=48), IMAGE, [4])
    assert list(tmp_path.iterdir()) == []
