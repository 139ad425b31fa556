"""Plots of results: what is drawn is where the numbers are, and texts do not cover each other."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from llava_drip.draw.results import MARKERS, PALETTE, Curve, Point, Style, draw_curves, draw_points, draw_results


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def test_curves_and_points_share_their_colours(tmp_path):
    curves = [Curve("a", [1, 2, 3], [0.1, 0.5, 0.7]), Curve("b", [1, 2], [0.2, 0.4], [0.1, 0.3], [0.3, 0.5])]
    points = [Point("b", 4.0, 0.4, 0.3, 0.5, "16 tokens"), Point("a", 17.5, 0.7)]
    draw_results(tmp_path / "both.png", "top-1 accuracy", curves, points)
    with Image.open(tmp_path / "both.png") as picture:
        assert picture.width == 1600
        left, right = (picture.crop((x, 0, x + 800, picture.height)).convert("RGB") for x in (0, 800))
    for half in (left, right):
        colours = {colour for _, colour in half.getcolors(1 << 20)}
        assert {rgb(PALETTE[0]), rgb(PALETTE[1])} <= colours and rgb(PALETTE[2]) not in colours


def test_one_of_the_two_alone(tmp_path):
    draw_results(tmp_path / "curves.svg", "loss", [Curve("a", [1], [2.0])], percent=False)
    draw_results(tmp_path / "points.png", "top-1 accuracy", [], [Point("a", 1.0, 0.5)])
    with Image.open(tmp_path / "points.png") as picture:
        assert picture.width == 800
    assert "loss (%)" not in (tmp_path / "curves.svg").read_text()
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_results(tmp_path / "none.png", "loss", [])
    with pytest.raises(ValueError, match="must end in"):
        draw_results(tmp_path / "plot.jpg", "loss", [Curve("a", [1], [2.0])])
    assert {path.name for path in tmp_path.iterdir()} == {"curves.svg", "points.png"}


def test_axes_hold_the_values_and_little_else():
    axes = Figure().subplots()
    draw_curves(axes, "top-1 accuracy", [Curve("a", [1, 30], [0.0, 0.999])], True, Style())
    low, high = axes.get_ylim()
    assert -1 <= low <= 0 and 99.9 <= high <= 101 and axes.get_xlim()[0] == 0 and axes.get_xlim()[1] >= 30
    axes = Figure().subplots()
    draw_curves(axes, "top-1 accuracy", [Curve("a", [1, 2], [0.700, 0.701])], True, Style())
    low, high = axes.get_ylim()
    assert high - low >= 4  # a tenth of a percent does not fill the axis
    axes = Figure().subplots()
    draw_curves(axes, "loss", [Curve("a", [1], [-3.0])], False, Style())
    assert axes.get_ylim()[0] < -3 < axes.get_ylim()[1]


def test_texts_beside_close_points_do_not_cover_each_other():
    figure = Figure(figsize=(6.4, 4.6), dpi=125, layout="constrained")
    axes = figure.subplots()
    points = [
        Point(f"a rather long label {i}", 4 + 0.3 * i, 0.70 + 0.004 * (i % 2), note="49 tokens, 4.0x") for i in range(4)
    ]
    points.append(Point("the far one at the edge", 17.5, 0.76, note="196 tokens, 1.0x"))
    draw_points(figure, axes, "top-1 accuracy", points, True, Style())
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines to markers
    assert [text.get_text().splitlines()[0] for text in axes.texts] == [point.label for point in points]
    frame = axes.get_window_extent()
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1


def test_twenty_labels_look_different():
    style = Style()
    looks = [tuple(style.of(str(i)).values()) for i in range(20)]
    assert len(set(looks)) == 20 and style.of("0") == style.of("0")
    assert len(set(PALETTE)) == len(PALETTE) == len(set(MARKERS))
