"""Relative scores of reviews: 100 × mean of the model's scores / mean of the reference's, with bootstrap intervals.

A question is the unit: its scores are averaged over the orders in which it was judged, and questions, both scores of one together
(paired), are drawn again and again for the interval (Efron and Tibshirani, 1993: percentile bootstrap).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava_drip.evaluation.judge import SCORED
from llava_drip.evaluation.judging import ORDERS, Comparison, in_scale
from llava_drip.evaluation.llava_bench import CATEGORIES
from llava_drip.files import write_whole
from llava_drip.jsonl import read_jsonl

RESAMPLES = 10_000
LEVEL = 95  # per cent


@dataclass(frozen=True)
class Review:
    """One review. scores: (reference's, model's); None if it failed, for the reason beside it."""

    question: object
    category: str | None
    order: str
    scores: tuple[float, float] | None
    reason: str | None = None


def read_reviews(path: Path) -> list[Review]:
    """Reviews in LLaVA's format: "tuple" (or "score"): [reference's, model's]; "category" (with or without "llava_bench_") and
    "question_id" where there are any. [-1, -1], null and scores outside 1 to 10 are failed reviews.

    Raises:
        ValueError: naming the line that is no review or repeats one.
    """
    reviews, seen = [], {}
    for where, row in read_jsonl(path):
        scores = row["tuple"] if "tuple" in row else row.get("score", "absent")
        numbers = isinstance(scores, list) and len(scores) == 2 and all(is_number(score) for score in scores)
        if scores is not None and not numbers:
            raise ValueError(f"{where}: not a review (\"tuple\" is to be two numbers, the reference's and the model's)")
        question, order = row.get("question_id", where), row.get("order", ORDERS[0])
        category = row.get("category")
        if not isinstance(question, (int, str)) or order not in ORDERS or not isinstance(category, (str, type(None))):
            raise ValueError(f"{where}: not a review (question_id, order or category)")
        if (question, order) in seen:
            raise ValueError(f"{where}: question_id {question!r} again, first at {seen[question, order]}")
        seen[question, order] = where
        reason = None
        if scores is None:
            reason = str(row.get("reason") or "no scores")
        elif not all(in_scale(score) for score in scores):
            scores, reason = None, f"scores {scores} are not of 1 to 10"
        category = category and category.removeprefix("llava_bench_")
        reviews.append(Review(question, category, order, scores and (float(scores[0]), float(scores[1])), reason))
    if not reviews:
        raise ValueError(f"{path}: holds no reviews")
    return reviews


def write_reviews(path: Path, wanted: dict[str, Comparison], replies: list[dict], failed: dict[str, str]) -> None:
    """Reviews in LLaVA's format: "tuple" is always [reference's, model's]; "order" says who was Assistant 1; a failed one has the
    tuple null, so that no program takes it for a number.

    wanted, failed: hash of the request → what was asked, and why there is no review.
    """
    scored = {row["request"]: row for row in replies if row["outcome"] == SCORED}
    lines = []
    for number, (request, comparison) in enumerate(wanted.items(), 1):
        row = scored.get(request)
        review = {"id": number, "question_id": comparison.question_id, "answer1_id": comparison.reference_id}
        review |= {"answer2_id": comparison.answer_id, "category": comparison.rule, "order": comparison.order}
        review |= {"content": row and row["content"], "tuple": row and row["scores"]}
        if row is None:
            review |= {"status": "failed", "reason": failed[request]}
        lines.append(json.dumps(review, ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines).encode(errors="backslashreplace").decode())


def is_number(value: object) -> bool:
    """Of a value read from JSON, which has NaN, Infinity and whole numbers past any float too: whether one can reckon with it."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def summarise(reviews: Iterable[Review], seed: int = 0) -> dict[str, dict]:
    """Group → {"n", "model", "reference", "relative", "interval", "failed"}, for "all" and each category there is.

    n: questions that every order has scored; model, reference: mean scores, 1 to 10; relative: in per cent; interval: its 95 %
    bootstrap interval, (low, high); failed: questions left out since a review failed. Of a group without scores all are None.
    With two orders also "reference_first", "model_first" (the relative score of each) and "difference" (first less second).
    """
    by_question: dict[object, list[Review]] = defaultdict(list)
    for review in reviews:
        by_question[review.question].append(review)
    orders = {review.order for asked in by_question.values() for review in asked}
    groups: dict[str, list[list[Review]]] = {"all": list(by_question.values())}
    for category in CATEGORIES:
        groups[category] = []
    for asked in by_question.values():
        if asked[0].category is not None:
            groups.setdefault(asked[0].category, []).append(asked)
    return {name: _group(asked, orders, seed) for name, asked in groups.items() if asked}


def _group(questions: list[list[Review]], orders: set[str], seed: int) -> dict:
    whole = [
        asked for asked in questions if {review.order for review in asked} == orders and all(r.scores for r in asked)
    ]
    result = {"n": len(whole), "model": None, "reference": None, "relative": None, "interval": None}
    result["failed"] = len(questions) - len(whole)
    if not whole:
        return result
    scores = np.array([np.mean([review.scores for review in asked], axis=0) for asked in whole])  # [n, 2]
    reference, model = scores.mean(0)
    result |= {"model": float(model), "reference": float(reference), "relative": relative(scores)}
    result["interval"] = bootstrap(scores, lambda drawn: 100 * drawn[..., 1].mean(-1) / drawn[..., 0].mean(-1), seed)
    if len(orders) > 1:
        for order in ORDERS:
            own = [review.scores for asked in whole for review in asked if review.order == order]
            result[order] = relative(np.array(own))
        result["difference"] = result[ORDERS[0]] - result[ORDERS[1]]
    return result


def relative(scores: np.ndarray) -> float:
    """scores: [n, 2], the reference's and the model's → per cent."""
    reference, model = scores.mean(0)
    return float(100 * model / reference)


def bootstrap(values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int) -> list[float]:
    """[low, high] of the statistic over rows drawn with replacement.

    values: [n, ...]; statistic: [resamples, n, ...] → [resamples].
    """
    rng = np.random.default_rng(seed)
    drawn = np.concatenate(
        [statistic(values[rng.integers(0, len(values), (100, len(values)))]) for _ in range(RESAMPLES // 100)]
    )
    return percentile_interval(drawn)


def percentile_interval(drawn: np.ndarray) -> list[float]:
    """[low, high] that hold LEVEL per cent of a statistic's draws [resamples]."""
    tail = (100 - LEVEL) / 2
    return [float(bound) for bound in np.percentile(drawn, [tail, 100 - tail])]


def table(summary: dict[str, dict]) -> str:
    """The summary for a terminal."""
    two = "difference" in summary["all"]
    head = ["", "n", "model", "reference", "relative", f"{LEVEL} % interval"]
    rows = [head + (["reference first", "model first", "difference"] if two else [])]
    for name, group in summary.items():
        if group["relative"] is None:
            rows.append([name, "0", *["-"] * (len(rows[0]) - 2)])
            continue
        row = [name, str(group["n"]), f"{group['model']:.2f}", f"{group['reference']:.2f}", f"{group['relative']:.1f}"]
        row.append("{:.1f} .. {:.1f}".format(*group["interval"]))
        if two:
            row += [f"{group[key]:.1f}" for key in ORDERS] + [f"{group['difference']:+.1f}"]
        rows.append(row)
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    )
