import numpy as np
import pytest
import torch
from PIL import Image

from llava_drip.draw.overlay import draw_segments, overlay_grid

# 2 x 2 patches of 8 pixels: red and green above, blue and blue below; the last two are one segment
COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 0, 255]]], dtype=np.uint8)
IMAGE = Image.fromarray(COLOURS.repeat(8, axis=0).repeat(8, axis=1))
SEGMENTS = torch.tensor([0, 1, 2, 2])
CELL = 224  # 448 pixels over two patches


def test_borders_lie_on_the_edges_between_segments_only():
    plain = np.asarray(draw_segments(IMAGE, SEGMENTS, (2, 2), borders=False)).astype(int)
    drawn = np.asarray(draw_segments(IMAGE, SEGMENTS, (2, 2))).astype(int)
    assert plain.shape == drawn.shape == (2 * CELL, 2 * CELL, 3)
    changed = np.abs(plain - drawn).sum(-1) > 0
    middle = CELL // 2
    assert changed[middle, CELL] and (drawn[middle, CELL] == 255).all()  # between segments 0 and 1, above
    assert not changed[CELL + middle, CELL]  # within segment 2, below
    assert changed[CELL, middle] and changed[CELL, CELL + middle]  # between the rows
    far = np.ones_like(changed)
    far[CELL - 20 : CELL + 20] = False
    far[: CELL + 20, CELL - 20 : CELL + 20] = False
    assert not changed[far].any()


def test_mean_fill_is_the_mean_of_each_segment():
    mixed = draw_segments(IMAGE, torch.tensor([0, 0, 1, 1]), (2, 2), fill="mean", borders=False)
    assert mixed.getpixel((5, 5)) == (128, 128, 0)
    assert mixed.getpixel((2 * CELL - 5, 5)) == (128, 128, 0)
    assert mixed.getpixel((5, 2 * CELL - 5)) == (0, 0, 255)


def test_tint_is_one_colour_per_segment():
    grey = Image.new("RGB", (16, 16), (128, 128, 128))
    tinted = draw_segments(grey, SEGMENTS, (2, 2), fill="tint", borders=False)
    a, b, c, d = (tinted.getpixel(xy) for xy in ((5, 5), (CELL + 5, 5), (5, CELL + 5), (CELL + 5, CELL + 5)))
    assert c == d and len({a, b, c}) == 3


@pytest.mark.parametrize("fill", ["none", "tint", "mean"])
def test_dropped_patches_are_darkened_and_nothing_else(fill):
    grey, kept = Image.new("RGB", (16, 16), (200, 100, 40)), torch.tensor([0, -1, 1, -1])
    picture = draw_segments(grey, kept, (2, 2), fill=fill, borders=False)
    left, right = picture.getpixel((5, 5)), picture.getpixel((CELL + 5, 5))
    assert right == picture.getpixel((CELL + 5, CELL + 5)) == (50, 25, 10)
    whole = draw_segments(grey, torch.tensor([0, 0, 1, 1]), (2, 2), fill=fill, borders=False)
    assert left == whole.getpixel((5, 5)) and picture.getpixel((5, CELL + 5)) == whole.getpixel((5, CELL + 5))
    drawn = draw_segments(grey, kept, (2, 2), fill=fill)
    assert drawn.getpixel((CELL, CELL // 2)) == (255, 255, 255)  # a border between kept and dropped
    assert drawn.getpixel((CELL + CELL // 2, CELL)) == (50, 25, 10)  # none between two dropped ones
    nothing = draw_segments(grey, torch.full((4,), -1), (2, 2), fill=fill)
    assert set(nothing.getcolors()) == {(4 * CELL * CELL, (50, 25, 10))}


def test_any_patch_count_gives_whole_cells():
    for side, grid in ((224, 14), (336, 24), (64, 8), (1000, 7)):
        segments = torch.arange(grid * grid) // 3
        picture = draw_segments(Image.new("RGB", (side, side)), segments, (grid, grid))
        assert picture.width == picture.height and picture.width % grid == 0 and picture.width >= max(side, 448)
    wide = draw_segments(Image.new("L", (32, 16)), torch.zeros(8, dtype=torch.long), (2, 4))
    assert wide.size == (448, 224) and wide.mode == "RGB"


def test_contact_sheet(tmp_path):
    path = tmp_path / "sheet.png"
    overlay_grid([IMAGE] * 5, SEGMENTS.expand(5, 4), (2, 2), [f"image {i}" for i in range(5)], path)
    with Image.open(path) as sheet:
        assert sheet.format == "PNG" and sheet.width > 800
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(1 << 20)}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255)} <= colours
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]
    overlay_grid([IMAGE], [SEGMENTS], (2, 2), ["one"], path)
    with Image.open(path) as sheet:
        assert sheet.width < 800


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"segments must be \[4\] for a grid of 2 x 2 patches, got \[3\]"):
        draw_segments(IMAGE, SEGMENTS[:3], (2, 2))
    with pytest.raises(ValueError, match="token indices"):
        draw_segments(IMAGE, SEGMENTS - 2, (2, 2))
    with pytest.raises(ValueError, match="fill must be one of none, tint, mean"):
        draw_segments(IMAGE, SEGMENTS, (2, 2), fill="blur")
    with pytest.raises(ValueError, match="as many images"):
        overlay_grid([IMAGE], SEGMENTS[None], (2, 2), [], tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []
