"""ScienceQA's scores on problems of our own, against counts made another way."""

from __future__ import annotations

import json
import random

import pytest

from llava_drip.evaluation.science_qa import (
    NO_LETTER,
    answer_prior,
    chance,
    commonest_letters,
    difference,
    parse_letter,
    remarks,
    score,
    table,
    wilson,
)
from llava_drip.evaluation.science_qa_files import read_predictions
from llava_drip.instruct.scienceqa import Problem

NAMES = ("AVG", "NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
NATURAL, SOCIAL, LANGUAGE = "natural science", "social science", "language science"


def problem(id: str, answer: int, choices: int = 2, **labels) -> Problem:
    return Problem(id, "Which?", tuple(f"choice {i}" for i in range(choices)), answer, **labels)


SIX = (
    problem("1", 0, subject=NATURAL, grade="grade3", hint="A pond."),
    problem("2", 1, subject=NATURAL, grade="grade8", image="image.png"),
    problem("3", 2, 3, subject=SOCIAL, grade="grade6", hint="A map.", image="image.png"),
    problem("4", 0, 3, subject=LANGUAGE, grade="grade7"),
    problem("5", 1, 4, subject=LANGUAGE),
    problem("6", 3, 4),
)


def many(count: int = 900) -> list[Problem]:
    """Problems with every label at random, some without."""
    draw = random.Random(1)
    made = []
    for number in range(count):
        choices = draw.randint(2, 5)
        labels = {
            "subject": draw.choice((NATURAL, SOCIAL, LANGUAGE, None)),
            "grade": draw.choice((None, *(f"grade{grade}" for grade in range(1, 13)))),
            "hint": draw.choice(("", "Look.")),
            "image": draw.choice((None, "image.png")),
        }
        made.append(problem(str(number), draw.randrange(choices), choices, **labels))
    return made


def members(problems: list[Problem]) -> dict[str, list[Problem]]:
    """Category → its problems, told from the raw labels."""
    grade = {p.id: int(p.grade.removeprefix("grade")) for p in problems if p.grade}
    return {
        "AVG": problems,
        "NAT": [p for p in problems if p.subject == NATURAL],
        "SOC": [p for p in problems if p.subject == SOCIAL],
        "LAN": [p for p in problems if p.subject == LANGUAGE],
        "TXT": [p for p in problems if p.hint],
        "IMG": [p for p in problems if p.image],
        "NO": [p for p in problems if not p.hint and not p.image],
        "G1-6": [p for p in problems if grade.get(p.id, 99) <= 6],
        "G7-12": [p for p in problems if grade.get(p.id, 0) >= 7],
    }


@pytest.mark.parametrize(
    ("text", "choices", "index"),
    [
        ("B", 2, 1),
        ("B. a cork", 2, 1),
        ("Because it is light. The answer is B.", 2, 1),
        ("The answer is C, or so.", 3, 2),
        ("A. Surely not B", 2, 0),
        # LLaVA's reading to the letter
        ("The answer is B", 2, NO_LETTER),  # nothing behind it
        ("The answer is A. The answer is B.", 2, NO_LETTER),  # twice
        ("AB", 2, NO_LETTER),
        ("C.", 3, NO_LETTER),
        ("B.\nBecause", 2, NO_LETTER),
        (" B", 2, NO_LETTER),
        ("b", 2, NO_LETTER),
        ("", 2, NO_LETTER),
        ("F", 5, NO_LETTER),
        ("The answer is F.", 5, NO_LETTER),
        ("C", 2, NO_LETTER),  # past the last choice
    ],
)
def test_the_letter_is_read_as_llava_reads_it(text, choices, index):
    assert parse_letter(text, choices) == index


def test_six_problems_by_hand():
    scores = score(SIX, {"1": 0, "2": 0, "3": 2, "4": NO_LETTER, "5": 1})
    correct = {name: (scores[name]["correct"], scores[name]["count"]) for name in NAMES}
    assert correct == {
        "AVG": (3, 6),
        "NAT": (1, 2),
        "SOC": (1, 1),
        "LAN": (1, 2),
        "TXT": (2, 2),
        "IMG": (1, 2),
        "NO": (1, 3),
        "G1-6": (2, 2),
        "G7-12": (0, 2),
    }
    assert scores["AVG"] == {"correct": 3, "count": 6, "acc": 50.0}
    assert (scores["unanswered"], scores["no_letter"]) == (1, 1)
    assert scores["unlabelled"] == {"subject": 1, "grade": 2}
    said = remarks(scores)
    assert len(said) == 4 and "1 of 6 problems have no answer" in said[0] and "G7-12 are of the other 4" in said[3]


def test_a_category_without_labels_has_no_number():
    scores = score([problem("1", 0), problem("2", 1)], {"1": 0, "2": 0})
    assert scores["NAT"] == scores["G1-6"] == {"correct": 0, "count": 0, "acc": None}
    assert scores["interval"]["NAT"] is None and scores["NO"]["acc"] == 50
    assert remarks(scores) == [
        "no problem has a subject: NAT, SOC and LAN have no numbers",
        "no problem has a grade: G1-6 and G7-12 have no numbers",
    ]
    rows = table({"answers": scores}, {}).columns
    assert list(rows[2].cells)[1] == "no label"


@pytest.mark.parametrize("rate", [0.0, 0.07, 0.5, 1.0])
def test_shuffled_gold_is_scored_exactly_in_every_category(rate):
    problems, draw = many(), random.Random(2)
    wrong = set(draw.sample([p.id for p in problems], round(rate * len(problems))))
    chosen = {p.id: (p.answer + (p.id in wrong)) % len(p.choices) for p in problems}
    draw.shuffle(order := list(chosen))
    scores = score(problems, {name: chosen[name] for name in order})
    for name, inside in members(problems).items():
        correct = sum(p.id not in wrong for p in inside)
        assert len(inside) > 100
        assert scores[name] == {"correct": correct, "count": len(inside), "acc": 100 * correct / len(inside)}
    assert scores["AVG"]["acc"] == 100 * (1 - round(rate * 900) / 900)


def test_perfect_all_a_and_random_letters():
    problems, draw = many(), random.Random(3)
    guesses = chance(problems)
    perfect = score(problems, {p.id: p.answer for p in problems})
    first = score(problems, {p.id: 0 for p in problems})
    letters = score(problems, {p.id: draw.randrange(len(p.choices)) for p in problems})
    for name, inside in members(problems).items():
        assert perfect[name]["acc"] == 100
        assert first[name]["correct"] == sum(p.answer == 0 for p in inside)
        assert guesses[name] == pytest.approx(100 * sum(1 / len(p.choices) for p in inside) / len(inside))
        spread = 100 * (0.25 / len(inside)) ** 0.5
        assert abs(letters[name]["acc"] - guesses[name]) < 3.5 * spread


def test_what_the_commonest_letters_get():
    known = [problem(str(i), answer, 3) for i, answer in enumerate((1, 1, 0, 2))] + [problem("9", 1, 4)]
    known += [problem("10", 1), problem("11", 0)]
    assert commonest_letters(known) == {3: 1, 4: 1, 2: 0}  # of a tie the first
    assert answer_prior(SIX, known) == {"1": 0, "2": 0, "3": 1, "4": 1, "5": 1, "6": 1}
    assert answer_prior([problem("1", 1, 5)], known) == {"1": 0}
    assert score(SIX, answer_prior(SIX, known))["AVG"]["correct"] == 2


def test_the_difference_is_of_pairs():
    problems = many(400)
    right = {p.id: p.answer for p in problems}
    wrong = {p.id: (p.answer + 1) % len(p.choices) for p in problems}
    first = {p.id: right[p.id] if i < 240 else wrong[p.id] for i, p in enumerate(problems)}  # 60 %
    second = {p.id: right[p.id] if i < 200 else wrong[p.id] for i, p in enumerate(problems)}  # 50 %, of the same
    found = difference(problems, first, second)
    assert found["points"] == pytest.approx(10) and found["only"] == [40, 0]
    # 40 of 400 differ: a standard error of 1.5 points, where independent answers would have 3.5
    assert found["interval"] == pytest.approx([10 - 1.96 * 1.5, 10 + 1.96 * 1.5], abs=0.5)
    assert difference(problems, first, second) == found
    assert difference(problems, first, first) == {"points": 0, "interval": [0, 0], "only": [0, 0]}


@pytest.mark.parametrize(  # 81 of 263: Newcombe, Statistics in Medicine 17 (1998), table I
    ("correct", "count", "interval"),
    [(81, 263, [25.53, 36.62]), (15, 148, [6.24, 16.05]), (0, 20, [0, 16.11]), (29, 29, [88.30, 100])],
)
def test_the_interval_is_wilsons(correct, count, interval):
    assert wilson(correct, count) == pytest.approx(interval, abs=0.006)


# Files


OUTPUTS = {"1": "A", "2": "The answer is B.", "3": "B. choice 1", "4": "I do not know"}
CHOSEN = {"1": 0, "2": 1, "3": 1, "4": NO_LETTER}


def lines(rows: dict[str, str]) -> str:
    return "".join(
        json.dumps({"question_id": id, "prompt": "Which?", "text": text}) + "\n" for id, text in rows.items()
    )


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"acc": 50, "correct": 2, "count": 4, "results": CHOSEN, "outputs": OUTPUTS}),
        json.dumps({"results": {id: str(index) for id, index in CHOSEN.items()}}),  # ScienceQA's own
        json.dumps({"outputs": OUTPUTS}),
        lines(OUTPUTS),
        lines(OUTPUTS).replace('"question_id": "1"', '"question_id": 1'),
    ],
)
def test_every_form_of_file(tmp_path, text):
    (tmp_path / "file").write_text(text)
    assert read_predictions(tmp_path / "file", SIX) == (CHOSEN, [])


def test_one_line_is_a_file_of_lines(tmp_path):
    (tmp_path / "one.jsonl").write_text(lines({"1": "A"}))
    assert read_predictions(tmp_path / "one.jsonl", SIX) == ({"1": 0}, [])


def test_what_is_worth_a_remark(tmp_path):
    drawn = {**CHOSEN, "4": 2, "77": 0}  # as LLaVA's first version drew a choice for what has no letter
    (tmp_path / "file").write_text(json.dumps({"results": drawn, "outputs": {**OUTPUTS, "77": "A"}}))
    chosen, said = read_predictions(tmp_path / "file", SIX)
    assert chosen == {**CHOSEN, "4": 2}
    assert len(said) == 2 and "differ in 1 problems" in said[0] and "1 answers" in said[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["holds no answers"]),
        ("[1, 2]", ["must hold"]),
        ('{"answers": {}}', ['neither "results" nor "outputs"']),
        ('{"results": [1]}', ["'results' must be an object", "list"]),
        ('{"results": {"1": "B"}}', ["results of problem '1'", "'B'"]),
        ('{"results": {"1": 1.5}}', ["results of problem '1'", "1.5"]),
        ('{"results": {"1": true}}', ["results of problem '1'", "True"]),
        ('{"results": {"1": Infinity}}', ["results of problem '1'", "inf"]),
        ('{"results": {"1": -2}}', ["results of problem '1'", "-2"]),
        ('{"outputs": {"1": 0}}', ["outputs of problem '1'"]),
        ('{"results": {"500": 1}}', ["none of these problems", "--split"]),
        (lines({"500": "A"}), ["none of these problems"]),
        (lines({"1": "A"}) * 2, ["line 2", "'1' is answered a second time"]),
        (lines({"1": "A"}) + '{"question_id": "2"}\n', ["line 2", '"text"']),
        (lines({"1": "A"}) + '{"text": "A"}\n', ["line 2", '"question_id"']),
        (lines({"1": "A"}) + "A\n", ["line 2", "not JSON"]),
    ],
)
def test_files_that_cannot_be_used(tmp_path, text, words):
    path = tmp_path / "predictions.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="predictions.jsonl") as error:
        read_predictions(path, SIX)
    assert all(word in str(error.value) for word in words), error.value


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match="no such file .--predictions"):
        read_predictions(tmp_path / "none.json", SIX)
