"""Captions and questions about a scene, with the one right answer known.

Wording is plain and the vocabulary closed (about 50 words): a small language model is to learn to look, not to
paraphrase. For the same reason a shape is named by its place only, a place is one word, and what is said of a shape
follows its place at once, in captions as in answers ("northwest red"): a small model learns to look up what lies at the
word it has just read long before it learns to carry a place from a question to where the answer begins. The answers are
spread so that one given without the image is rarely right; `blind_accuracy` measures how rarely.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llava_drip.world.scenes import SIZES, TEXTURES, Scene, Thing

# How often each kind is asked, while a scene still has something of the kind to ask.
KIND_WEIGHTS: dict[str, float] = {"colour": 0.27, "shape": 0.27, "texture": 0.18, "size": 0.18, "count": 0.10}
NUMBERS = ("zero", "one", "two", "three", "four")


@dataclass(frozen=True)
class Question:
    """A question with its answer (lower case; a word, behind the place if there is one) and its kind, of `KIND_WEIGHTS`."""

    text: str
    answer: str
    kind: str


def describe(thing: Thing) -> str:
    """All attributes of a shape: "northwest small striped red ring"."""
    return f"{thing.quadrant} {thing.size} {thing.texture} {thing.colour} {thing.shape}"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Every attribute of every shape, shapes in any order: "northwest small striped red ring, southeast large ..."."""
    return ", ".join(describe(scene.objects[i]) for i in rng.permutation(len(scene.objects)))


def questions(scene: Scene, rng: np.random.Generator, count: int) -> list[Question]:
    """Ask up to `count` different questions about a scene, in random order; none is answered by another of them.

    Args:
        scene: The scene.
        rng: Source of randomness.
        count: How many questions; fewer come back only when the scene has no more.
    """
    how_many = Question("How many shapes are there?", NUMBERS[len(scene.objects)], "count")
    # Decided first: were it asked when nothing else is left, "one" would be the answer more often than scenes have one.
    asked = [how_many] if rng.random() < count * KIND_WEIGHTS["count"] / sum(KIND_WEIGHTS.values()) else []
    left = _about_things(scene)
    while any(left.values()) and len(asked) < count:
        kinds = [kind for kind in left if left[kind]]
        weights = np.array([KIND_WEIGHTS[kind] for kind in kinds])
        pool = left[kinds[rng.choice(len(kinds), p=weights / weights.sum())]]
        asked.append(pool.pop(rng.integers(len(pool))))
    return [asked[i] for i in rng.permutation(len(asked))]


def _about_things(scene: Scene) -> dict[str, list[Question]]:
    """Every question about a shape of the scene, by kind."""
    found = defaultdict(list)
    for thing in scene.objects:
        place = f"in the {thing.quadrant}"
        for kind, text in {
            "colour": f"What colour is the shape {place}?",
            "shape": f"Which shape is {place}?",
            "texture": f"Is the shape {place} {' or '.join(TEXTURES)}?",
            "size": f"Is the shape {place} {' or '.join(SIZES)}?",
        }.items():
            found[kind].append(Question(text, f"{thing.quadrant} {getattr(thing, kind)}", kind))
    return found


def blind_accuracy(test: Iterable[tuple[str, str]], known: Sequence[tuple[str, str]] | None = None) -> float:
    """How often the best answer to each question text, chosen without seeing the image, is right.

    Args:
        test: (key, answer) pairs to be answered; the key is the question's text, or its kind for a coarser guess.
        known: Pairs from which the most frequent answer per key is taken. None: the test pairs themselves, the ceiling
            for any model that does not look. A key that is not known counts as wrong.

    Raises:
        ValueError: There is no test pair.
    """
    test = list(test)
    if not test:
        raise ValueError("blind_accuracy needs at least one test question")
    counts: dict[str, Counter] = defaultdict(Counter)
    for key, answer in test if known is None else known:
        counts[key][answer] += 1
    best = {key: counter.most_common(1)[0][0] for key, counter in counts.items()}
    return sum(best.get(key) == answer for key, answer in test) / len(test)
