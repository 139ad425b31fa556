"""Answers are judged with what they tell of their making, and refused before anything is paid where that cannot be."""

from __future__ import annotations

import pytest
from bench_helpers import assert_one_line_error, check_right, read, write_rows

from llava_drip.fingerprint import fingerprint

for package in ("openai", "tenacity", "rouge_score"):
    pytest.importorskip(package, reason="the eval extra is not installed")


def test_answers_are_judged_by_what_they_were_made_of(judge, server, bench, tiny_checkpoint, tmp_path):
    output = tmp_path / "answers.jsonl"
    model = {"model": tiny_checkpoint, "device": "cpu", "max_new_tokens": 4, "output": output, "answers": None}
    assert judge(limit=4, **model).returncode == 0
    asked = judge.scores()["run"]
    assert asked["data"]["answers"]["sha256"] == fingerprint(output)
    assert asked["data"]["reviews"]["sha256"] == fingerprint(asked["files"]["reviews"])
    assert asked["machines"] == [asked["machine"]] and asked["answered_with"] and asked["answered_on"]
    number = len(server.requests)
    assert judge(limit=4, answers=output).returncode == 0 and len(server.requests) == number
    scored = judge.scores()["run"]
    for name in ("answering", "seconds", "tokens_per_image", "batch_sizes", "devices", "machines", "answered_with"):
        assert scored[name] == asked[name] is not None, name
    assert scored["checkpoint"] == {"path": None, "sha256": fingerprint(tiny_checkpoint)}
    # two checkpoints in one file, or pictures and questions that the assistant never saw: refused before anything is paid
    rows = read(output)
    rows[2]["metadata"]["settings"]["checkpoint"] = "0123456789abcdef"
    mixed = write_rows(tmp_path / "mixed.jsonl", rows)
    words = ("mixed.jsonl: the answers to 10 and 12 are of different runs (checkpoint ", "0123456789abcdef")
    for kind in ({}, {"judge": "rules", "judge-base-url": None}):
        assert_one_line_error(judge(limit=4, answers=mixed, **kind), *words)
    picture = bench / "coco" / "images" / "2.jpg"
    content = picture.read_bytes()
    picture.write_bytes((bench / "coco" / "images" / "1.jpg").read_bytes())
    assert_one_line_error(judge(limit=4, answers=output), "the answer to 10 was made of other images", "ask again")
    picture.write_bytes(content)
    questions = bench / "coco" / "questions_30x3.jsonl"
    questions.write_text(questions.read_text().replace("Question 6?", "Another 6?"))
    assert_one_line_error(judge(limit=4, answers=output, estimate=True), "was made of other questions")
    assert len(server.requests) == number


def test_nothing_paid_is_lost_for_what_other_programs_write(judge, server, tmp_path):
    """What has our names and is of another kind counts as not told; letters that UTF-8 has not are kept escaped."""
    strange = {"seconds": "1", "batch_size": [1], "device": None, "settings": "none"}
    rows = [{**row, "metadata": strange, "visual_tokens": "4"} for row in read(tmp_path / "mine.jsonl")]
    rows = [{**row, "image": [f"{number % 3}.jpg"]} for number, row in enumerate(rows)]
    rows[0]["answer_id"] = "Half \ud800"
    path = write_rows(tmp_path / "strange.jsonl", rows)
    result = judge(answers=path)
    assert result.returncode == 0, result.stderr
    check_right(judge.scores())
    run = judge.scores()["run"]
    told = (
        "checkpoint",
        "compression",
        "seconds",
        "tokens_per_image",
        "batch_sizes",
        "devices",
        "machines",
        "answering",
    )
    assert all(run[name] is None for name in told)
    assert read(tmp_path / "strange.judge_m.reviews.jsonl")[0]["answer2_id"] == "Half \ud800"
    rows[6]["text"], asked = "Half \ud800", len(server.requests)
    words = ("question_id 16 cannot be sent to a judge", "half of a letter")
    assert_one_line_error(judge(answers=write_rows(tmp_path / "half.jsonl", rows)), *words)
    assert len(server.requests) == asked
