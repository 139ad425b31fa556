"""The ScienceQA program on problems and pictures of our own, with a real checkpoint of random weights."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_drip.record import text_hash

PROGRAM = Path(__file__).parents[2] / "eval" / "science_qa.py"
SUBJECTS = ("natural science", "social science", "language science")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """14 problems in the published form, 5 with pictures, in both splits; one of "test" without a grade."""
    folder, draw, problems = tmp_path_factory.mktemp("scienceqa"), random.Random(0), {}
    for number in range(1, 15):
        choices = ["a stone", "a cork", "a feather", "an anvil"][: 2 + number % 3]
        problems[str(number)] = {
            "question": f"Which of these {number} things floats?",
            "choices": choices,
            "answer": draw.randrange(len(choices)),
            "hint": "Two things lie beside a pond." if number % 2 else "",
            "image": "image.png" if number % 3 == 0 else None,
            "subject": SUBJECTS[number % 3],
            "grade": "" if number == 4 else f"grade{number % 12 + 1}",
            "lecture": "Light things float.",
            "solution": "It is light.",
        }
        if number % 3 == 0:
            pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
            path = folder / "images" / "test" / str(number) / "image.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).resize((60, 60), Image.Resampling.NEAREST).save(path)
    (folder / "problems.json").write_text(json.dumps(problems))
    splits = {"test": [str(n) for n in range(1, 13)], "val": ["13", "14"], "train": ["1", "2", "3"]}
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    return folder


@pytest.fixture
def evaluate(run_script, tiny_checkpoint, data, tmp_path):
    """Runs the program in this process; flags given override or add to the usual ones."""

    def flags(**given) -> list[str]:
        usual = {"data": data, "model": tiny_checkpoint, "device": "cpu", "batch_size": 5, "max_new_tokens": 4}
        usual |= {"output": tmp_path / "answers.jsonl", "json": tmp_path / "scores.json"}
        if "predictions" in given:
            usual = {"data": data, "json": tmp_path / "scores.json"}
        named = {name: value for name, value in {**usual, **given}.items() if value is not None}
        return [f"--{name}" if value is True else f"--{name}={value}" for name, value in named.items()]

    def run(**given) -> subprocess.CompletedProcess:
        return run_script(PROGRAM, *flags(**given))

    run.flags, run.output = flags, tmp_path / "answers.jsonl"
    run.scores = lambda: json.loads((tmp_path / "scores.json").read_text())
    return run


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def essence(path: Path) -> dict[str, tuple]:
    """What of an answers file has to be the same again."""
    return {row["question_id"]: (row["prompt"], row["text"], row["metadata"]["visual_tokens"]) for row in read(path)}


def assert_one_line_error(result: subprocess.CompletedProcess, *words: str) -> None:
    errors = [line for line in result.stderr.splitlines() if line.startswith("science_qa: error:")]
    assert result.returncode not in (0, None) and len(errors) == 1, result.stderr
    for word in words:
        assert word in errors[0], errors[0]


def test_asks_and_scores(evaluate, tiny_checkpoint, data):
    result = evaluate(prior="train")
    assert result.returncode == 0, result.stderr
    rows = read(evaluate.output)
    assert list(rows[0]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]  # LLaVA's
    assert {row["question_id"] for row in rows} == {str(number) for number in range(1, 13)}
    by_id = {row["question_id"]: row for row in rows}
    assert by_id["3"]["prompt"] == (
        "<image>\nContext: Two things lie beside a pond.\nWhich of these 3 things floats?\nA. a stone\nB. a cork"
    )
    for row in rows:
        pictured = int(row["question_id"]) % 3 == 0
        assert row["model_id"] == tiny_checkpoint.name and ("<image>" in row["prompt"]) == pictured
        assert (1 <= row["metadata"]["visual_tokens"] <= 64) if pictured else row["metadata"]["visual_tokens"] == 0
    scores = evaluate.scores()
    assert [scores[name]["count"] for name in ("AVG", "NAT", "SOC", "LAN", "IMG", "NO")] == [12, 4, 4, 4, 4, 4]
    assert (
        scores["unlabelled"] == {"subject": 0, "grade": 1} and scores["G1-6"]["count"] + scores["G7-12"]["count"] == 11
    )
    run = scores["run"]
    assert run["asking"]["format"] == "CQM-A" and run["asking"]["max_new_tokens"] == 4 and run["split"] == "test"
    assert run["checkpoint"]["sha256"] and run["prompts"]["count"] == 12 and run["data"]["images"]["files"] == 4
    tokens = [row["metadata"]["visual_tokens"] for row in rows if row["metadata"]["visual_tokens"]]
    assert run["tokens_per_image"] == sum(tokens) / 4 and run["seconds"] > 0 and "eval/science_qa.py" in run["command"]
    assert (run["batch_sizes"], run["devices"]) == ([5], ["cpu"])
    assert set(scores["guesses"]) == {"random letter", "commonest letters of train"}
    assert "12/12" in result.stderr  # the progress bar
    assert "1 of 12 problems have no grade" in result.stdout
    assert list(scores["differences"]) == ["commonest letters of train"]
    # the answers' file is one that can be scored, beside another, and the same again gives the same
    (data / "all_a.jsonl").write_text("".join(f'{{"question_id": "{n}", "text": "A"}}\n' for n in range(1, 13)))
    result = evaluate(predictions=evaluate.output, against=data / "all_a.jsonl")
    again = evaluate.scores()
    assert result.returncode == 0 and "points against all_a" in result.stdout
    correct = json.loads((data / "problems.json").read_text())
    all_a = 100 * sum(correct[str(n)]["answer"] == 0 for n in range(1, 13)) / 12
    assert again["differences"]["all_a"]["points"] == pytest.approx(scores["AVG"]["acc"] - all_a)
    assert again["AVG"] == scores["AVG"]
    assert again["run"]["checkpoint"] == {"path": None, "sha256": run["checkpoint"]["sha256"]}
    told = ("asking", "prompts", "compression", "tokens_per_image", "seconds", "batch_sizes", "devices", "machines")
    for name in (*told, "answered_with", "answered_on"):
        assert again["run"][name] == run[name], name
    assert run["machines"] == [run["machine"]] and run["data"]["pid_splits"]["sha256"]
    assert run["data"]["answers"] == again["run"]["data"]["answers"]
    before = essence(evaluate.output)
    evaluate.output.unlink()
    assert evaluate(prior="train").returncode == 0 and essence(evaluate.output) == before
    fleeting = ("seconds", "date")
    second = evaluate.scores()
    for one in (scores, second):
        del one["run"]["data"]["answers"]  # another file by its answers' ids
    first, second = ({**s, "run": {k: v for k, v in s["run"].items() if k not in fleeting}} for s in (scores, second))
    assert first == second


def test_the_score_is_that_of_the_answers_whatever_the_other_file_is_called(evaluate, data, tmp_path):
    mine, other = tmp_path / "mine.jsonl", tmp_path / "other" / "answers.jsonl"
    other.parent.mkdir()
    right = json.loads((data / "problems.json").read_text())
    for path, shift in ((mine, 0), (other, 1)):
        letters = {n: "ABCD"[(right[n]["answer"] + shift) % len(right[n]["choices"])] for n in map(str, range(1, 13))}
        path.write_text("".join(f'{{"question_id": "{n}", "text": "{text}"}}\n' for n, text in letters.items()))
    for name in ("answers.jsonl", "random letter.jsonl", "answers"):
        other = other.rename(other.with_name(name))
        result = evaluate(predictions=mine, against=other)
        scores = evaluate.scores()
        assert result.returncode == 0 and scores["AVG"]["acc"] == 100 and set(scores["guesses"]) == {"random letter"}
        assert scores["differences"][str(other)]["points"] == 100


def test_the_other_answers_are_read_before_anything_is_asked(evaluate, tmp_path):
    assert_one_line_error(evaluate(against=tmp_path / "none.jsonl"), "none.jsonl: no such file (--against)")
    assert not evaluate.output.exists()
    other = tmp_path / "few.jsonl"
    other.write_text("".join(f'{{"question_id": "{n}", "text": "{n}"}}\n' for n in (1, 2, 13)))
    result = evaluate(limit=4, against=other)
    assert result.returncode == 0, result.stderr
    assert "few: 2 of 4 problems have no answer" in result.stdout and "few: 2 answers name no choice" in result.stdout
    assert "few: 1 answers in" in result.stdout


def test_answers_of_two_runs_or_to_other_problems_are_refused(evaluate, data, tmp_path):
    assert evaluate(limit=2).returncode == 0
    rows = read(evaluate.output)
    mixed = tmp_path / "mixed.jsonl"
    rows[1]["metadata"]["settings"]["compression"] = 16
    mixed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert_one_line_error(evaluate(predictions=mixed), "mixed.jsonl", "are of different runs (compression ")
    changed = tmp_path / "changed"
    shutil.copytree(data, changed)
    (changed / "problems.json").write_text((changed / "problems.json").read_text().replace("floats", "sinks"))
    for flags in ({"predictions": evaluate.output}, {"against": evaluate.output, "output": tmp_path / "new.jsonl"}):
        assert_one_line_error(evaluate(data=changed, **flags), "answers.jsonl", "was made of other problems")


def test_likelihood_answers_everything(evaluate, data):
    assert evaluate(scoring="likelihood", max_new_tokens=None, format="QCM-A").returncode == 0
    problems = json.loads((data / "problems.json").read_text())
    rows = read(evaluate.output)
    for row in rows:
        likelihoods = row["metadata"]["log_probabilities"]
        assert len(likelihoods) == len(problems[row["question_id"]]["choices"])
        assert row["text"] == "ABCDE"[likelihoods.index(max(likelihoods))]
    right = sum(row["text"] == "ABCDE"[problems[row["question_id"]]["answer"]] for row in rows)
    scores = evaluate.scores()
    assert scores["no_letter"] == 0 and scores["AVG"] == {"correct": right, "count": 12, "acc": 100 * right / 12}


def test_the_texts_of_the_choices(evaluate, data):
    assert evaluate(scoring="likelihood", max_new_tokens=None, format="QCM-T").returncode == 0
    problems = json.loads((data / "problems.json").read_text())
    for row in read(evaluate.output):
        likelihoods = row["metadata"]["log_probabilities"]
        assert len(set(likelihoods)) == len(problems[row["question_id"]]["choices"])
        assert row["text"] == "ABCDE"[likelihoods.index(max(likelihoods))]
    assert evaluate.scores()["run"]["asking"]["format"] == "QCM-T"


def test_other_ways_to_ask(evaluate):
    assert evaluate(blind=True, single_pred_prompt=True).returncode == 0
    rows = read(evaluate.output)
    assert all("<image>" not in row["prompt"] and row["metadata"]["visual_tokens"] == 0 for row in rows)
    assert all(
        row["prompt"].endswith("Answer with the option's letter from the given choices directly.") for row in rows
    )
    assert evaluate.scores()["run"]["tokens_per_image"] is None and evaluate.scores()["IMG"]["count"] == 4
    evaluate.output.unlink()
    assert evaluate(compression=16, limit=3).returncode == 0
    assert [row["metadata"]["visual_tokens"] for row in read(evaluate.output)] == [0, 0, 4]
    assert evaluate.scores()["run"]["compression"] == 16 and evaluate.scores()["AVG"]["count"] == 3
    # the prompts are those of the problems that were asked; the answers belong to the whole split's
    asked = sorted(read(evaluate.output), key=lambda row: int(row["question_id"]))
    recorded = {"sha256": text_hash(row["prompt"] for row in asked), "count": 3}
    assert evaluate.scores()["run"]["prompts"] == recorded
    settings = read(evaluate.output)[0]["metadata"]["settings"]
    assert evaluate(compression=16).returncode == 0 and len(read(evaluate.output)) == 12
    assert evaluate.scores()["run"]["prompts"] == {"sha256": settings["prompts"], "count": 12}


def test_pictures_in_a_tar_file_or_by_number(evaluate, data, tmp_path):
    assert evaluate().returncode == 0
    before = essence(evaluate.output)
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (data / "images" / "test").glob("*/image.png"):
        shutil.copy(path, flat / f"{path.parent.name}.png")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(flat, arcname=".")
    for place in (flat, tmp_path / "images.tar"):
        evaluate.output.unlink()
        assert evaluate(images=place).returncode == 0
        assert essence(evaluate.output) == before
    assert evaluate.scores()["run"]["data"]["images"]["path"] == str(tmp_path / "images.tar")


def test_a_kill_costs_a_batch_at_most(evaluate, tmp_path):
    """SIGKILL in the midst of answering; and then a line that was cut off."""
    assert evaluate(output=tmp_path / "whole.jsonl", batch_size=1).returncode == 0
    command = [sys.executable, str(PROGRAM), *evaluate.flags(batch_size=1)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if evaluate.output.is_file() and evaluate.output.read_bytes().count(b"\n") >= 3:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    process.communicate(timeout=60)
    kept = evaluate.output.read_bytes()
    assert 3 <= kept.count(b"\n") < 12 and process.returncode == -signal.SIGKILL
    with evaluate.output.open("ab") as file:
        file.write(b'{"question_id": "9", "pro')
    result = evaluate(batch_size=1)
    assert result.returncode == 0 and f"{kept.count(bytes([10]))} of 12 problems are answered already" in result.stdout
    assert evaluate.output.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    assert len(read(evaluate.output)) == 12 and essence(evaluate.output) == essence(tmp_path / "whole.jsonl")
    # nothing is asked again
    finished = evaluate.output.read_bytes()
    assert evaluate(batch_size=1).returncode == 0 and evaluate(limit=2).returncode == 0
    assert evaluate.output.read_bytes() == finished


def test_answers_of_another_run_are_not_mixed_in(evaluate, tiny_checkpoint, data, tmp_path):
    assert evaluate(limit=2).returncode == 0
    before = evaluate.output.read_bytes()
    assert_one_line_error(evaluate(compression=8), "line 1", "compression was None, is now 8.0", "--output")
    assert_one_line_error(evaluate(format="QCM-A"), "line 1", "prompts was")
    assert_one_line_error(evaluate(max_new_tokens=5), "line 1", "max_new_tokens was 4, is now 5")
    assert_one_line_error(evaluate(split="train"), "line 1", "images was")
    other = tmp_path / "checkpoint" / tiny_checkpoint.name
    shutil.copytree(tiny_checkpoint, other)
    (other / "generation_config.json").write_text('{"repetition_penalty": 1.1}')
    assert_one_line_error(evaluate(model=other), "line 1", "checkpoint was")
    changed = tmp_path / "changed"
    shutil.copytree(data, changed)
    shutil.copy(changed / "images/test/3/image.png", changed / "images/test/6/image.png")
    assert_one_line_error(evaluate(data=changed), "line 1", "images was")
    assert evaluate.output.read_bytes() == before
    for foreign in ("dear diary", '{"a": 1}\n', '{"question_id": "1", "text": "x", "metadata": {}}\n'):
        evaluate.output.write_text(foreign)
        assert_one_line_error(evaluate(), "answers.jsonl", "answer", "choose another")
        assert evaluate.output.read_text() == foreign


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"data": "/nowhere"}, ["/nowhere: no such file", "problems.json"]),
        ({"split": "exam"}, ["exam", "test, train, val"]),
        ({"model": None}, ["--model", "--predictions"]),
        ({"model": "/nowhere"}, ["/nowhere"]),
        ({"limit": 0}, ["--limit 0"]),
        ({"prior": "exam"}, ["exam"]),
        ({"images": "/nowhere"}, ["/nowhere", "--images"]),
        ({"scoring": "likelihood"}, ["--max_new_tokens 4"]),
        ({"scoring": "likelihood", "max_new_tokens": None, "format": "QCM-LEA"}, ["QCM-LEA", "QCM-A or CQM-A"]),
        ({"format": "QCM-T"}, ["--format QCM-T", "--scoring likelihood"]),
        ({"predictions": "/nowhere"}, ["/nowhere", "--predictions"]),
        ({"predictions": "x", "blind": True}, ["--blind is for --model"]),
        ({"predictions": "x", "batch_size": 2}, ["--batch_size is for --model"]),
        ({"compression": 0.5}, ["0.5"]),
    ],
)
def test_mistakes_are_one_line(evaluate, flags, words):
    assert_one_line_error(evaluate(**flags), *words)
    assert not evaluate.output.exists()


def test_pictures_that_are_missing_or_broken_are_named(evaluate, data, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(data, changed)
    (changed / "images/test/9/image.png").write_bytes(b"no picture")
    assert_one_line_error(evaluate(data=changed), "9/image.png", "not a readable picture")
    assert not evaluate.output.exists()  # before anything was asked
    (changed / "images/test/9/image.png").unlink()
    assert_one_line_error(evaluate(data=changed), "problem '9': no picture", "--images")
    (tmp_path / "images.tar").write_bytes(b"not a tar")
    assert_one_line_error(evaluate(data=changed, images=tmp_path / "images.tar"), "tar file", "--images")
    shutil.rmtree(changed / "images")
    assert_one_line_error(evaluate(data=changed), "--images")
    assert evaluate(data=changed, blind=True, output=tmp_path / "blind.jsonl").returncode == 0  # needs none


def test_a_problem_that_is_too_long_is_named(evaluate, data, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(data, changed)
    problems = json.loads((changed / "problems.json").read_text())
    problems["5"]["hint"] = "A pond. " * 1500
    (changed / "problems.json").write_text(json.dumps(problems))
    assert_one_line_error(evaluate(data=changed), "problem '5'", "too long", "2048")
