from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest

from llava_drip.world.scenes import (
    COLOURS,
    COUNT_WEIGHTS,
    HELD_OUT,
    IMAGE_SIZE,
    QUADRANTS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    held_out_pairs,
    render,
    scene_at,
)

NUM_SCENES = 150


def drawn(split: str, number: int = NUM_SCENES):
    for index in range(number):
        scene = scene_at(0, split, index)
        yield scene, *render(scene)


def core_of(mask: np.ndarray, number: int) -> np.ndarray:
    """[H, W] bool: a shape without its outline, where colour mixes with the background."""
    inside = mask == number
    core = inside.copy()
    for axis in (0, 1):
        for step in (-1, 1):
            core &= np.roll(inside, step, axis)
    return core


def own_pixels(image: np.ndarray, mask: np.ndarray, number: int) -> np.ndarray:
    """[n, 3] pixels of a shape's core."""
    return image[core_of(mask, number)].astype(float)


@pytest.mark.parametrize("split", ["pretrain", "train", "test"])
def test_colour_in_the_pixels_is_the_colour_told(split):
    for scene, image, mask in drawn(split):
        for number, thing in enumerate(scene.objects, start=1):
            pixels = own_pixels(image, mask, number)
            bright = pixels[pixels.sum(1) >= np.percentile(pixels.sum(1), 80)].mean(0)  # between stripes
            distances = {name: np.abs(bright - rgb).sum() for name, rgb in COLOURS.items()}
            assert min(distances, key=distances.get) == thing.colour


def test_texture_in_the_pixels_is_the_texture_told():
    for scene, image, mask in drawn("train"):
        for number, thing in enumerate(scene.objects, start=1):
            pixels = own_pixels(image, mask, number).sum(1)
            dark = (pixels < 0.6 * pixels.max()).mean()
            assert (dark > 0.05) == (thing.texture != "plain")
            if thing.texture == "striped":  # stripes lie across: brightness varies between rows much more than within
                bright = image.sum(-1, dtype=float)
                core = core_of(mask, number)
                rows = [bright[r][core[r]] for r in range(IMAGE_SIZE) if core[r].any()]
                assert np.std([row.mean() for row in rows]) > 5 * np.mean([row.std() for row in rows])


def test_mask_agrees_with_place_size_and_shape():
    fill = {"ring": (0.6, 0.72), "square": (0.99, 1.0), "cross": (0.36, 0.48)}
    assert set(fill) == set(SHAPES)
    for scene, _, mask in drawn("test"):
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) == set(range(len(scene.objects) + 1))
        for number, thing in enumerate(scene.objects, start=1):
            ys, xs = np.nonzero(mask == number)
            vertical = "north" if ys.max() < IMAGE_SIZE // 2 else "south" if ys.min() >= IMAGE_SIZE // 2 else "across"
            side = "west" if xs.max() < IMAGE_SIZE // 2 else "east" if xs.min() >= IMAGE_SIZE // 2 else "across"
            assert f"{vertical}{side}" == thing.quadrant
            extent = max(np.ptp(ys), np.ptp(xs)) + 1
            assert extent == thing.width == SIZES[thing.size]
            low, high = fill[thing.shape]
            assert low <= len(ys) / thing.width**2 <= high
            corner = mask[thing.top, thing.left] == number
            assert corner == (thing.shape == "square")


def test_shapes_stand_out_from_the_background():
    for scene, image, mask in drawn("test"):
        background = image[mask == 0].astype(float)
        for number in range(1, len(scene.objects) + 1):
            pixels = own_pixels(image, mask, number)
            bright = pixels[pixels.sum(1) >= np.percentile(pixels.sum(1), 60)].mean(0)
            assert bright.max() - background.mean(0).max() > 60


def pairs_of(scene: Scene) -> set[frozenset]:
    return {frozenset(pair) for pair in combinations([(t.colour, t.shape) for t in scene.objects], 2)}


def test_a_sixth_of_the_pairs_of_kinds_is_held_out_evenly():
    kinds = list(product(COLOURS, SHAPES))
    everything = {frozenset(pair) for pair in combinations(kinds, 2)}
    assert everything > HELD_OUT and abs(len(HELD_OUT) / len(everything) - 1 / 6) < 0.02
    for kind in kinds:  # what a kind's partner is says nothing about the shape, and no colour is missed twice
        partners = [other for pair in HELD_OUT if kind in pair for other in pair - {kind}]
        assert sorted(shape for _, shape in partners) == sorted(SHAPES)
        assert len({colour for colour, _ in partners}) == len(SHAPES)


def test_held_out_pairs_never_meet_in_training_and_always_in_a_test():
    trained, alone, together = set(), set(), set()
    for index in range(6000):
        for scene in (scene_at(0, "train", index), scene_at(0, "pretrain", index)):
            trained |= pairs_of(scene)
            (alone if len(scene.objects) == 1 else together).update(t.kind for t in scene.objects)
    kinds = set(product(COLOURS, SHAPES))
    assert trained == {frozenset(pair) for pair in combinations(kinds, 2)} - HELD_OUT
    assert alone == together == kinds

    tested = [pairs_of(scene_at(0, "test", i)) & HELD_OUT for i in range(1000)]
    assert all(tested)
    assert set().union(*tested) == HELD_OUT
    one, other = sorted(next(iter(HELD_OUT)))
    assert held_out_pairs([one, other]) == [frozenset({one, other})] and held_out_pairs([one]) == []


@pytest.mark.parametrize("split", ["pretrain", "train", "test"])
def test_counts_and_kinds_are_as_frequent_as_told(split):
    scenes = [scene_at(1, split, i) for i in range(3000)]
    counts = Counter(len(scene.objects) for scene in scenes)
    assert set(counts) == set(COUNT_WEIGHTS[split])
    for count, share in COUNT_WEIGHTS[split].items():
        assert counts[count] / len(scenes) == pytest.approx(share, abs=0.04)
    for name, values in (("colour", COLOURS), ("shape", SHAPES), ("texture", TEXTURES), ("quadrant", QUADRANTS)):
        found = Counter(getattr(thing, name) for scene in scenes for thing in scene.objects)
        for value in values:
            assert found[value] / found.total() == pytest.approx(1 / len(values), abs=0.03)


def test_scene_truth_is_well_formed():
    for index in range(300):
        scene = scene_at(3, "train", index)
        quadrants = [QUADRANTS.index(thing.quadrant) for thing in scene.objects]
        assert 1 <= len(quadrants) <= 3 and quadrants == sorted(set(quadrants))
        assert len({thing.kind for thing in scene.objects}) == len(scene.objects)
        for thing in scene.objects:
            assert thing.texture in TEXTURES and thing.size in SIZES


def test_same_seed_same_pixels_and_other_seeds_others():
    def pixels(seed, split):
        return np.stack([render(scene_at(seed, split, i))[0] for i in range(20)])

    assert np.array_equal(pixels(0, "train"), pixels(0, "train"))
    assert not np.array_equal(pixels(0, "train"), pixels(1, "train"))
    assert not np.array_equal(pixels(0, "train"), pixels(0, "test"))
    assert not np.array_equal(pixels(0, "train"), pixels(0, "pretrain"))


def test_drawing_one_scene_twice_does_not_change_it():
    scene = scene_at(0, "train", 5)
    first, _ = render(scene)
    again, _ = render(Scene(scene.objects, scene.background))
    assert np.array_equal(first, again)
