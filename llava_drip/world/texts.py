"""Captions and questions about a scene, with the one right answer known.

Wording is plain and the vocabulary closed (about 60 words): a small language model is to learn to look, not to
paraphrase. A question names a shape only in ways that fit no other shape of the scene. Kinds of question, ways of
naming and yes/no are balanced so that an answer given without the image is rarely right; `blind_accuracy` measures how
rarely.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llava_drip.world.scenes import KINDS, TEXTURES, Scene, Thing

# How often each kind is asked, while a scene still has something of the kind to ask.
KIND_WEIGHTS: dict[str, float] = {
    "colour": 0.22,
    "shape": 0.20,
    "position": 0.18,
    "texture": 0.11,
    "size": 0.09,
    "count": 0.08,
    "exist": 0.12,
}
PLACE_SHARE = 0.65  # of the questions that may name a shape by its place, how many do: that always fits one only
NUMBERS = ("zero", "one", "two", "three", "four")


@dataclass(frozen=True)
class Question:
    """A question with its answer (lower case, one or two words) and its kind, a key of `KIND_WEIGHTS`."""

    text: str
    answer: str
    kind: str
    # What the pair of texts says about which shape (index in scene.objects); -1 for questions about the whole scene.
    about: int = -1
    tells: frozenset[str] = frozenset()
    names: str = ""  # how it names the shape: "place", "shape", "colour" or "both"


def describe(thing: Thing) -> str:
    """All attributes of a shape: "small striped red ring in the top left"."""
    return f"{thing.size} {thing.texture} {thing.colour} {thing.shape} in the {thing.quadrant}"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One lower-case sentence with every attribute of every shape, in raster order, in one of three wordings."""
    parts = [f"a {describe(thing)}" for thing in scene.objects]
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    count = len(parts)
    counted = f"{NUMBERS[count]} shape{'s' if count > 1 else ''}: {listed}."
    return (f"{listed}.", f"a picture of {listed}.", counted)[rng.integers(3)]


def remark(scene: Scene, rng: np.random.Generator) -> str:
    """All of it without grammar, shapes in any order: "small striped red ring top left, large plain blue cross ..."."""
    order = rng.permutation(len(scene.objects))
    return ", ".join(describe(scene.objects[i]).replace("in the ", "") for i in order)


def questions(scene: Scene, rng: np.random.Generator, count: int) -> list[Question]:
    """Ask up to `count` different questions about a scene, in random order.

    No question is answered by an earlier question or answer of the list, as long as the scene has others left to ask:
    in a conversation of several turns a model could copy such an answer instead of looking.

    Args:
        scene: The scene.
        rng: Source of randomness.
        count: How many questions; fewer come back only when the scene has no more.
    """
    left = _all_questions(scene)
    # Decided first: were it asked when nothing else is left, "one" would be the answer more often than scenes have one.
    counts = rng.random() < count * KIND_WEIGHTS["count"] / sum(KIND_WEIGHTS.values())
    how_many = [q for q in left if q.kind == "count" and counts][:count]
    left = [q for q in left if q.kind != "count"]
    told: dict[int, set[str]] = defaultdict(set)
    asked: list[Question] = []
    while left and len(asked) < count - len(how_many):
        pool = _kinds_to_ask([q for q in left if not _answered(q, told)]) or _kinds_to_ask(left) or left
        question = _choose(pool, scene, rng)
        asked.append(question)
        told[question.about] |= question.tells
        left = [q for q in left if q.text != question.text]
    at = rng.integers(len(asked) + 1)
    return asked[:at] + how_many + asked[at:]


def _answered(question: Question, told: dict[int, set[str]]) -> bool:
    """Whether earlier turns have told the answer."""
    asks = {"colour", "shape"} if question.kind == "exist" else {question.kind}
    return question.about >= 0 and asks <= told[question.about]


def _kinds_to_ask(pool: list[Question]) -> list[Question]:
    """Drop the kind "exist" unless both yes and no can be asked, so that neither becomes the likelier answer."""
    exist = {q.answer for q in pool if q.kind == "exist"}
    return pool if len(exist) == 2 else [q for q in pool if q.kind != "exist"]


def _choose(pool: list[Question], scene: Scene, rng: np.random.Generator) -> Question:
    """Pick the kind, then the way of naming or yes/no, then the shape, then the text."""
    kinds = [kind for kind in KIND_WEIGHTS if any(q.kind == kind for q in pool)]
    weights = np.array([KIND_WEIGHTS[kind] for kind in kinds])
    kind = kinds[rng.choice(len(kinds), p=weights / weights.sum())]
    pool = [q for q in pool if q.kind == kind]
    pool = _prefer(pool, rng, PLACE_SHARE, lambda q: q.names == "place")  # one is empty for "position" and "exist"
    if kind == "exist":
        pool = _prefer(pool, rng, 0.5, lambda q: q.answer == "yes")
        # Hard when no: both the colour and the shape are there, but not together; else one of them is.
        hardest = max(_likeness(q, scene) for q in pool)
        pool = [q for q in pool if _likeness(q, scene) == hardest]
    shapes = sorted({q.about for q in pool})
    about = shapes[rng.integers(len(shapes))]
    pool = [q for q in pool if q.about == about]
    return pool[rng.integers(len(pool))]


def _prefer(
    pool: list[Question], rng: np.random.Generator, share: float, wanted: Callable[[Question], bool]
) -> list[Question]:
    """The wanted part of the pool with probability `share`, else the rest; the other one where that is empty."""
    parts = [q for q in pool if wanted(q)], [q for q in pool if not wanted(q)]
    first = 0 if rng.random() < share else 1
    return parts[first] or parts[1 - first]


def _likeness(question: Question, scene: Scene) -> int:
    """How much of the kind that an "exist" question asks for is in the scene, apart or together: 0 to 2."""
    colour, shape = question.text.rstrip("?").split()[-2:]
    return any(t.colour == colour for t in scene.objects) + any(t.shape == shape for t in scene.objects)


def _all_questions(scene: Scene) -> list[Question]:
    """Every question that can be asked about the scene."""
    found = [Question("How many shapes are there?", NUMBERS[len(scene.objects)], "count")]
    colours, shapes = (Counter(getattr(t, name) for t in scene.objects) for name in ("colour", "shape"))
    for i, thing in enumerate(scene.objects):
        names = {"both": (f"the {thing.colour} {thing.shape}", {"colour", "shape"})}
        if shapes[thing.shape] == 1:
            names["shape"] = (f"the {thing.shape}", {"shape"})
        if colours[thing.colour] == 1:
            names["colour"] = (f"the {thing.colour} shape", {"colour"})
        names["place"] = (f"the shape in the {thing.quadrant}", {"position"})
        for how, (name, says) in names.items():
            texts = {
                "texture": (f"Is {name} {', '.join(TEXTURES[:-1])} or {TEXTURES[-1]}?", thing.texture),
                "size": (f"Is {name} small or large?", thing.size),
            }
            if how != "place":
                texts["position"] = (f"Where is {name}?", thing.quadrant)
            if how in ("shape", "place"):
                texts["colour"] = (f"What colour is {name}?", thing.colour)
            if how == "colour":
                texts["shape"] = (f"Which shape is {thing.colour}?", thing.shape)
            if how == "place":
                texts["shape"] = (f"Which shape is in the {thing.quadrant}?", thing.shape)
            for kind, (text, answer) in texts.items():
                found.append(Question(text, answer, kind, i, frozenset(says | {kind}), how))
    present = {thing.kind: i for i, thing in enumerate(scene.objects)}
    for kind in KINDS:
        text = f"Is there a {kind[0]} {kind[1]}?"
        if kind in present:
            found.append(Question(text, "yes", "exist", present[kind], frozenset({"colour", "shape"}), "both"))
        else:
            found.append(Question(text, "no", "exist"))
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
