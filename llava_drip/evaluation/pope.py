"""POPE (Li et al., EMNLP 2023, arXiv 2305.10355): does a model see objects that are not there? Its questions and scores.

An answer is read as POPE's evaluate.py and llava/eval/eval_pope.py of haotian-liu/LLaVA read it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.table import Table

from llava_drip.jsonl import read_jsonl

LABELS = ("yes", "no")
SUFFIX = "Answer the question using a single word or phrase."  # LLaVA-1.5's
COUNTS = ("tp", "fp", "tn", "fn")  # answers, right or wrong, that say yes or no
SHARES = ("accuracy", "precision", "recall", "f1", "yes")
_FIELDS = {"question_id": (int, str), "image": str, "text": str, "label": str}


def split_of(path: Path) -> str:
    """coco_pope_random.json → random; another file's name is its split."""
    return path.stem.rpartition("pope_")[2] or path.stem


def read_questions(path: Path, images: Path | None = None, suffix: str = "") -> list[dict]:
    """Questions of a file in POPE's form, {"question_id", "image", "text", "label"} a line.

    images: the folder of the pictures, each of which must be there; they are added as "path". suffix: a line behind each text
    that does not end in it. "place" counts the questions from 0.
    ValueError names the line.
    """
    questions, seen = [], {}
    for where, row in read_jsonl(path):
        for name, kinds in _FIELDS.items():
            if not isinstance(row.get(name), kinds) or isinstance(row[name], bool) or row[name] == "":
                raise ValueError(f"{where}: {name!r} is {row.get(name)!r:.60}; POPE's lines have {', '.join(_FIELDS)}")
        if row["label"].lower() not in LABELS:
            raise ValueError(f"{where}: 'label' is {row['label']!r}, neither yes nor no")
        if row["question_id"] in seen:
            raise ValueError(f"{where}: question_id {row['question_id']!r} again, first at {seen[row['question_id']]}")
        seen[row["question_id"]] = where
        text = row["text"].strip()
        question = {**row, "label": row["label"].lower(), "place": len(questions)}
        question["text"] = text if not suffix or text.endswith(suffix) else f"{text}\n{suffix}"
        if images is not None:
            question["path"] = images / row["image"]
            if not question["path"].is_file():
                raise ValueError(f"{where}: {question['path']}: no such picture (--images)")
        questions.append(question)
    if not questions:
        raise ValueError(f"{path}: holds no questions")
    return questions


def parse_answer(text: str) -> str:
    """ "no" if "No", "no" or "not" is a word of the first sentence, else "yes": what is not denied counts as affirmed.

    As in those scripts, a word ends at a space alone: "No\\n" is none of the three.
    """
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def is_unclear(text: str) -> bool:
    """Whether neither yes nor no is a word of the answer, so that "yes" was only presumed."""
    return parse_answer(text) == "yes" and not re.search(r"\byes\b", text, re.IGNORECASE)


def score(questions: Sequence[Mapping], answers: Mapping[object, str]) -> dict:
    """Scores of one split; "yes" is the positive class.

    Args:
        questions: with "question_id" and "label".
        answers: question_id → text, of each question.

    Returns:
        "n"; "tp", "fp", "tn", "fn"; "accuracy", "precision", "recall", "f1", "yes" (share answered yes): percent, None where
        nothing is to be divided by; "unclear": answers with neither word, which count as yes.
    """
    counts = dict.fromkeys(COUNTS, 0)
    for question in questions:
        said_yes = parse_answer(answers[question["question_id"]]) == "yes"
        right = said_yes == (question["label"] == "yes")
        counts[("t" if right else "f") + ("p" if said_yes else "n")] += 1
    found = {name: None if np.isnan(share) else float(share) for name, share in zip(SHARES, shares([*counts.values()]))}
    return {
        "n": len(questions),
        **counts,
        **found,
        "unclear": sum(is_unclear(answers[question["question_id"]]) for question in questions),
    }


def shares(counts: npt.ArrayLike) -> np.ndarray:
    """[..., COUNTS] → [..., SHARES], fp64, in percent; NaN where there is nothing to divide by."""
    tp, fp, tn, fn = np.moveaxis(np.asarray(counts, dtype=float), -1, 0)
    everything = tp + fp + tn + fn
    parts = ((tp + tn, everything), (tp, tp + fp), (tp, tp + fn), (2 * tp, 2 * tp + fp + fn), (tp + fp, everything))
    with np.errstate(invalid="ignore"):
        return np.stack([100 * part / whole for part, whole in parts], axis=-1)


def mean(scores: Mapping[str, Mapping]) -> dict[str, float | None]:
    """Each share's mean over splits, as papers give it. None where a split has none."""
    found = {name: [own[name] for own in scores.values()] for name in SHARES}
    return {name: None if None in values else sum(values) / len(values) for name, values in found.items()}


def table(scores: Mapping[str, Mapping]) -> Table:
    """The scores for a terminal, in percent."""
    shown = Table(box=None, header_style="bold")
    shown.add_column("POPE")
    for name in ("n", *SHARES, "unclear"):
        shown.add_column(name, justify="right")
    rows = {name: (str(own["n"]), own, str(own["unclear"])) for name, own in scores.items()}
    if len(scores) > 1:
        rows["mean"] = ("", mean(scores), "")
    for name, (n, own, unclear) in rows.items():
        shares = ["-" if own[share] is None else f"{own[share]:.2f}" for share in SHARES]
        shown.add_row(name, n, *shares, unclear)
    return shown
