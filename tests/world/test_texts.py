import re
from collections import Counter

import numpy as np
import pytest

from llava_drip.world.scenes import Scene, scene_at
from llava_drip.world.texts import KIND_WEIGHTS, blind_accuracy, caption, questions

PATTERNS = {
    "colour": r"What colour is the shape in the (?P<place>.+)\?",
    "shape": r"Which shape is in the (?P<place>.+)\?",
    "texture": r"Is the shape in the (?P<place>.+) plain or striped\?",
    "size": r"Is the shape in the (?P<place>.+) small or large\?",
    "count": r"How many shapes are there\?",
}


def asked(split: str, number: int, count: int = 6, seed: int = 0):
    for index in range(number):
        scene = scene_at(seed, split, index)
        found = questions(scene, np.random.default_rng([7, index]), count)
        yield scene, found


def answer_from_scene(scene: Scene, text: str) -> tuple[str, str]:
    """(kind, answer), worked out from the words of the question and the scene alone."""
    for kind, pattern in PATTERNS.items():
        match = re.fullmatch(pattern, text)
        if not match:
            continue
        if kind == "count":
            return kind, ("one", "two", "three", "four")[len(scene.objects) - 1]
        (thing,) = [thing for thing in scene.objects if thing.quadrant == match["place"]]
        return kind, f"{thing.quadrant} {getattr(thing, kind)}"
    raise AssertionError(f"unknown question {text!r}")


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_follow_from_the_scene(split):
    kinds = Counter()
    for scene, found in asked(split, 300):
        for question in found:
            assert (question.kind, question.answer) == answer_from_scene(scene, question.text)
            assert question.answer == question.answer.lower()
            kinds[question.kind] += 1
    assert set(kinds) == set(KIND_WEIGHTS)


def test_as_many_questions_as_asked_for_and_none_twice():
    for count in (1, 3, 6, 20):
        for scene, found in asked("train", 50, count):
            texts = {question.text for question in found}
            possible = 4 * len(scene.objects)
            assert len(found) == len(texts) and min(count, possible) <= len(texts) <= min(count, possible + 1)


def test_every_kind_and_every_shape_is_asked_for():
    kinds, places = Counter(), Counter()
    for scene, found in asked("test", 500):
        kinds.update(question.kind for question in found)
        places.update(i for i, t in enumerate(scene.objects) for q in found if t.quadrant in q.text)
    assert kinds["colour"] > kinds["texture"] and kinds["shape"] > kinds["size"]
    assert min(kinds.values()) > 0.05 * kinds.total()
    assert places[0] / places[1] == pytest.approx(1, abs=0.1)


def test_an_answer_without_the_image_is_rarely_right():
    pairs = [(q.text, q.answer, q.kind) for _, found in asked("test", 1500) for q in found]
    training = [(q.text, q.answer, q.kind) for _, found in asked("train", 2000) for q in found]
    for key in (0, 2):  # the question's text, its kind
        test, train = ([(row[key], row[1]) for row in rows] for rows in (pairs, training))
        assert blind_accuracy(test) <= 0.45  # by text it falls with the number of scenes: rare texts are known by heart
        half = len(test) // 2  # what can be known beforehand even from questions of the same distribution
        assert blind_accuracy(test[:half], known=test[half:]) <= 0.43
        assert blind_accuracy(test, known=train) <= 0.42


def test_blind_accuracy_by_hand():
    known = [("a", "x"), ("a", "x"), ("a", "y"), ("b", "y")]
    assert blind_accuracy(known) == 0.75
    assert blind_accuracy([("a", "y"), ("b", "y"), ("c", "y")], known) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="at least one"):
        blind_accuracy([])


def test_captions_tell_everything_in_any_order():
    in_raster_order = []
    for index in range(200):
        scene = scene_at(0, "train", index)
        text = caption(scene, np.random.default_rng(index))
        assert text == text.lower()
        told = text.split(", ")
        truth = [f"{t.quadrant} {t.size} {t.texture} {t.colour} {t.shape}" for t in scene.objects]
        assert sorted(told) == sorted(truth)
        if len(truth) == 2:
            in_raster_order.append(told == truth)
    assert 0.3 < np.mean(in_raster_order) < 0.7
