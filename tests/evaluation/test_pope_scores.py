"""POPE's questions, how an answer is read, and scores counted by hand."""

from __future__ import annotations

import json

import pytest

from llava_drip.evaluation import pope


@pytest.mark.parametrize(
    ("text", "said", "unclear"),
    [
        ("Yes", "yes", False),
        ("yes, there is. No doubt.", "yes", False),
        ("No, there is none.", "no", False),
        ("There is not a dog in it", "no", False),
        ("Nothing of the kind", "yes", True),
        ("", "yes", True),
        ("NO", "yes", True),  # as POPE reads it
        ("No\nNo", "yes", True),  # a word ends at a space alone there
        ("No \nNo", "no", False),
    ],
)
def test_reads_an_answer(text, said, unclear):
    assert pope.parse_answer(text) == said and pope.is_unclear(text) is unclear


def test_scores_counted_by_hand():
    labels, texts = ["yes"] * 3 + ["no"] * 5, ["yes", "yes", "no", "yes", "no", "no", "no", "a cat"]
    questions = [{"question_id": i, "label": label} for i, label in enumerate(labels)]
    found = pope.score(questions, dict(enumerate(texts)))
    assert {name: found[name] for name in ("n", "tp", "fp", "tn", "fn", "unclear")} == {
        "n": 8,
        "tp": 2,
        "fp": 2,
        "tn": 3,
        "fn": 1,
        "unclear": 1,
    }
    shares = {"accuracy": 62.5, "precision": 50, "recall": 200 / 3, "f1": 400 / 7, "yes": 50}
    assert {name: found[name] for name in shares} == pytest.approx(shares)
    never = pope.score(questions, dict.fromkeys(range(8), "no"))
    assert never["precision"] is None and (never["recall"], never["f1"], never["yes"]) == (0, 0, 0)
    both = pope.mean({"random": found, "popular": never})
    assert both["accuracy"] == 62.5 and both["yes"] == 25 and both["precision"] is None


def test_reads_questions(tmp_path):
    path = tmp_path / "coco_pope_popular.json"
    row = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "No"}
    path.write_text(json.dumps(row))
    (question,) = pope.read_questions(path, suffix=pope.SUFFIX)
    assert question["text"] == f"Is there a dog?\n{pope.SUFFIX}" and question["label"] == "no"
    path.write_text(json.dumps({**row, "text": question["text"]}))
    assert pope.read_questions(path, suffix=pope.SUFFIX)[0]["text"] == question["text"]  # not twice
    assert pope.split_of(path) == "popular" and pope.split_of(tmp_path / "mine.jsonl") == "mine"
    for rows, words in (
        ([{**row, "label": "maybe"}], "line 1: 'label' is 'maybe'"),
        ([row, row], "line 2: question_id 1 again"),
        ([{"question_id": 1}], "line 1: 'image' is None"),
        ([], "holds no questions"),
    ):
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
        with pytest.raises(ValueError, match=words):
            pope.read_questions(path)
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"a\.jpg: no such picture \(--images\)"):
        pope.read_questions(path, tmp_path)
