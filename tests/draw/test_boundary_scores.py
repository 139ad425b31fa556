"""The plot of measured boundaries."""

from __future__ import annotations

import pytest
from PIL import Image

from llava_drip.draw.boundary_scores import Scored, draw_boundary_scores

TOWERS = [
    Scored(f"{rule} {scan}", rule, scan, [0.1 * i + 0.3, 0.1 * i + 0.35], [0.4, 0.5], 0.18, [0.8, 0.9])
    for i, (rule, scan) in enumerate([("gumbel", "raster"), ("gumbel", "hilbert"), ("uniform", "raster")])
]


def test_it_grows_with_what_it_shows_and_is_the_same_again(tmp_path):
    heights = {}
    for count in (1, 30):
        towers = (TOWERS * 10)[:count]
        draw_boundary_scores(tmp_path / "plot.png", towers, "Task: patches", "mean IoU")
        written = (tmp_path / "plot.png").read_bytes()
        heights[count] = Image.open(tmp_path / "plot.png").height
        draw_boundary_scores(tmp_path / "plot.png", towers, "Task: patches", "mean IoU")
        assert (tmp_path / "plot.png").read_bytes() == written
    assert heights[30] > heights[1]
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_boundary_scores(tmp_path / "plot.png", [], "", "")
    with pytest.raises(ValueError, match="must end in"):
        draw_boundary_scores(tmp_path / "plot.txt", TOWERS, "", "")
