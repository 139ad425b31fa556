"""Reading the benchmark's files: what is found where, and what is refused."""

from __future__ import annotations

import json

import pytest

from llava_drip.evaluation import llava_bench


@pytest.fixture
def questions():
    return [
        {"question_id": 0, "image": "0.jpg", "text": "What?", "category": "conv"},
        {"question_id": 1, "image": "1.jpg", "text": "Why?", "category": "complex"},
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_references_belong_to_the_questions(tmp_path, questions):
    rows = [{"question_id": 1, "text": "So."}, {"question_id": 0, "text": "A cat.", "prompt": "What?"}]
    found = llava_bench.read_references(write(tmp_path / "a.jsonl", rows), questions)
    assert [row["text"] for row in found.values()] == ["A cat.", "So."]
    for changed, words in (
        (rows[:1], "has no answer to question_id 0 .--references"),
        ([rows[0], {**rows[1], "prompt": "Who?"}], "line 2: prompt is 'Who\\?', of the question 'What\\?'"),
        ([{**rows[0], "category": "conv"}, rows[1]], "line 1: category is 'conv'"),
        ([rows[0], {**rows[1], "text": ""}], "line 2: 'text' is ''"),
        ([rows[0], rows[0]], "question_id 1 again"),
    ):
        with pytest.raises(ValueError, match=words):
            llava_bench.read_references(write(tmp_path / "a.jsonl", changed), questions)


def test_contexts_are_captions_and_boxes_or_a_description(tmp_path, questions):
    box = {"category": "cat", "bbox": [0.1, 0.25, 0.5, 1.0]}
    rows = [{"image": f"{i}.jpg", "captions": ["One.", "Two."], "instances": [box, box]} for i in range(2)]
    path = write(tmp_path / "c.jsonl", rows)
    contexts = llava_bench.read_contexts(path, "coco", questions)
    assert contexts["0.jpg"] == "One.\nTwo.\n\ncat: [0.1, 0.25, 0.5, 1.0]\ncat: [0.1, 0.25, 0.5, 1.0]"
    with pytest.raises(ValueError, match="line 1: no context as of LLaVA-Bench in_the_wild"):
        llava_bench.read_contexts(path, "in_the_wild", questions)
    rows = [{"image": "0.jpg", "caption": "A cat."}, {"image": "1.jpg", "caption": ["A", "dog."]}]
    path = write(tmp_path / "w.jsonl", rows)
    assert llava_bench.read_contexts(path, "in_the_wild", questions) == {"0.jpg": "A cat.", "1.jpg": "A\ndog."}
    with pytest.raises(ValueError, match="has no context of image '1.jpg'"):
        llava_bench.read_contexts(write(path, rows[:1]), "in_the_wild", questions)


def test_rules_by_category(tmp_path, questions):
    path = tmp_path / "rule.json"
    rule = {"role": "Assistant", "prompt": "Rate."}
    path.write_text(json.dumps({"conv": rule, "complex": rule, "llava_bench_conv": rule}))
    assert llava_bench.read_rules(path, "coco", questions)["complex"] == {"key": "complex", **rule}
    with pytest.raises(ValueError, match="has no rule 'llava_bench_complex', for question_id 1"):
        llava_bench.read_rules(path, "in_the_wild", questions)
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        llava_bench.read_rules(path, "coco", questions)
