from __future__ import annotations

import errno
import fcntl
import json
import shutil
import subprocess
import sys
import time

import pytest
from bench_helpers import PROGRAM, assert_one_line_error, read

from llava_drip.images import load_image

KEYS = ["question_id", "prompt", "text", "answer_id", "model_id", "metadata", "image", "category", "visual_tokens"]


@pytest.fixture
def answer(run_bench, tiny_checkpoint, bench, tmp_path):
    """Runs the program for answers; flags given override or add to the usual ones."""

    def run(**values) -> subprocess.CompletedProcess:
        usual = {"model": tiny_checkpoint, "bench": "coco", "data": bench, "judge": "none", "device": "cpu"}
        usual |= {"output": tmp_path / "out" / "answers.jsonl", "max_new_tokens": 6, "batch_size": 3}
        return run_bench(**{**usual, **values})

    run.output = tmp_path / "out" / "answers.jsonl"
    return run


def without_id(rows: list[dict]) -> list[dict]:
    """Rows without what may differ from run to run: their ids, the seconds that they took, the batch size."""
    assert all(row["metadata"]["seconds"] > 0 for row in rows)
    rows = [{**row, "metadata": {**row["metadata"], "seconds": None, "batch_size": None}} for row in rows]
    return [{key: value for key, value in row.items() if key != "answer_id"} for row in rows]


@pytest.mark.parametrize("half", ["coco", "in_the_wild"])
def test_one_answer_a_question_in_the_benchmarks_format(answer, bench, tiny_checkpoint, half):
    result = answer(bench=half)
    assert result.returncode == 0, result.stderr
    rows = read(answer.output)
    assert [row["question_id"] for row in rows] == list(range(10, 17))
    assert [row["prompt"] for row in rows] == [f"Question {i}?" for i in range(7)]
    assert [row["image"] for row in rows] == [f"{i % 3}.jpg" for i in range(7)]
    assert all(list(row) == KEYS and row["model_id"] == tiny_checkpoint.name for row in rows)
    assert len({row["answer_id"] for row in rows}) == 7 and len({row["text"] for row in rows}) > 1
    assert all(1 <= row["visual_tokens"] <= row["metadata"]["patches"] == 64 for row in rows)
    assert "7/7" in result.stderr  # the progress bar
    # --data may be the half itself
    before = rows
    answer.output.unlink()
    assert answer(bench=half, data=bench / half).returncode == 0
    assert without_id(read(answer.output)) == without_id(before)


def test_batches_do_not_change_answers(answer):
    assert answer(batch_size=1).returncode == 0
    single = read(answer.output)
    answer.output.unlink()
    assert answer(batch_size=7).returncode == 0
    assert without_id(read(answer.output)) == without_id(single)


def test_goes_on_where_it_was_killed(answer):
    assert answer().returncode == 0
    whole = answer.output.read_bytes()
    lines = whole.splitlines(keepends=True)
    answer.output.write_bytes(b"".join(lines[:4]) + lines[4][:50])  # killed within the fifth line
    result = answer()
    assert result.returncode == 0 and "4 of 7 questions are answered already" in result.stdout, result.stderr
    assert answer.output.read_bytes().startswith(b"".join(lines[:4]))
    assert without_id(read(answer.output)) == without_id([json.loads(line) for line in lines])
    # nothing is asked again, and --limit counts questions, not new answers
    finished = answer.output.read_bytes()
    assert answer().returncode == 0 and answer(limit=2).returncode == 0
    assert answer.output.read_bytes() == finished


def test_the_seconds_have_the_reading_of_pictures_in_them(answer, monkeypatch):
    """As ScienceQA's have."""

    def slowly(path):
        time.sleep(0.5)
        return load_image(path)

    monkeypatch.setattr("llava_drip.evaluation.answers.load_image", slowly)
    assert answer(limit=3).returncode == 0
    assert sum(row["metadata"]["seconds"] for row in read(answer.output)) > 1.5


def test_limit_then_all(answer, tmp_path):
    assert answer(limit=2).returncode == 0
    assert len(read(answer.output)) == 2
    assert answer(batch_size=2, json=tmp_path / "run.json").returncode == 0
    assert [row["question_id"] for row in read(answer.output)] == list(range(10, 17))
    run = json.loads((tmp_path / "run.json").read_text())["run"]
    assert (run["batch_sizes"], run["devices"]) == ([2, 3], ["cpu"])


def test_answers_of_another_run_are_not_mixed_in(answer, bench, tiny_checkpoint, tmp_path):
    assert answer(limit=2).returncode == 0
    before = answer.output.read_bytes()
    assert_one_line_error(answer(compression=8), "line 1", "compression was None, is now 8.0", "--output")
    other = tmp_path / tiny_checkpoint.name  # the same name, other weights
    shutil.copytree(tiny_checkpoint, other)
    weights = next(other.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert_one_line_error(answer(model=other), "line 1", "checkpoint was")
    assert answer.output.read_bytes() == before
    # whatever else of the checkpoint shapes an answer
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json", "processor_config.json"):
        other = tmp_path / name / tiny_checkpoint.name
        shutil.copytree(tiny_checkpoint, other)
        (other / name).write_bytes((other / name).read_bytes() + b" ")
        assert_one_line_error(answer(model=other), "line 1", "checkpoint was")
    assert_one_line_error(answer(dtype="bfloat16"), "line 1", "dtype was float32, is now bfloat16")
    # the pictures, those too that are not asked about yet
    picture = bench / "coco" / "images" / "2.jpg"
    content = picture.read_bytes()
    shutil.copy(bench / "coco" / "images" / "1.jpg", picture)
    assert_one_line_error(answer(limit=2), "line 1: images was", "--output")
    picture.write_bytes(content)
    # a diary of the training does not
    other = tmp_path / "same" / tiny_checkpoint.name
    shutil.copytree(tiny_checkpoint, other)
    (other / "trainer_state.json").write_text("{}")
    assert answer(model=other, limit=2).returncode == 0
    assert answer.output.read_bytes() == before
    # a file that holds something else is not touched either
    rows = ['{"a": 1}', '{"question_id": 1, "text": "x"}', '{"question_id": 1, "text": "x", "metadata": "none"}']
    rows.append('{"question_id": 1, "text": "x", "metadata": {"settings": null}}')
    rows.append('{"question_id": [1], "text": "x", "metadata": {"settings": {}}}')
    for foreign in ("dear diary", *(row + "\n" for row in rows)):
        answer.output.write_text(foreign)
        assert_one_line_error(answer(), "answers.jsonl", "not an answer", "--output")
        assert answer.output.read_text() == foreign


def test_answers_to_other_questions_do_not_count(answer, bench):
    """The same question_ids in the other half of the benchmark, or in an edited file."""
    assert answer(limit=2).returncode == 0
    before = answer.output.read_bytes()
    assert_one_line_error(answer(bench="in_the_wild"), "line 1", "bench was coco, is now in_the_wild", "--output")
    questions = bench / "coco" / "questions_30x3.jsonl"
    published = questions.read_text()
    for place, old, new, words in (
        (0, "Question 0?", "What?", "line 1: prompt was Question 0?, is now What?"),
        (0, "0.jpg", "2.jpg", "line 1: image was 0.jpg, is now 2.jpg"),
        (6, "Question 6?", "What?", "line 1: questions was"),  # not answered yet
    ):
        lines = published.splitlines()
        lines[place] = lines[place].replace(old, new)
        questions.write_text("\n".join(lines))
        assert_one_line_error(answer(), words, "--output")
        assert answer.output.read_bytes() == before
    questions.write_text(published)
    assert answer().returncode == 0 and len(read(answer.output)) == 7


def test_one_program_at_a_time_writes_to_a_file(answer):
    assert answer(limit=2).returncode == 0
    before = answer.output.read_bytes() + b'{"question_id"'  # the other one is in the middle of a line
    answer.output.write_bytes(before)
    with open(answer.output, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert_one_line_error(answer(), "answers.jsonl: another process", "--output")
        assert answer.output.read_bytes() == before
    assert answer().returncode == 0 and len(read(answer.output)) == 7


def test_goes_on_without_a_lock_where_there_are_none(answer, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    result = answer(limit=2)
    assert result.returncode == 0 and "llava_bench: warning:" in result.stderr and "cannot be locked" in result.stderr
    assert len(read(answer.output)) == 2


def test_only_images_that_are_asked_about_are_decoded(answer, bench):
    broken = bench / "coco" / "images" / "2.jpg"
    broken.write_bytes(broken.read_bytes()[:-200])
    assert answer(limit=2).returncode == 0  # about 0.jpg and 1.jpg
    assert answer(limit=2).returncode == 0
    before = answer.output.read_bytes()
    assert_one_line_error(answer(), "2.jpg", "truncated")
    assert answer.output.read_bytes() == before


def test_a_question_that_is_too_long_is_named(answer, bench):
    questions = bench / "coco" / "questions_30x3.jsonl"
    rows = read(questions)
    rows[4]["text"] = "word " * 3000
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert_one_line_error(answer(), "question_id 14: the conversation is too long")
    assert [row["question_id"] for row in read(answer.output)] == [10, 11, 12]  # the batch before it


def test_nothing_is_left_where_nothing_was_answered(answer, tiny_checkpoint, tmp_path):
    spoilt = tmp_path / "spoilt"
    shutil.copytree(tiny_checkpoint, spoilt)
    (spoilt / "tokenizer.json").write_text("{}")
    assert_one_line_error(answer(model=spoilt), "spoilt: cannot be loaded")
    assert not answer.output.parent.exists()


def test_compression_and_sampling(answer):
    assert answer(compression=8, temperature=1.5, top_p=0.9, seed=3).returncode == 0
    first = read(answer.output)
    assert {row["visual_tokens"] for row in first} == {8}
    answer.output.unlink()
    assert answer(compression=8, temperature=1.5, top_p=0.9, seed=3).returncode == 0
    assert without_id(read(answer.output)) == without_id(first)
    answer.output.unlink()
    assert answer(compression=8, temperature=1.5, top_p=0.9, seed=4).returncode == 0
    assert [row["text"] for row in read(answer.output)] != [row["text"] for row in first]
    again = answer(compression=8, temperature=1.5, top_p=0.9, seed=4, batch_size=2)  # one seed serves a batch
    assert_one_line_error(again, "line 1", "batch_size was 3, is now 2", "--output")


def test_own_paths(answer, bench, tmp_path):
    (bench / "coco" / "images").rename(tmp_path / "pictures")
    (bench / "coco" / "questions_30x3.jsonl").rename(tmp_path / "mine.jsonl")
    result = answer(data=None, questions=tmp_path / "mine.jsonl", image_folder=tmp_path / "pictures")
    assert result.returncode == 0, result.stderr
    assert len(read(answer.output)) == 7


def test_bad_data_is_named_before_anything_is_written(answer, bench):
    questions, images = bench / "coco" / "questions_30x3.jsonl", bench / "coco" / "images"
    good = questions.read_text()
    for line, words in {
        "{": ["line 8", "not JSON"],
        "[1]": ["line 8", "not a JSON object"],
        '{"question_id": 1, "image": "0.jpg"}': ["line 8", "'text'"],
        '{"image": "0.jpg", "text": "x"}': ["line 8", "'question_id'"],
        '{"question_id": 1, "image": "0.jpg", "text": ""}': ["line 8", "'text' is ''"],
        '{"question_id": 1, "image": "nine.jpg", "text": "x"}': ["line 8", "nine.jpg: no such image file"],
        '{"question_id": 10, "image": "0.jpg", "text": "x"}': ["line 8", "question_id 10 again", "line 1"],
    }.items():
        questions.write_text(good + line + "\n")
        assert_one_line_error(answer(), "questions_30x3.jsonl", *words)
    questions.write_text("")
    assert_one_line_error(answer(), "holds no questions")
    questions.write_text(good)
    picture = (images / "1.jpg").read_bytes()
    (images / "1.jpg").write_bytes(picture[:-200])
    assert_one_line_error(answer(), "1.jpg", "truncated")
    questions.unlink()
    assert_one_line_error(answer(), "coco", "none of questions_30x3.jsonl")
    shutil.rmtree(images)
    assert_one_line_error(answer(questions=questions), "images: no such folder")
    assert_one_line_error(answer(data=None), "--data")
    assert not answer.output.parent.exists()


def test_bad_flags_and_model_are_named(answer, bench, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_one_line_error(answer(model=tmp_path / "empty"), "empty: has no config.json")
    assert_one_line_error(answer(model=tmp_path / "none"), "none: no such folder")
    assert_one_line_error(answer(bench="vqa"), "--bench", "vqa")
    assert_one_line_error(answer(batch_size=0), "--batch_size 0")
    assert_one_line_error(answer(batchsize=2), "--batchsize")
    assert_one_line_error(answer(temperature=-1), "temperature")
    assert not answer.output.exists()


@pytest.mark.slow
def test_killed_for_real(bench, tiny_checkpoint, tmp_path):
    """As a program, killed after its first answers: whole lines remain, and a second run completes them."""
    output = tmp_path / "answers.jsonl"
    command = [
        sys.executable,
        PROGRAM,
        "--model",
        tiny_checkpoint,
        "--bench",
        "coco",
        "--data",
        bench,
        "--judge",
        "none",
    ]
    command += ["--output", output, "--batch_size", "1", "--max_new_tokens", "64", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and not (output.exists() and output.stat().st_size):
            time.sleep(0.005)
    finally:
        process.kill()
        process.communicate()
    assert output.stat().st_size
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert [row["question_id"] for row in read(output)] == list(range(10, 17))
