"""The range test on curves whose steepest point, minimum and divergence are known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

from llava_drip.draw.range_test import draw
from llava_drip.training.range_test import MIN_POINTS, analyse, divergence, smooth, write_json

STEEPEST = 1e-3


def losses_at(lrs: np.ndarray, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """Falls from 6.9 to 5.4 around STEEPEST (a sigmoid of log10), and rises as a parabola from 0.3 on."""
    decades = np.log10(lrs)
    fall = 1.5 / (1 + np.exp(-3 * (decades - np.log10(STEEPEST))))
    rise = 9 * np.maximum(0, decades - np.log10(0.3)) ** 2
    return 6.9 - fall + rise + noise * np.random.default_rng(seed).standard_normal(len(lrs))


def points(steps: int = 200, noise: float = 0.0, seed: int = 0) -> list[tuple[float, float]]:
    lrs = np.geomspace(1e-6, 10, steps)
    return list(zip(lrs.tolist(), losses_at(lrs, noise, seed).tolist(), strict=True))


def test_smoothing_is_the_average_with_weights_that_fall_by_beta():
    losses = [3.0, 1.0, 2.0, 5.0]
    for i, value in enumerate(smooth(losses, 0.8)):
        weights = [0.8 ** (i - j) for j in range(i + 1)]
        assert value == pytest.approx(np.average(losses[: i + 1], weights=weights))
    assert smooth(losses, 0.0) == losses
    with pytest.raises(ValueError, match="beta"):
        smooth(losses, 1.0)


def test_exact_losses_give_the_exact_points():
    result = analyse(points(500), beta=0.0)
    assert result.steepest == pytest.approx(STEEPEST, rel=0.04)  # a step is a factor of 1.033
    lrs = np.array(result.lrs)
    assert result.minimum == lrs[losses_at(lrs).argmin()] and result.tenth_of_minimum == result.minimum / 10
    # The loss is back at 6.9 and more where 9 * x**2 > 1.5.
    assert result.diverges == pytest.approx(0.3 * 10 ** math.sqrt(1.5 / 9), rel=0.04)
    assert result.notes == []


@pytest.mark.parametrize("steps", [100, 200, 400])
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
def test_averages_do_not_lag(steps, noise):
    """A plain exponential average would put the steepest point of 100 steps at 2.5 times its rate."""
    found = [analyse(points(steps, noise, seed)) for seed in range(10)]
    assert all(abs(math.log10(result.steepest / STEEPEST)) < 0.7 for result in found)
    mean = np.mean([math.log10(result.steepest) for result in found])
    assert mean == pytest.approx(math.log10(STEEPEST), abs=0.25)
    assert all(5e-4 < result.tenth_of_minimum < 5e-2 and 0.5 < result.diverges < 5 for result in found)


def test_the_scale_and_offset_of_the_loss_do_not_matter():
    """A rate loss, say, makes losses negative: the rule of fastai for divergence means nothing there."""
    measured = points(200, 0.05)
    moved = analyse([(lr, 10 * loss - 80) for lr, loss in measured])
    result = analyse(measured)
    assert moved.steepest == pytest.approx(result.steepest) and moved.minimum == pytest.approx(result.minimum)
    assert moved.diverges == result.diverges


def test_a_loss_that_only_wobbles_gives_no_suggestion():
    lrs = np.geomspace(1e-6, 1, 200)
    suggested = 0
    for seed in range(50):
        result = analyse(list(zip(lrs, 6.9 + 0.3 * np.random.default_rng(seed).standard_normal(200), strict=True)))
        suggested += result.steepest is not None
        assert result.diverges is None
    assert suggested <= 3
    constant = analyse([(lr, 2.0) for lr in lrs])
    assert (constant.steepest, constant.minimum, constant.tenth_of_minimum) == (None, None, None)
    assert "never fell clearly" in str(constant)


def test_a_loss_that_only_rises_gives_no_suggestion():
    result = analyse(list(zip(np.geomspace(1e-4, 1, 100), np.linspace(1, 3, 100), strict=True)))
    assert result.steepest is None and result.minimum is None and "begin the range lower" in result.notes[0]
    # Two factors of four, and it has diverged by fastai's rule.
    assert analyse(list(zip(np.geomspace(1e-4, 1, 100), np.geomspace(1, 16, 100), strict=True))).diverges is not None


def test_a_loss_that_still_falls_at_the_end_says_so():
    lrs = np.geomspace(1e-6, 1e-1, 200)
    result = analyse(list(zip(lrs, losses_at(lrs), strict=True)))
    assert result.steepest == pytest.approx(STEEPEST, rel=0.3)
    assert result.minimum is None and "end the range higher" in result.notes[0]
    straight = analyse(list(zip(lrs, np.linspace(3, 1, 200), strict=True)))
    assert straight.steepest is None and straight.minimum is None and len(straight.notes) == 2


@pytest.mark.parametrize("end", [math.nan, math.inf])
def test_losses_that_end_in_no_number(end):
    measured = points(200, 0.05)
    cut = [(lr, loss if i < 150 else end) for i, (lr, loss) in enumerate(measured)]
    result = analyse(cut)
    assert result.diverges == measured[150][0]
    assert result.steepest == pytest.approx(STEEPEST, rel=0.5) and result.minimum < measured[150][0]
    single = [(lr, loss if i != 150 else end) for i, (lr, loss) in enumerate(measured)]  # the rest is not to be trusted
    assert analyse(single).steepest == result.steepest and analyse(single).diverges == result.diverges


def test_divergence_can_be_asked_after_every_step():
    losses = [loss for _, loss in points(200, 0.05)]
    smoothed = smooth(losses)
    end = divergence(losses, smoothed)
    answers = [divergence(losses[:i], smoothed[:i]) for i in range(len(losses) + 1)]
    assert answers == [None] * (end + 1) + [end] * (len(losses) - end)


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        (points(200)[: MIN_POINTS - 1], f"{MIN_POINTS - 1} finite losses; at least {MIN_POINTS}"),
        (
            [(lr, math.nan if i > 4 else 1.0) for i, (lr, _) in enumerate(points())],
            "5 finite losses, then a loss of nan at",
        ),
        ([], "0 finite losses"),
        ([(0.0, 1.0), *points()], "step 1 has 0"),
        ([*points(), (1.0, 1.0)], "step 201 has 1 after 10"),
        ([*points(), (math.nan, 1.0)], "step 201 has nan"),
    ],
)
def test_what_cannot_be_analysed_is_named(measured, message):
    with pytest.raises(ValueError, match=message):
        analyse(measured)


@pytest.mark.parametrize("end", [9.0, math.nan])
def test_json_and_drawing(tmp_path, end):
    result = analyse([(lr, loss if lr < 1 else end) for lr, loss in points(200, 0.05)])
    write_json(result, tmp_path / "range_test.json")

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    read = json.loads((tmp_path / "range_test.json").read_text(), parse_constant=refuse)
    assert read["steepest"] == result.steepest and len(read["losses"]) == 200
    assert (None in read["losses"]) == math.isnan(end)
    draw(result, tmp_path / "range_test.png", "drip_mini_patch8_64_4x on shapes")
    with Image.open(tmp_path / "range_test.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)} <= colours  # the average and both suggestions
    draw(result, tmp_path / "range_test.svg")
    assert f"{result.steepest:.2e}" in (tmp_path / "range_test.svg").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {f"range_test.{ending}" for ending in ("json", "png", "svg")}
    with pytest.raises(ValueError, match="must end in"):
        draw(result, tmp_path / "range_test.jpg")
