"""How far answers share words with the reference answers: ROUGE-L (Lin, 2004), by Google's rouge-score.

It needs no judge and no network. It is no judgement either: it rewards the reference's wording and length, not truth, and is
no substitute for the relative score.
"""

from __future__ import annotations

import numpy as np

from llava_drip.evaluation.llava_bench import CATEGORIES
from llava_drip.evaluation.relative import LEVEL, aligned, bootstrap

NAME = "ROUGE-L against the reference answers (word overlap, no judge; not a relative score)"


def rouge_l(questions: list[dict], answers: dict, references: dict) -> dict:
    """question_id → (F1, precision, recall) of the longest common subsequence of stemmed words, each from 0 to 1.

    ValueError: the rouge-score package is missing.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer  # late, and optional: it brings nltk with it
    except ImportError as error:
        raise ValueError(f"ROUGE-L: {error}; pip install -e '.[eval]' in the repository brings it") from error
    scorer, scores = RougeScorer(["rougeL"], use_stemmer=True), {}
    for question in questions:
        key = question["question_id"]
        found = scorer.score(references[key]["text"], answers[key]["text"])["rougeL"]
        scores[key] = (found.fmeasure, found.precision, found.recall)
    return scores


def overlap(questions: list[dict], answers: dict, references: dict, seed: int = 0) -> dict[str, dict]:
    """Group → {"n", "rouge_l", "precision", "recall", "interval"}: means of `rouge_l` over questions, and its bootstrap
    interval. Groups: "all" and the categories there are. ValueError: the rouge-score package is missing.
    """
    scores = rouge_l(questions, answers, references)
    groups = {"all": list(scores)}
    for category in CATEGORIES:
        groups[category] = [q["question_id"] for q in questions if q.get("category") == category]
    return {name: _group([scores[key] for key in keys], seed) for name, keys in groups.items() if keys}


def _group(scores: list, seed: int) -> dict:
    values = np.array(scores)
    means = dict(zip(("rouge_l", "precision", "recall"), values.mean(0).tolist()))
    interval = bootstrap(values, lambda drawn: drawn[..., 0].mean(-1), seed)
    return {"n": len(scores), **means, "interval": interval}


def table(summary: dict[str, dict]) -> str:
    """The summary for a terminal."""
    rows = [["", "n", "ROUGE-L", "precision", "recall", f"{LEVEL} % interval"]]
    for name, group in summary.items():
        cells = [f"{group[key]:.3f}" for key in ("rouge_l", "precision", "recall")]
        rows.append([name, str(group["n"]), *cells, "{:.3f} .. {:.3f}".format(*group["interval"])])
    return aligned(rows)
