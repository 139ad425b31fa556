import numpy as np
import pytest

from llava_drip.world.edges import boundary_f1, score_boundaries, shown_by_patches, true_boundaries
from llava_drip.world.scenes import render, scene_at


def test_boundaries_by_hand():
    # 2 x 3 patches of 2 x 2 pixels; the middle one of the first row and the first of the second row show thing 1
    mask = np.array(
        [
            [0, 0, 1, 1, 0, 1],
            [0, 0, 1, 0, 0, 0],
            [1, 1, 0, 1, 0, 0],
            [1, 1, 0, 1, 0, 0],  # a tie in the middle: the lowest id, background
        ],
        dtype=np.uint8,
    )
    assert shown_by_patches(mask, (2, 3)).tolist() == [0, 1, 0, 1, 0, 0]
    assert true_boundaries(mask, (2, 3)).tolist() == [True, True, True, True, False]
    serpentine = [0, 1, 2, 5, 4, 3]  # along it they show 0 1 0 0 0 1
    assert true_boundaries(mask, (2, 3), serpentine).tolist() == [True, True, False, False, True]


def test_an_empty_scene_has_no_boundary_and_neighbouring_things_have_one():
    assert not true_boundaries(np.zeros((64, 64), np.uint8), (8, 8)).any()
    mask = np.zeros((16, 32), np.uint8)
    mask[:, :16], mask[:, 16:] = 3, 7
    assert true_boundaries(mask, (1, 2)).tolist() == [True]


def test_rendered_scenes_have_some_boundaries():
    counts = [true_boundaries(render(scene_at(0, "test", i))[1], (8, 8)).sum() for i in range(100)]
    assert 3 < np.mean(counts) < 32


def test_scores_by_hand():
    pred = np.array([[1, 1, 0, 0], [0, 0, 0, 0]], bool)
    truth = np.array([[1, 0, 0, 0], [0, 0, 0, 1]], bool)
    scores = score_boundaries(pred, truth)
    assert scores.precision == 0.5 and scores.recall == 0.5 and scores.f1 == 0.5
    assert scores.chance_precision == 0.25 and scores.chance_f1 == 0.25
    assert boundary_f1(truth, truth) == 1.0
    assert boundary_f1(np.zeros(4, bool), truth[0]) == 0.0
    assert boundary_f1(np.zeros(4, bool), np.zeros(4, bool)) == 0.0


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="does not divide"):
        true_boundaries(np.zeros((64, 64), np.uint8), (7, 8))
    with pytest.raises(ValueError, match=r"\[H, W\] integers"):
        true_boundaries(np.zeros((64, 64), np.float32), (8, 8))
    for order in ([0, 1, 2], [0, 0, 1, 2]):
        with pytest.raises(ValueError, match="permutation of 4 patches"):
            true_boundaries(np.zeros((4, 4), np.uint8), (2, 2), order)
    with pytest.raises(ValueError, match="same, non-empty shape"):
        boundary_f1(np.zeros(3, bool), np.zeros(4, bool))
