"""Differences of two runs of POPE: figures against the program's own scores, intervals against what pairing must give."""

from __future__ import annotations

import math
import random

import pytest

from llava_drip.evaluation import pope
from llava_drip.reports.evaluation.pope_pairs import differences
from llava_drip.reports.evaluation.records import Record
from llava_drip.reports.evaluation.results import POPE_MEAN, POPE_NAMES, Line

SPLITS = ("random", "popular")
PICTURES = 200


def record(split: str, picture: int, label: str, text: str) -> Record:
    said = pope.parse_answer(text)
    values, lines = (float(said == label), float(said == "yes")), (Line(f"{split}, %", "accuracy"),)
    return Record(f"{split} {picture}", "", label, text, values, lines, f"{picture}.jpg", {}, None)


def run(answer) -> list[Record]:
    """answer(split, picture, label) → text. One question a picture and split, every second with "yes" as the right answer."""
    labelled = [(split, picture, pope.LABELS[picture % 2]) for split in SPLITS for picture in range(PICTURES)]
    return [record(*question, answer(*question)) for question in labelled]


def other(label: str) -> str:
    return pope.LABELS[label == "yes"]


def scores(records: list[Record]) -> dict[str, dict]:
    found = {}
    for split in SPLITS:
        own = {one.key: one for one in records if one.key.startswith(split)}
        questions = [{"question_id": key, "label": one.expected} for key, one in own.items()]
        found[split] = pope.score(questions, {key: one.answer for key, one in own.items()})
    return found


def compared(first: list[Record], second: list[Record]) -> dict[Line, tuple]:
    return {line: rest for line, *rest in differences(list(zip(first, second)))}


def test_every_share_of_every_split_and_the_means():
    draw = random.Random(0)
    runs = [run(lambda *_: draw.choice(("yes", "yes", "no"))) for _ in range(2)]
    found, own = compared(*runs), [scores(one) for one in runs]
    assert len(found) == 3 * 5
    for share, name in POPE_NAMES.items():
        for split in SPLITS:
            first, second, (low, high) = found[Line(f"{split}, %", name)]
            assert (first, second) == pytest.approx([of[split][share] for of in own])
            assert low < second - first < high
        first, second, (low, high) = found[Line(POPE_MEAN, name)]
        assert (first, second) == pytest.approx([pope.mean(of)[share] for of in own]) and low < second - first < high
    same = compared(runs[0], runs[0])
    assert all(first == second and interval == (0, 0) for first, second, interval in same.values())


def test_intervals_are_of_pairs_and_those_of_means_of_pictures():
    """The second run is wrong about the first 40 of 200 pictures, in both splits, where the first is always right."""
    right = run(lambda split, picture, label: label)
    wrong = run(lambda split, picture, label: other(label) if picture < 40 else label)
    found = compared(right, wrong)
    error = 100 * math.sqrt(0.2 * 0.8 / PICTURES)
    # Two splits of independent questions would have an error smaller by the root of 2; these have none the smaller.
    for group in ("random, %", POPE_MEAN):
        first, second, interval = found[Line(group, "accuracy")]
        assert (first, second) == (100, 80)
        assert interval == pytest.approx((-20 - 1.96 * error, -20 + 1.96 * error), abs=0.6)
    # where no picture is wrong in both splits, they do have a smaller one
    apart = run(lambda split, picture, label: other(label) if picture // 40 == SPLITS.index(split) else label)
    low, high = compared(right, apart)[Line(POPE_MEAN, "accuracy")][2]
    assert high - low < 0.8 * 2 * 1.96 * error


def test_a_share_of_nothing_is_no_figure():
    never, right = run(lambda *_: "no"), run(lambda split, picture, label: label)
    found = compared(never, right)
    assert math.isnan(found[Line("random, %", "precision")][0]) and math.isnan(found[Line(POPE_MEAN, "precision")][0])
    assert found[Line("random, %", "F1")][:2] == [0, 100]
