"""Two runs of POPE side by side: the differences of every share in every split, and of the means over splits.

Intervals are percentile bootstraps (Efron and Tibshirani, 1993), both runs' answers drawn together: within a split questions are
drawn, for the means pictures with all their questions in all splits, since the splits ask about the same pictures. In a draw a
share of nothing counts as 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np

from llava_drip.evaluation.pope import COUNTS, SHARES, shares
from llava_drip.evaluation.relative import RESAMPLES, percentile_interval
from llava_drip.reports.evaluation.records import Record
from llava_drip.reports.evaluation.results import POPE_MEAN, POPE_NAMES, Line


def differences(pairs: Sequence[tuple[Record, Record]]) -> Iterator[tuple[Line, float, float, tuple[float, float]]]:
    """(line, the first run's figure, the second's, the interval of second less first), in percent. NaN: nothing to divide by.

    pairs: both runs' records of each question, split by split.
    """
    splits = {group: list(own) for group, own in groupby(pairs, lambda pair: pair[0].lines[0].group)}
    by_picture = defaultdict(lambda: np.zeros((len(splits), 2, len(COUNTS))))
    for place, (group, own) in enumerate(splits.items()):
        counts = np.array([[_counts(one) for one in pair] for pair in own])  # [questions, runs, counts]
        for pair, one in zip(own, counts):
            by_picture[pair[0].image][place] += one
        yield from _lines(group, counts[:, None])
    if len(splits) > 1:
        yield from _lines(POPE_MEAN, np.array(list(by_picture.values())))


def _counts(record: Record) -> list[float]:
    right, said_yes = record.values
    kind = ("t" if right else "f") + ("p" if said_yes else "n")
    return [float(name == kind) for name in COUNTS]


def _lines(group: str, counts: np.ndarray):
    """counts: [units that are drawn, splits, runs, counts]."""
    figures = shares(counts.sum(0)).mean(0)  # [runs, shares]
    # Units drawn anew are kinds of units drawn from their shares: few kinds in place of thousands of units.
    kinds, number = np.unique(counts.reshape(len(counts), -1), axis=0, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(counts), number / len(counts), RESAMPLES) @ kinds
    own = np.nan_to_num(shares(drawn.reshape(RESAMPLES, *counts.shape[1:]))).mean(1)  # [resamples, runs, shares]
    for name, first, second, less in zip(SHARES, *figures, (own[:, 1] - own[:, 0]).T):
        low, high = percentile_interval(less)
        yield Line(group, POPE_NAMES[name]), float(first), float(second), (low, high)
