"""Scenes of a few shapes with known truth: what is where, and which pixel belongs to which shape.

A scene is sampled from a seed and drawn by a pure function, so the same seed gives the same pixels. Some combinations
of attributes are held out: they never appear in training scenes and every test scene has at least one, so a model
answers a test question only by combining attributes that it has never seen together.

The constants below set the difficulty; everything else (texts, vocabulary, data set) follows from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

Split = Literal["train", "test"]

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
SIZES: dict[str, tuple[int, int]] = {"small": (16, 17), "large": (28, 30)}  # width in pixels, both ends included
TEXTURES = ("plain", "striped")
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")  # in raster order
BACKGROUNDS = ("plain", "gradient", "noise")
COUNT_WEIGHTS: dict[int, float] = {1: 0.45, 2: 0.55}  # how often a scene has this many shapes
# A sixth of the combinations of these attributes is held out; with one attribute fewer, everything is seen in training.
# Fewer of them make a harder test: with ("colour", "shape"), a small model learns "red is no triangle" long before it
# tells shapes apart, and a probe that knew 90 % of seen shapes was right on 1 % of the held-out ones.
HELD_OUT_ATTRIBUTES = ("colour", "shape", "texture", "size")  # the first two at least
JITTER = 2  # pixels, at most, that a shape's centre is off its quadrant's; large shapes have less room than that

_SUPERSAMPLE = 4  # shapes are drawn this much larger, then averaged down: smooth outlines
_TEXTURE_PERIOD = 4  # pixels from stripe to stripe and from dot to dot, on the image's own grid
_TEXTURE_SHADE = 0.3  # stripes and dots have the shape's colour times this
_COLOUR_JITTER = 10  # largest change of a shape's colour, per channel
_MARGIN = 1  # pixels between a shape and the border of its quadrant

_KINDS = tuple(
    {"colour": colour, "shape": shape, "texture": texture, "size": size}
    for colour, shape, texture, size in product(COLOURS, SHAPES, TEXTURES, SIZES)
)


def _is_held_out(kind: dict[str, str]) -> bool:
    """Spread evenly: for each choice of the other attributes there is one held-out colour."""
    steps = {"shape": 1, "texture": 2, "size": 3}
    tables = {"shape": SHAPES, "texture": TEXTURES, "size": tuple(SIZES)}
    colour = sum(steps[name] * tables[name].index(kind[name]) for name in HELD_OUT_ATTRIBUTES[1:])
    return kind["colour"] == list(COLOURS)[colour % len(COLOURS)]


_NOVEL = tuple(kind for kind in _KINDS if _is_held_out(kind))
HELD_OUT = frozenset(tuple(kind[name] for name in HELD_OUT_ATTRIBUTES) for kind in _NOVEL)
_FAMILIAR = tuple(kind for kind in _KINDS if kind not in _NOVEL)
NOVEL_PAIRS = frozenset((kind["colour"], kind["shape"]) for kind in _NOVEL)  # pairs of held-out shapes
SEEN_PAIRS = frozenset((kind["colour"], kind["shape"]) for kind in _FAMILIAR)  # pairs that training scenes have
_SPLIT_SEEDS = {"train": 0, "test": 1}


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
    phase: tuple[int, int]  # offset of the texture

    @property
    def pair(self) -> tuple[str, str]:
        """The (colour, shape) pair, which is unique within a scene."""
        return self.colour, self.shape

    @property
    def held_out(self) -> bool:
        """Whether no training scene has this combination of attributes."""
        return tuple(getattr(self, name) for name in HELD_OUT_ATTRIBUTES) in HELD_OUT


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
    return sample_scene(np.random.default_rng([seed, _SPLIT_SEEDS[split], index]), held_out=split == "test")


def sample_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """Draw a scene at random.

    Args:
        rng: Source of randomness.
        held_out: False: no combination of `HELD_OUT` appears. True: at least one does.
    """
    counts = list(COUNT_WEIGHTS)
    weights = np.array(list(COUNT_WEIGHTS.values()))
    count = counts[rng.choice(len(counts), p=weights / weights.sum())]

    kinds: list[dict[str, str]] = []
    while len(kinds) < count:
        pool = _KINDS if kinds and held_out else _NOVEL if held_out else _FAMILIAR
        kind = pool[rng.integers(len(pool))]
        if all((kind["colour"], kind["shape"]) != (other["colour"], other["shape"]) for other in kinds):
            kinds.append(kind)
    quadrants = rng.permutation(len(QUADRANTS))[:count]  # unrelated to which kind came first
    objects = tuple(_sample_thing(rng, kinds[i], int(quadrants[i])) for i in np.argsort(quadrants))
    return Scene(objects, _sample_background(rng))


def _sample_thing(rng: np.random.Generator, kind: dict[str, str], quadrant: int) -> Thing:
    cell = IMAGE_SIZE // 2
    low, high = SIZES[kind["size"]]
    width = int(rng.integers(low, high + 1))
    centred = (cell - width) // 2
    reach = min(JITTER, centred - _MARGIN)
    left, top = centred + rng.integers(-reach, reach + 1, size=2)
    jittered = np.array(COLOURS[kind["colour"]]) + rng.integers(-_COLOUR_JITTER, _COLOUR_JITTER + 1, size=3)
    return Thing(
        **kind,
        quadrant=QUADRANTS[quadrant],
        left=int(left) + cell * (quadrant % 2),
        top=int(top) + cell * (quadrant // 2),
        width=width,
        rgb=_as_rgb(jittered),
        phase=(int(rng.integers(_TEXTURE_PERIOD)), int(rng.integers(_TEXTURE_PERIOD))),
    )


def _sample_background(rng: np.random.Generator) -> Background:
    # Muted: a grey with little colour in it, so that no shape of COLOURS is ever lost against it.
    start, end = (rng.integers(85, 165) + rng.integers(-18, 19, size=3) for _ in range(2))
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
        shade = 1 - (1 - _TEXTURE_SHADE) * _texture(thing.texture, thing.width, thing.phase)
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
        hole = 0.22 * full
        draw.ellipse((0, 0, edge, edge), fill=255)
        draw.ellipse((hole, hole, edge - hole, edge - hole), fill=0)
    elif shape == "square":
        draw.rectangle((0, 0, edge, edge), fill=255)
    elif shape == "triangle":
        draw.polygon([(edge / 2, 0), (edge, edge), (0, edge)], fill=255)
    elif shape == "cross":
        low, high = round(0.36 * full), edge - round(0.36 * full)
        draw.rectangle((low, 0, high, edge), fill=255)
        draw.rectangle((0, low, edge, high), fill=255)
    else:
        raise ValueError(f"no drawing for shape {shape!r} of SHAPES; add it to _silhouette")
    alpha = np.asarray(image.reduce(_SUPERSAMPLE), dtype=np.float32) / 255
    alpha.flags.writeable = False  # shared by every caller
    return alpha


@cache
def _texture(texture: str, width: int, phase: tuple[int, int]) -> np.ndarray:
    """Where the texture darkens the shape: [width, width] float32 in 0..1."""
    x, y = (np.arange(width) + offset for offset in phase)
    if texture == "plain":
        dark = np.zeros((width, width), dtype=np.float32)
    elif texture == "striped":
        dark = np.repeat(((y % _TEXTURE_PERIOD) < 2)[:, None], width, axis=1).astype(np.float32)
    elif texture == "dotted":
        # Distance to the nearest dot's centre, in pixels; a dot is about 3 pixels wide with soft corners.
        dx, dy = (v % _TEXTURE_PERIOD - 1 for v in (x, y))
        dx, dy = (np.where(v > _TEXTURE_PERIOD / 2, v - _TEXTURE_PERIOD, v) for v in (dx, dy))
        distance = np.sqrt(dx[None, :] ** 2 + dy[:, None] ** 2)
        dark = np.clip(2.0 - distance, 0, 1).astype(np.float32)
    else:
        raise ValueError(f"no drawing for texture {texture!r} of TEXTURES; add it to _texture")
    dark.flags.writeable = False
    return dark
