"""Scenes of a few shapes with known truth: what is where, and which pixel belongs to which shape.

A scene is sampled from a seed and drawn by a pure function, so the same seed gives the same pixels. What is held out
are pairs of kinds, a kind being a colour with a shape: about a sixth of all pairs of different kinds (`HELD_OUT`), such
as a red ring beside a green ring, never share a scene for training, and every test scene has two or three shapes with
at least one such pair among them, whatever their places, textures and sizes. Each kind by itself is common in training,
so a test asks whether shapes are seen one by one and not only in the company they were trained in.

There are two splits for training. "pretrain", for the tower, has mostly one shape a scene: pictures in a batch then
often differ in one attribute alone, which a contrastive loss can only tell apart by learning that attribute. "train",
for the assistant, has mostly two or three: with one there is nothing to look up.

The constants below set the difficulty; everything else (texts, vocabulary, data set) follows from them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

Split = Literal["pretrain", "train", "test"]

IMAGE_SIZE = 64  # pixels, both sides; a quadrant is half of it
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "green": (40, 185, 50),
    "blue": (45, 75, 240),
    "yellow": (245, 220, 40),
    "purple": (190, 50, 215),
    "cyan": (50, 220, 230),
}
SHAPES = ("ring", "square", "cross")
SIZES = {"small": 16, "large": 30}  # width in pixels
TEXTURES = ("plain", "striped")
QUADRANTS = ("northwest", "northeast", "southwest", "southeast")  # in raster order
BACKGROUNDS = ("plain", "gradient", "noise")
# How often a scene has this many shapes; fewer than two cannot hold a held-out pair.
COUNT_WEIGHTS: dict[Split, dict[int, float]] = {
    "pretrain": {1: 0.65, 2: 0.25, 3: 0.10},
    "train": {1: 0.20, 2: 0.50, 3: 0.30},
    "test": {2: 0.70, 3: 0.30},
}

_SUPERSAMPLE = 4  # shapes are drawn this much larger, then averaged down: smooth outlines
_TEXTURE_PERIOD = 4  # pixels from stripe to stripe, on the image's own grid
_TEXTURE_SHADE = 0.4  # stripes have the shape's colour times this
_COLOUR_JITTER = 10  # largest change of a shape's colour, per channel
Kind = tuple[str, str]  # (colour, shape)
KINDS: tuple[Kind, ...] = tuple(product(COLOURS, SHAPES))


def _never_meet(one: Kind, other: Kind) -> bool:
    """Symmetric, and even: a kind never meets one kind of each shape, and these have different colours.

    Why pairs of shapes and not a combination of one shape's attributes: of the latter a small model learns "what is
    red is no ring" from training, and is then below chance on the very shapes that are held out.
    """
    colours, shapes = list(COLOURS), list(SHAPES)
    total = sum(colours.index(colour) + shapes.index(shape) for colour, shape in (one, other))
    return total % len(colours) == 1


HELD_OUT: frozenset[frozenset[Kind]] = frozenset(
    frozenset(pair) for pair in combinations(KINDS, 2) if _never_meet(*pair)
)
_SPLIT_SEEDS = {"train": 0, "test": 1, "pretrain": 2}


@dataclass(frozen=True)
class Thing:
    """One shape of a scene. Words are those of the constants above; lengths are in pixels."""

    shape: str
    colour: str
    size: str
    texture: str
    quadrant: str
    left: int
    top: int
    width: int  # of its square bounding box
    rgb: tuple[int, int, int]  # its own, jittered colour

    @property
    def kind(self) -> Kind:
        """Its colour and shape, which no other shape of the scene has together."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Background:
    """A muted background: one colour, a straight gradient between two, or one colour with grain."""

    kind: str
    start: tuple[int, int, int]
    end: tuple[int, int, int]
    angle: float  # of the gradient, radians
    seed: int  # of the grain


@dataclass(frozen=True)
class Scene:
    """Shapes in raster order of their quadrants (at most one in each), on a background."""

    objects: tuple[Thing, ...]
    background: Background


def scene_at(seed: int, split: Split, index: int) -> Scene:
    """Scene number `index` of a split: the same for any data set size, and never shared between splits."""
    return sample_scene(np.random.default_rng([seed, _SPLIT_SEEDS[split], index]), split)


def held_out_pairs(kinds: Iterable[Kind]) -> list[frozenset[Kind]]:
    """Those pairs among a scene's kinds that no training scene has."""
    return [pair for pair in map(frozenset, combinations(kinds, 2)) if pair in HELD_OUT]


def sample_scene(rng: np.random.Generator, split: Split) -> Scene:
    """Draw a scene at random: "test" with at least one pair of `HELD_OUT`, the others without any."""
    counts = list(COUNT_WEIGHTS[split])
    weights = np.array(list(COUNT_WEIGHTS[split].values()))
    count = counts[rng.choice(len(counts), p=weights / weights.sum())]

    kinds = _sample_kinds(rng, count)
    while bool(held_out_pairs(kinds)) != (split == "test"):
        kinds = _sample_kinds(rng, count)
    quadrants = np.sort(rng.permutation(len(QUADRANTS))[:count])
    objects = tuple(_sample_thing(rng, kind, int(quadrant)) for kind, quadrant in zip(kinds, quadrants, strict=True))
    return Scene(objects, _sample_background(rng))


def _sample_kinds(rng: np.random.Generator, count: int) -> list[Kind]:
    """Different kinds in random order."""
    return [KINDS[i] for i in rng.permutation(len(KINDS))[:count]]


def _sample_thing(rng: np.random.Generator, kind: Kind, quadrant: int) -> Thing:
    colour, shape = kind
    size = list(SIZES)[rng.integers(len(SIZES))]
    cell = IMAGE_SIZE // 2
    width = SIZES[size]
    offset = (cell - width) // 2  # in the middle of its quadrant
    jittered = np.array(COLOURS[colour]) + rng.integers(-_COLOUR_JITTER, _COLOUR_JITTER + 1, size=3)
    return Thing(
        shape=shape,
        colour=colour,
        size=size,
        texture=TEXTURES[rng.integers(len(TEXTURES))],
        quadrant=QUADRANTS[quadrant],
        left=offset + cell * (quadrant % 2),
        top=offset + cell * (quadrant // 2),
        width=width,
        rgb=_as_rgb(jittered),
    )


def _sample_background(rng: np.random.Generator) -> Background:
    # Dark, with little colour in it: every shape of COLOURS is brighter, in its strongest channel, than what is behind it.
    start, end = (rng.integers(25, 80) + rng.integers(-12, 13, size=3) for _ in range(2))
    return Background(
        kind=str(rng.choice(BACKGROUNDS)),
        start=_as_rgb(start),
        end=_as_rgb(end),
        angle=float(rng.uniform(0, 2 * np.pi)),
        seed=int(rng.integers(2**32)),
    )


def _as_rgb(values: np.ndarray) -> tuple[int, int, int]:
    r, g, b = (int(v) for v in np.clip(values, 0, 255))
    return r, g, b


def render(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene.

    Returns:
        image: [IMAGE_SIZE, IMAGE_SIZE, 3] uint8, RGB.
        mask: [IMAGE_SIZE, IMAGE_SIZE] uint8; 0 is background, i + 1 is `scene.objects[i]`.
    """
    canvas = _draw_background(scene.background)
    mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    for number, thing in enumerate(scene.objects, start=1):
        box = np.s_[thing.top : thing.top + thing.width, thing.left : thing.left + thing.width]
        alpha = _silhouette(thing.shape, thing.width)
        shade = 1 - (1 - _TEXTURE_SHADE) * _texture(thing.texture, thing.top, thing.width)
        paint = shade[..., None] * np.array(thing.rgb, dtype=np.float32)
        canvas[box] += alpha[..., None] * (paint - canvas[box])
        mask[box][alpha >= 0.5] = number
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8), mask


def _draw_background(background: Background) -> np.ndarray:
    """[IMAGE_SIZE, IMAGE_SIZE, 3] float32 in 0..255."""
    start = np.array(background.start, dtype=np.float32)
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    canvas[:] = start
    if background.kind == "gradient":
        along = np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)
        ramp = np.cos(background.angle) * along[None, :] + np.sin(background.angle) * along[:, None]
        ramp = (ramp - ramp.min()) / (ramp.max() - ramp.min())
        canvas += ramp[..., None] * (np.array(background.end, dtype=np.float32) - start)
    elif background.kind == "noise":
        # Coarse blotches and fine grain, both of little colour.
        rng = np.random.default_rng(background.seed)
        coarse = rng.normal(0, 9, (IMAGE_SIZE // 4, IMAGE_SIZE // 4, 3)).repeat(4, axis=0).repeat(4, axis=1)
        canvas += coarse.astype(np.float32)
        canvas += 10 * rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE, 1), dtype=np.float32)
    else:
        assert background.kind == "plain", background.kind
    return canvas


@cache
def _silhouette(shape: str, width: int) -> np.ndarray:
    """How much of each pixel the shape covers: [width, width] float32 in 0..1."""
    full = width * _SUPERSAMPLE
    image = Image.new("L", (full, full), 0)
    draw = ImageDraw.Draw(image)
    edge = full - 1
    if shape == "ring":
        hole = 0.3 * full
        draw.ellipse((0, 0, edge, edge), fill=255)
        draw.ellipse((hole, hole, edge - hole, edge - hole), fill=0)
    elif shape == "square":
        draw.rectangle((0, 0, edge, edge), fill=255)
    elif shape == "cross":
        low, high = round(0.38 * full), edge - round(0.38 * full)
        draw.rectangle((low, 0, high, edge), fill=255)
        draw.rectangle((0, low, edge, high), fill=255)
    else:
        raise ValueError(f"no drawing for shape {shape!r} of SHAPES; add it to _silhouette")
    alpha = np.asarray(image.reduce(_SUPERSAMPLE), dtype=np.float32) / 255
    alpha.flags.writeable = False  # shared by every caller
    return alpha


@cache
def _texture(texture: str, top: int, width: int) -> np.ndarray:
    """Where the texture darkens the shape: [width, width] float32, 0 or 1."""
    dark = np.zeros((width, width), dtype=np.float32)
    if texture == "striped":
        dark[np.arange(top, top + width) % _TEXTURE_PERIOD < 2] = 1
    elif texture != "plain":
        raise ValueError(f"no drawing for texture {texture!r} of TEXTURES; add it to _texture")
    dark.flags.writeable = False  # shared by every caller
    return dark
