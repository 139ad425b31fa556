"""ScienceQA (Lu et al., NeurIPS 2022, arXiv 2209.09513): its problems, LLaVA's ways to ask them, and its categories.

    problems.json     {"4": {"question": ..., "choices": [...], "answer": 1, "hint": "", "image": "image.png" or null, ...}, ...}
    pid_splits.json   {"train": ["1", ...], "val": [...], "test": [...], "minitest": [...], ...}

Formats are named as there: Q question, C context, M choices; behind the dash what is answered, A answer, L lecture, E explanation
(the field "solution"). The wordings are those of haotian-liu/LLaVA: QCM-* of scripts/convert_sqa_to_llava.py, and CQM-A of the
file llava_test_CQM-A.json that LLaVA-1.5 is evaluated with.

QCM-T (T, the text of the choice) is ours, for small models: they learn to name a text sooner
than to name the letter before it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

from llava_drip.assistant.processing import IMAGE_TOKEN
from llava_drip.files import read_object

LETTERS = "ABCDE"
FORMATS = ("CQM-A", "QCM-A", "QCM-T", "QCM-LEA", "QCM-LEPA")
ASK_FOR_LETTER = "Answer with the option's letter from the given choices directly."  # LLaVA-1.5 puts it behind CQM-A

SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
CONTEXTS = ("TXT", "IMG", "NO")
GRADES = {f"grade{n}": "G1-6" if n <= 6 else "G7-12" for n in range(1, 13)}
CATEGORIES = (*SUBJECTS.values(), *CONTEXTS, "G1-6", "G7-12")  # in the order of ScienceQA's tables


@dataclass(frozen=True)
class Problem:
    """One problem. answer: number of the right choice, from 0. image: its file name or None. subject, grade: None if unknown."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str = ""
    image: str | None = None
    subject: str | None = None
    grade: str | None = None
    lecture: str = ""
    solution: str = ""

    @property
    def letter(self) -> str:
        """Of the right choice."""
        return LETTERS[self.answer]


def load_problems(path: str | Path, split: str | None = None) -> list[Problem]:
    """The problems of a split, in its order; of all splits unless one is named.

    Args:
        path: the folder of problems.json and pid_splits.json, or problems.json itself, with pid_splits.json beside it.
        split: of pid_splits.json; where there is none, the field "split" of the problems.
    Raises:
        ValueError: naming the file, the problem and the field that cannot be used, or a split that is not there.
    """
    path = Path(path).expanduser()
    path = path / "problems.json" if path.is_dir() else path
    problems = _read_object(path)
    ids = list(problems)
    if split is not None:
        ids = _ids_of_split(path, problems, split)
    found = []
    for number in ids:
        if number not in problems:
            raise ValueError(f"{path}: no problem {number!r}, which pid_splits.json lists in {split!r}")
        found.append(_problem(number, problems[number], f"{path}: problem {number!r}"))
    if not found:
        raise ValueError(f"{path}: no problem" + (f" in split {split!r}" if split else ""))
    return found


def _read_object(path: Path) -> dict:
    try:
        return read_object(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; ScienceQA has problems.json and pid_splits.json") from error


def _ids_of_split(path: Path, problems: dict, split: str) -> list[str]:
    listing = path.with_name("pid_splits.json")
    if listing.is_file():
        splits = _read_object(listing)
    else:
        splits = {}
        for number, fields in problems.items():
            if isinstance(fields, dict) and isinstance(fields.get("split"), str):
                splits.setdefault(fields["split"], []).append(number)
    if split not in splits:
        there = f"there are {', '.join(sorted(splits))}" if splits else "there is no pid_splits.json beside it"
        raise ValueError(f"{listing if listing.is_file() else path}: no split {split!r}; {there}")
    return [str(number) for number in splits[split]]


def _problem(number: str, fields: dict, where: str) -> Problem:
    if not isinstance(fields, dict):
        raise ValueError(f"{where} is no object")
    choices, answer = fields.get("choices"), fields.get("answer")
    if not isinstance(fields.get("question"), str) or not fields["question"].strip():
        raise ValueError(f"{where} has no 'question'")
    if not isinstance(choices, list) or not 1 <= len(choices) <= len(LETTERS):
        raise ValueError(f"{where}: 'choices' must be a list of 1 to {len(LETTERS)}, got {choices!r:.80}")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(f"{where}: 'answer' must be the number of a choice, from 0, got {answer!r:.80}")
    texts = {name: fields.get(name) or "" for name in ("hint", "lecture", "solution")}
    labels = {name: fields.get(name) or None for name in ("image", "subject", "grade")}
    for name, value in {**texts, **labels}.items():
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{where}: {name!r} must be a text, got {value!r:.80}")
    for name, known in (("subject", SUBJECTS), ("grade", GRADES)):
        if labels[name] is not None and labels[name] not in known:
            raise ValueError(f"{where}: {name} {labels[name]!r} is none of {', '.join(known)}")
    return Problem(number, fields["question"], tuple(map(str, choices)), answer, **texts, **labels)


def categories(problem: Problem) -> tuple[str, ...]:
    """Those of CATEGORIES that a problem counts in, as ScienceQA's evaluate_acc.py counts.

    TXT: it has a hint. IMG: it has a picture (both may be). NO: neither. A label that is missing puts it in none: see unlabelled.
    """
    context = [name for name, there in (("TXT", problem.hint.strip()), ("IMG", problem.image)) if there] or ["NO"]
    labels = [SUBJECTS.get(problem.subject), *context, GRADES.get(problem.grade)]
    return tuple(label for label in labels if label is not None)


def unlabelled(problem: Problem) -> tuple[str, ...]:
    """Which of "subject" and "grade" is not known, so that the problem is missing from those categories."""
    return tuple(name for name in ("subject", "grade") if getattr(problem, name) is None)


def prompt(problem: Problem, format: str, image: bool = True) -> str:
    """The question as the human's turn, with one <image> where the problem has a picture (first in CQM-A, last in QCM-*).

    image: False leaves the placeholder out, to ask without the picture.
    """
    question, hint = _plain(problem.question), _plain(problem.hint)
    choices = [_plain(choice) for choice in problem.choices]
    shown = [IMAGE_TOKEN] if problem.image and image else []
    if _checked(format) == "CQM-A":
        context = [f"Context: {hint}"] if hint else []
        options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices)]
        return "\n".join([*shown, *context, question, *options]).replace("  ", " ")  # as LLaVA does in every format
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices))
    text = f"{question}\nContext: {hint or 'N/A'}\nOptions: {options}"
    return "\n".join([text.replace("  ", " "), *shown])


def target(problem: Problem, format: str) -> str:
    """The right answer as the assistant's turn."""
    letter, lecture, solution = problem.letter, _plain(problem.lecture), _plain(problem.solution)
    if _checked(format) == "CQM-A":
        return letter
    if format == "QCM-LEPA":
        steps = [f"{name}: {text}\n" for name, text in (("LECTURE", lecture), ("SOLUTION", solution)) if text]
        text = "".join([*steps, "###\n", f"ANSWER: {letter}."])
    else:
        reasons = f"{lecture} {solution} " if format == "QCM-LEA" else ""
        named = _plain(problem.choices[problem.answer]).rstrip(".") if format == "QCM-T" else letter
        text = f"{reasons}The answer is {named}."
    return text.replace("  ", " ").strip()


def reordered(problem: Problem, draw: random.Random) -> Problem:
    """The same problem with its choices in a random order. (A solution that speaks of "choice B" is not rewritten.)"""
    order = draw.sample(range(len(problem.choices)), len(problem.choices))
    choices = tuple(problem.choices[index] for index in order)
    return replace(problem, choices=choices, answer=order.index(problem.answer))


def _plain(text: str) -> str:
    """A placeholder in a text of the data set is only text."""
    return text.replace(IMAGE_TOKEN, "image").strip()


def _checked(format: str) -> str:
    if format not in FORMATS:
        raise ValueError(f"prompt format must be one of {', '.join(FORMATS)}, got {format!r}")
    return format
