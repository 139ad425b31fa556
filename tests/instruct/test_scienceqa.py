"""ScienceQA's problems in LLaVA's wordings, on problems of our own."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from llava_drip.instruct.scienceqa import categories, load_problems, prompt, reordered, target, unlabelled
from llava_drip.instruct.scienceqa_rows import convert

PROBLEMS = {
    "7": {
        "question": "Which one  floats?",
        "choices": ["a stone", "a cork"],
        "answer": 1,
        "hint": "Two things lie beside a pond.\nOne is light.",
        "image": "image.png",
        "subject": "natural science",
        "grade": "grade7",
        "lecture": "Light things float.",
        "solution": "A cork is light.",
    },
    "12": {
        "question": "Which word has an <image> in it?",
        "choices": ["moon", "sun", "imagery"],
        "answer": 2,
        "hint": "",
        "image": None,
        "subject": "language science",
        "grade": "grade6",
        "lecture": "",
        "solution": "",
    },
    "13": {"question": "Where?", "choices": ["here"], "answer": 0, "image": "choice_0.png"},
}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "problems.json").write_text(json.dumps(PROBLEMS))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["12", "7"], "val": ["13"], "lost": ["99"]}))
    return tmp_path


def test_cqm_a_is_the_published_test_file(folder):
    with_picture, text = load_problems(folder)[:2]
    assert prompt(with_picture, "CQM-A") == (
        "<image>\nContext: Two things lie beside a pond.\nOne is light.\nWhich one floats?\nA. a stone\nB. a cork"
    )
    assert target(with_picture, "CQM-A") == "B"
    assert prompt(text, "CQM-A") == "Which word has an image in it?\nA. moon\nB. sun\nC. imagery"


def test_qcm_is_what_llavas_converter_writes(folder):
    with_picture, text = load_problems(folder)[:2]
    question = (
        "Which one floats?\nContext: Two things lie beside a pond.\nOne is light.\nOptions: (A) a stone (B) a cork"
    )
    for format in ("QCM-A", "QCM-T", "QCM-LEA", "QCM-LEPA"):
        assert prompt(with_picture, format) == f"{question}\n<image>"
    assert prompt(with_picture, "QCM-A", image=False) == question
    assert target(with_picture, "QCM-A") == "The answer is B."
    assert target(with_picture, "QCM-LEA") == "Light things float. A cork is light. The answer is B."
    assert (
        target(with_picture, "QCM-LEPA") == "LECTURE: Light things float.\nSOLUTION: A cork is light.\n###\nANSWER: B."
    )
    assert prompt(text, "QCM-LEA").split("\n")[1:] == ["Context: N/A", "Options: (A) moon (B) sun (C) imagery"]
    assert (
        target(text, "QCM-T") == "The answer is imagery." and target(with_picture, "QCM-T") == "The answer is a cork."
    )
    assert target(text, "QCM-LEA") == "The answer is C." and target(text, "QCM-LEPA") == "###\nANSWER: C."
    with pytest.raises(ValueError, match="prompt format must be one of .*, got 'QCM-X'"):
        prompt(text, "QCM-X")


def test_categories_are_counted_as_by_scienceqa(folder):
    found = {problem.id: problem for problem in load_problems(folder)}
    assert categories(found["7"]) == ("NAT", "TXT", "IMG", "G7-12")
    assert categories(found["12"]) == ("LAN", "NO", "G1-6")
    assert categories(found["13"]) == ("IMG",) and unlabelled(found["13"]) == (
        "subject",
        "grade",
    )  # missing, not guessed
    assert unlabelled(found["7"]) == ()


def test_splits_keep_their_order(folder):
    assert [problem.id for problem in load_problems(folder, "train")] == ["12", "7"]
    assert [problem.id for problem in load_problems(folder / "problems.json", "val")] == ["13"]


def test_without_a_list_of_splits_the_problems_say_theirs(tmp_path):
    (tmp_path / "problems.json").write_text(
        json.dumps({"1": {**PROBLEMS["7"], "split": "val"}, "2": {**PROBLEMS["12"], "split": "test"}})
    )
    assert [problem.id for problem in load_problems(tmp_path, "test")] == ["2"]
    with pytest.raises(ValueError, match="problems.json: no split 'train'; there are test, val"):
        load_problems(tmp_path, "train")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question": " "}, "problem '7' has no 'question'"),
        ({"choices": []}, "problem '7': 'choices' must be a list of 1 to 5"),
        ({"answer": 2}, "problem '7': 'answer' must be the number of a choice, from 0, got 2"),
        ({"answer": "B"}, "'answer' must be the number of a choice"),
        ({"hint": 3}, "'hint' must be a text"),
        ({"grade": "sixth"}, "grade 'sixth' is none of grade1, "),
        ({"subject": "art"}, "subject 'art' is none of natural science, "),
    ],
)
def test_a_bad_problem_is_named(tmp_path, change, words):
    (tmp_path / "problems.json").write_text(json.dumps({"7": {**PROBLEMS["7"], **change}}))
    with pytest.raises(ValueError, match="problems.json: problem '7'") as error:
        load_problems(tmp_path)
    assert words in str(error.value)


def test_files_that_cannot_be_used(folder, tmp_path):
    with pytest.raises(ValueError, match="no problem '99', which pid_splits.json lists in 'lost'"):
        load_problems(folder, "lost")
    with pytest.raises(ValueError, match="no split 'dev'; there are lost, train, val"):
        load_problems(folder, "dev")
    with pytest.raises(ValueError, match="none.json: no such file; ScienceQA has problems.json"):
        load_problems(tmp_path / "none.json")
    (tmp_path / "problems.json").write_text("[]")
    with pytest.raises(ValueError, match="must be a JSON object, is a list"):
        load_problems(tmp_path)


def test_other_orders_of_the_choices_keep_the_answer(folder):
    problem, draw = load_problems(folder)[1], random.Random(0)
    others = [reordered(problem, draw) for _ in range(50)]
    assert {other.choices[other.answer] for other in others} == {"imagery"}
    assert len({other.choices for other in others}) == 6 and {other.answer for other in others} == {0, 1, 2}
    assert all(sorted(other.choices) == sorted(problem.choices) for other in others)


def test_each_problem_in_several_orders(folder):
    made = convert(folder, "train", "QCM-A", folder / "out", pictures=False, orders=4)
    rows = json.loads(made.data_path.read_text())
    assert [row["id"] for row in rows] == ["12", "12-1", "12-2", "12-3", "7", "7-1", "7-2", "7-3"]
    asked = [row["conversations"][0]["value"] for row in rows]
    assert asked[0].endswith("(A) moon (B) sun (C) imagery") and len(set(asked[:4])) > 1
    for row in rows[:4]:
        question, answer = (turn["value"] for turn in row["conversations"])
        letter = answer.removeprefix("The answer is ")[0]
        assert f"({letter}) imagery" in question
    again = convert(folder, "train", "QCM-A", folder / "again", pictures=False, orders=4)
    assert again.data_path.read_bytes() == made.data_path.read_bytes()
    other = convert(folder, "train", "QCM-A", folder / "other", pictures=False, orders=4, seed=1)
    assert other.data_path.read_bytes() != made.data_path.read_bytes()
