"""ScienceQA's scores: the letter in an answer, accuracy by category, and what guessing would get.

The categories are those of tools/evaluate_acc.py in lupantech/ScienceQA (Lu et al., NeurIPS 2022, arXiv 2209.09513), the letter
is read as llava/eval/eval_science_qa.py of haotian-liu/LLaVA reads it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np
from rich.table import Table

from llava_drip.evaluation.relative import bootstrap
from llava_drip.instruct.scienceqa import CATEGORIES, LETTERS, Problem, categories, unlabelled

AVERAGE = "AVG"
NO_LETTER = -1  # as in LLaVA's result files: no choice, which no answer is equal to
_THE_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")


def parse_letter(text: str, choices: int) -> int:
    """Index of the choice that an answer names, NO_LETTER where it names none.

    A letter from A to E alone; or at the beginning, before ". "; or else the one in "The answer is X." (any character behind it),
    which must stand there exactly once. LLaVA's first version drew a choice where there was none; the later one, and this, count
    the answer as wrong. A letter past the last choice is none.
    """
    found = _THE_ANSWER_IS.findall(text)
    if text and text in LETTERS and len(text) == 1:
        letter = text
    elif len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        letter = text[0]
    else:
        letter = found[0] if len(found) == 1 else ""
    index = LETTERS.find(letter) if letter else NO_LETTER
    return index if index < choices else NO_LETTER


def score(problems: Sequence[Problem], chosen: Mapping[str, int]) -> dict:
    """Accuracy over all problems and by category.

    Args:
        problems: what was to be answered.
        chosen: id → index of the choice, or NO_LETTER. A problem that is not there counts as wrong, as in LLaVA.

    Returns:
        "AVG" and each of CATEGORIES → {"correct": int, "count": int, "acc": percent, None where no problem is in it};
        "interval": the same names → [low, high] of acc, percent, 95 %, Wilson's;
        "unanswered": problems that are not in `chosen`; "no_letter": answers without one;
        "unlabelled": {"subject": n, "grade": n}, problems without that label, which NAT, SOC, LAN or G1-6, G7-12 leave out.
    """
    right, count = Counter(), Counter()
    for problem in problems:
        for name in (AVERAGE, *categories(problem)):
            count[name] += 1
            right[name] += chosen.get(problem.id, NO_LETTER) == problem.answer
    names = (AVERAGE, *CATEGORIES)
    missing = Counter(label for problem in problems for label in unlabelled(problem))
    return {
        **{
            name: {"correct": right[name], "count": count[name], "acc": _percent(right[name], count[name])}
            for name in names
        },
        "interval": {name: wilson(right[name], count[name]) for name in names},
        "unanswered": sum(problem.id not in chosen for problem in problems),
        "no_letter": sum(chosen.get(problem.id) == NO_LETTER for problem in problems),
        "unlabelled": {label: missing[label] for label in ("subject", "grade")},
    }


def _percent(correct: float, count: int) -> float | None:
    return 100 * correct / count if count else None


def wilson(correct: int, count: int, level: float = 0.95) -> list[float] | None:
    """Wilson's score interval of a share (Wilson, 1927), [low, high] in percent; None of nothing."""
    if not count:
        return None
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, spread = correct / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / count + spread / (4 * count)) ** 0.5
    return [100 * max(0.0, middle - half), 100 * min(1.0, middle + half)]


def chance(problems: Sequence[Problem]) -> dict[str, float | None]:
    """What a random letter gets on average: "AVG" and category → percent, None where no problem is in it."""
    total, count = Counter(), Counter()
    for problem in problems:
        for name in (AVERAGE, *categories(problem)):
            count[name] += 1
            total[name] += 1 / len(problem.choices)
    return {name: _percent(total[name], count[name]) for name in (AVERAGE, *CATEGORIES)}


def commonest_letters(problems: Sequence[Problem]) -> dict[int, int]:
    """Number of choices → the index that is right most often (the first, of several)."""
    counts: dict[int, Counter] = {}
    for problem in problems:
        counts.setdefault(len(problem.choices), Counter())[problem.answer] += 1
    return {choices: min(of, key=lambda index: (-of[index], index)) for choices, of in counts.items()}


def answer_prior(problems: Sequence[Problem], known: Sequence[Problem]) -> dict[str, int]:
    """The choices of one who reads no question, but knows which letter is commonest in `known`, by the number of choices; A
    where `known` has no such number. id → index, for `score`."""
    letters = commonest_letters(known)
    return {problem.id: letters.get(len(problem.choices), 0) for problem in problems}


def difference(problems: Sequence[Problem], chosen: Mapping[str, int], other: Mapping[str, int], seed: int = 0) -> dict:
    """By how much one set of answers is right more often than another, over all problems.

    Returns:
        "points": percentage points; "interval": [low, high], of the problems drawn anew with replacement, both answers to each
        together; "only": problems that the first alone gets right, and the other alone.
    """
    right = np.array([[of.get(p.id, NO_LETTER) == p.answer for of in (chosen, other)] for p in problems], dtype=float)
    gain = right[:, 0] - right[:, 1]
    interval = bootstrap(gain, lambda drawn: 100 * drawn.mean(-1), seed)
    return {"points": 100 * gain.mean(), "interval": interval, "only": [int((gain > 0).sum()), int((gain < 0).sum())]}


def table(scores: Mapping[str, Mapping], guesses: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Several answers to the same problems side by side.

    Args:
        scores: name → what `score` returns; of the first, the intervals are shown.
        guesses: name → {category: percent}, e.g. of `chance`.
    """
    first = next(iter(scores.values()))
    shown = Table(title="ScienceQA, percent right", title_justify="left")
    for column in ("", "problems", *scores, "95 %", *guesses):
        shown.add_column(column, justify="right" if column else "left")

    def percent(value: float | None) -> str:
        return "no label" if value is None else f"{value:.2f}"

    for name in (AVERAGE, *CATEGORIES):
        interval = first["interval"][name]
        shown.add_row(
            name,
            f"{first[name]['count']:,}",
            *(percent(of[name]["acc"]) for of in scores.values()),
            "" if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}",
            *(percent(of[name]) for of in guesses.values()),
            end_section=name in (AVERAGE, "LAN", "NO"),
        )
    return shown


def gaps(scores: Mapping) -> list[str]:
    """What a reader of the scores has to know of the answers: some are missing, some name no choice."""
    count, said = scores[AVERAGE]["count"], []
    if scores["unanswered"]:
        said.append(f"{scores['unanswered']:,} of {count:,} problems have no answer; they count as wrong, as in LLaVA")
    if scores["no_letter"]:
        said.append(f"{scores['no_letter']:,} answers name no choice; they count as wrong, as in LLaVA")
    return said


def remarks(scores: Mapping) -> list[str]:
    """`gaps`, and which categories leave problems out for want of a label."""
    count, said = scores[AVERAGE]["count"], gaps(scores)
    for label, names in (("subject", "NAT, SOC and LAN"), ("grade", "G1-6 and G7-12")):
        missing = scores["unlabelled"][label]
        if missing == count:
            said.append(f"no problem has a {label}: {names} have no numbers")
        elif missing:
            said.append(
                f"{missing:,} of {count:,} problems have no {label}: {names} are of the other {count - missing:,}"
            )
    return said
