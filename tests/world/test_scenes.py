from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest

from llava_drip.world.scenes import (
    COLOURS,
    HELD_OUT,
    HELD_OUT_ATTRIBUTES,
    IMAGE_SIZE,
    QUADRANTS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
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


@pytest.mark.parametrize("split", ["train", "test"])
def test_colour_in_the_pixels_is_the_colour_told(split):
    for scene, image, mask in drawn(split):
        for number, thing in enumerate(scene.objects, start=1):
            pixels = own_pixels(image, mask, number)
            bright = pixels[pixels.sum(1) >= np.percentile(pixels.sum(1), 80)].mean(0)  # between stripes and dots
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
    fill = {"ring": (0.45, 0.65), "square": (0.99, 1.0), "triangle": (0.44, 0.56), "cross": (0.45, 0.68)}
    assert set(fill) == set(SHAPES)
    for scene, _, mask in drawn("test"):
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) == set(range(len(scene.objects) + 1))
        for number, thing in enumerate(scene.objects, start=1):
            ys, xs = np.nonzero(mask == number)
            vertical = "top" if ys.max() < IMAGE_SIZE // 2 else "bottom" if ys.min() >= IMAGE_SIZE // 2 else "across"
            side = "left" if xs.max() < IMAGE_SIZE // 2 else "right" if xs.min() >= IMAGE_SIZE // 2 else "across"
            assert f"{vertical} {side}" == thing.quadrant
            extent = max(np.ptp(ys), np.ptp(xs)) + 1
            low, high = SIZES[thing.size]
            assert extent == thing.width and low <= extent <= high
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
            assert np.abs(bright - background.mean(0)).sum() > 60


def test_held_out_combinations():
    def combination(thing):
        return tuple(getattr(thing, name) for name in HELD_OUT_ATTRIBUTES)

    values = {"colour": COLOURS, "shape": SHAPES, "texture": TEXTURES, "size": SIZES}
    everything = set(product(*(values[name] for name in HELD_OUT_ATTRIBUTES)))
    assert everything >= HELD_OUT and len(HELD_OUT) == len(everything) // 6
    seen = {combination(thing) for i in range(2000) for thing in scene_at(0, "train", i).objects}
    assert seen == everything - HELD_OUT
    for some in combinations(range(len(HELD_OUT_ATTRIBUTES)), len(HELD_OUT_ATTRIBUTES) - 1):  # all but one are seen
        assert {tuple(c[i] for i in some) for c in seen} == {tuple(c[i] for i in some) for c in everything}
    tested = [{combination(thing) for thing in scene_at(0, "test", i).objects} & HELD_OUT for i in range(500)]
    assert all(tested)
    assert set().union(*tested) == HELD_OUT
    thing = scene_at(0, "train", 0).objects[0]
    assert not thing.held_out
    assert replace(thing, **dict(zip(HELD_OUT_ATTRIBUTES, sorted(HELD_OUT)[0]))).held_out


def test_scene_truth_is_well_formed():
    for index in range(300):
        scene = scene_at(3, "train", index)
        quadrants = [QUADRANTS.index(thing.quadrant) for thing in scene.objects]
        assert 1 <= len(quadrants) <= 4 and quadrants == sorted(set(quadrants))
        assert len({thing.pair for thing in scene.objects}) == len(scene.objects)
        for thing in scene.objects:
            assert thing.texture in TEXTURES and thing.size in SIZES


def test_same_seed_same_pixels_and_other_seeds_others():
    def pixels(seed, split):
        return np.stack([render(scene_at(seed, split, i))[0] for i in range(20)])

    assert np.array_equal(pixels(0, "train"), pixels(0, "train"))
    assert not np.array_equal(pixels(0, "train"), pixels(1, "train"))
    assert not np.array_equal(pixels(0, "train"), pixels(0, "test"))


def test_drawing_one_scene_twice_does_not_change_it():
    scene = scene_at(0, "train", 5)
    first, _ = render(scene)
    again, _ = render(Scene(scene.objects, scene.background))
    assert np.array_equal(first, again)
