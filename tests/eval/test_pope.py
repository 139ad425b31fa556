"""The POPE program on questions and pictures of our own, with a real checkpoint of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_helpers import flags, read, write_rows

from llava_drip.evaluation import pope
from llava_drip.fingerprint import fingerprint

PROGRAM = Path(__file__).parents[2] / "eval" / "pope.py"


@pytest.fixture
def ask(run_script, bench, tmp_path):
    """ask(**flags): eval/pope.py in this process, on two splits of four questions whose ids are the same."""
    files = []
    for split in ("random", "popular"):
        rows = [
            {"question_id": i, "image": f"{i % 3}.jpg", "text": f"Is {split} {i} in it?", "label": ("yes", "no")[i % 2]}
            for i in range(4)
        ]
        files.append(write_rows(tmp_path / f"coco_pope_{split}.json", rows))

    def run(**values):
        usual = {"json": tmp_path / "scores.json"}
        if "model" in values:
            usual |= {"images": bench / "coco" / "images", "output": tmp_path / "out", "device": "cpu"}
            usual |= {"max_new_tokens": 3, "batch_size": 3}
        predictions = values.pop("predictions", ())
        many = ["--questions", *map(str, files), *(["--predictions", *map(str, predictions)] if predictions else [])]
        return run_script(PROGRAM, *many, *flags({**usual, **values}))

    run.scores = lambda: json.loads((tmp_path / "scores.json").read_text())
    return run


def test_asks_goes_on_and_scores(ask, tiny_checkpoint, tmp_path):
    result = ask(model=tiny_checkpoint, limit=1)
    assert result.returncode == 0, result.stderr
    first = {split: (tmp_path / "out" / f"{split}.jsonl").read_bytes() for split in ("random", "popular")}
    assert ask(model=tiny_checkpoint).returncode == 0
    answers = {split: tmp_path / "out" / f"{split}.jsonl" for split in first}
    for split, path in answers.items():
        assert path.read_bytes().startswith(first[split])  # nothing is asked twice
        assert [row["prompt"] for row in read(path)] == [f"Is {split} {i} in it?\n{pope.SUFFIX}" for i in range(4)]
    scores = ask.scores()
    assert [scores["splits"][split]["n"] for split in answers] == [4, 4] and scores["mean"]["accuracy"] is not None
    run = scores["run"]
    assert run["checkpoint"]["sha256"] == fingerprint(tiny_checkpoint) and run["data"]["images"]["files"] == 3
    assert run["seconds"] > 0 and run["batch_sizes"] == [3] and 1 <= run["tokens_per_image"] <= 64
    # what it wrote can be scored
    assert ask(predictions=answers.values()).returncode == 0
    assert ask.scores()["splits"] == scores["splits"]
    # other words are another run
    result = ask(model=tiny_checkpoint, suffix="Yes or no?")
    assert result.returncode == 1 and "line 1: prompt was" in result.stderr and "--output" in result.stderr


def test_answers_scored_from_their_files_keep_what_they_tell(ask, tiny_checkpoint, tmp_path):
    assert ask(model=tiny_checkpoint, compression=16).returncode == 0
    asked, files = ask.scores()["run"], [tmp_path / "out" / f"{split}.jsonl" for split in ("random", "popular")]
    assert asked["compression"] == 16 and asked["tokens_per_image"] == 4
    assert asked["machines"] == [asked["machine"]] and asked["answered_on"] == [asked["date"]]
    assert f"torch {asked['versions']['torch']}" in asked["answered_with"][0]
    assert ask(predictions=files).returncode == 0
    scored = ask.scores()["run"]
    told = ("compression", "tokens_per_image", "seconds", "answering", "prompts", "batch_sizes", "devices", "machines")
    for name in (*told, "answered_with", "answered_on"):
        assert scored[name] == asked[name] is not None, name
    assert scored["checkpoint"] == {"path": None, "sha256": fingerprint(tiny_checkpoint)}


def test_answers_of_two_checkpoints_or_to_other_questions_are_refused(ask, tiny_checkpoint, tmp_path):
    assert ask(model=tiny_checkpoint).returncode == 0
    files = [tmp_path / "out" / f"{split}.jsonl" for split in ("random", "popular")]
    rows = read(files[1])
    for row in rows:
        row["metadata"]["settings"]["checkpoint"] = "0123456789abcdef"
    other = write_rows(tmp_path / "other.jsonl", rows)
    result = ask(predictions=[files[0], other])
    assert result.returncode == 1 and "are of different runs (checkpoint " in result.stderr
    assert "0123456789abcdef" in result.stderr and "other.jsonl" in result.stderr
    unknown = write_rows(tmp_path / "unknown.jsonl", [{**row, "metadata": {}} for row in rows])
    assert "are of different runs" in ask(predictions=[files[0], unknown]).stderr
    questions = tmp_path / "coco_pope_random.json"
    questions.write_text(questions.read_text().replace('"yes"', '"no"'))
    assert "random.jsonl: the answer to 0 was made of other questions" in ask(predictions=files).stderr


def test_scores_what_others_answered(ask, tmp_path):
    files = [
        write_rows(tmp_path / f"{n}.jsonl", [{"question_id": i, "text": text} for i, text in enumerate(texts)])
        for n, texts in enumerate((["Yes", "No", "Yes", "No."], ["Yes.", "Yes.", "No", "no"]))
    ]
    result = ask(predictions=files)
    assert result.returncode == 0 and "100.00" in result.stdout and "75.00" in result.stdout, result.stderr
    scores = ask.scores()
    assert scores["splits"]["popular"]["accuracy"] == 50 and scores["mean"]["f1"] == 75
    told = ("checkpoint", "prompts", "compression", "tokens_per_image", "seconds", "answering", "devices", "machines")
    assert all(scores["run"][name] is None for name in told)
    # whatever they call by our names
    strange = {"image": ["0.jpg"], "visual_tokens": "4", "metadata": {"seconds": "1", "batch_size": [1], "device": {}}}
    strange["metadata"] |= {"settings": [1], "machine": 1e999}
    for path in files:
        write_rows(path, [{**row, **strange, "image": [f"{row['question_id'] % 3}.jpg"]} for row in read(path)])
    result = ask(predictions=files)
    assert result.returncode == 0 and ask.scores()["splits"] == scores["splits"], result.stderr
    assert all(ask.scores()["run"][name] is None for name in told)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "give --model, to ask it, or --predictions"),
        ({"predictions": ["x"]}, "1 files for 2 of --questions"),
        ({"predictions": ["x", "y"], "batch_size": 16}, "--batch_size is for --model"),
        ({"predictions": ["/nowhere", "y"]}, "/nowhere: no such file"),
        ({"model": "x", "images": None}, "--images is missing"),
        ({"model": "x", "limit": 0}, "--limit 0: must be at least 1"),
        ({"model": "/nowhere"}, "/nowhere: no such folder"),
    ],
)
def test_mistakes_are_one_line(ask, values, words):
    result = ask(**values)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("pope: error:")]
    assert result.returncode and words in line
