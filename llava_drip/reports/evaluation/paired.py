"""Two results side by side: whether they may be compared, by how much they differ, and which answers changed.

Differences of runs that answered the same questions are paired: both answers to a question are drawn together (percentile
bootstrap, Efron and Tibshirani, 1993), and where an answer is right or wrong McNemar's exact test (1947) says how likely as
uneven a split of the changed ones is by chance. Without single questions the interval is that of independent samples, made of
the two scores' own intervals (Newcombe, 1998, method 10; Zou and Donner, 2008), which is too wide for the same questions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from llava_drip.evaluation.relative import bootstrap
from llava_drip.reports.evaluation import pope_pairs
from llava_drip.reports.evaluation.records import STATISTICS, Record
from llava_drip.reports.evaluation.results import POPE_MEAN, Line, Result

Records = Mapping[str, Record] | str  # or why there are none
_ANSWERS = ("answers", "predictions", "reviews")  # of `data`: what differs between runs, and should
# Of `run`: told elsewhere on the page, or different each time.
_ELSEWHERE = (
    "command",
    "data",
    "files",
    "seconds",
    "tokens_per_image",
    "date",
    "answered_on",
    "bootstrap",
    "prompts",
    "score",
    "bench",
)
# Of `run`: None where the answers do not tell.
_TOLD_BY_ANSWERS = (
    "checkpoint",
    "batch_sizes",
    "devices",
    "machines",
    "answered_with",
    "answering",
    "asking",
    "model_id",
)
NOT_RECORDED = "not recorded"
_OF_ANSWERS = ("questions", "images", "problems", "prompts", "checkpoint", "bench")
_OF_JUDGE = ("prompts", "replies", "failed", "tokens", "cost", "seconds")


@dataclass(frozen=True)
class Difference:
    """Of one line: second less first.

    Attributes:
        interval: 95 %; None where there is none to be had.
        only: questions that the first alone has right, and the second alone; None where an answer is not right or wrong.
        p: McNemar's, exact, two-sided.
    """

    line: Line
    first: float
    second: float
    interval: tuple[float, float] | None
    only: tuple[int, int] | None = None
    p: float | None = None

    @property
    def value(self) -> float:
        return self.second - self.first


@dataclass(frozen=True)
class Comparison:
    """Two results of one benchmark.

    Attributes:
        refused: why they are not compared, a sentence each; if there is any, there are no differences.
        notes: what to know about the comparison.
        settings: what differs in what the files say of themselves: (name, first's, second's).
        paired: whether the differences are question by question.
        changed: questions with different answers, those first that matter most. same: how many have the same.
    """

    first: Result
    second: Result
    refused: tuple[str, ...]
    notes: tuple[str, ...]
    settings: tuple[tuple[str, str, str], ...]
    differences: tuple[Difference, ...] = ()
    paired: bool = False
    changed: tuple[tuple[Record, Record], ...] = ()
    same: int | None = None


def compare(first: Result, second: Result, records: tuple[Records, Records]) -> Comparison:
    """records: of both, see records.read_records."""
    refused, settings = refusals(first, second), tuple(differing(first, second))
    notes = [*_notes(first, second)]
    if refused:
        return Comparison(first, second, tuple(refused), tuple(notes), settings)
    missing = [f"{one.label}: {own}." for one, own in zip((first, second), records) if isinstance(own, str)]
    if missing:
        if first.lines:
            missing.append(
                "The intervals of the differences are those of independent samples: too wide for the same questions."
            )
        return Comparison(first, second, (), (*notes, *missing), settings, tuple(_unpaired(first, second)))
    own, others = records
    if [*own] != [*others]:
        refused = ("They did not answer the same questions.",)
        return Comparison(first, second, refused, tuple(notes), settings)
    pairs = list(zip(own.values(), others.values()))
    changed = [pair for pair in pairs if pair[0].answer.strip() != pair[1].answer.strip()]
    changed.sort(key=_weight, reverse=True)  # stable: those of one weight stay in the order of the questions
    differences = ()
    if first.benchmark.kind:
        own_way = _paired_pope if first.benchmark.program == "eval/pope.py" else _paired
        differences = tuple(own_way(first, pairs))
        if any(one.line.group == POPE_MEAN for one in differences):
            notes.append("Means of the splits: pictures are drawn anew, with all their questions, not questions.")
    same, unjudged = len(pairs) - len(changed), sum(not (own.values and other.values) for own, other in pairs)
    if first.benchmark.kind and unjudged:
        notes.append(f"{unjudged:,} questions have no score in one of the two and are left out here.")
    return Comparison(first, second, (), tuple(notes), settings, differences, True, tuple(changed), same)


def refusals(first: Result, second: Result) -> list[str]:
    """Why the two may not be compared, a sentence each."""
    found, data = [], [one.run.get("data") or {} for one in (first, second)]
    shared = [name for name in data[0] if name in data[1] and name not in _ANSWERS]
    for name in shared:
        own, other = (of[name].get("sha256") for of in data)
        if own is None or other is None:
            found.append(f"Their data may differ: {name} are not recorded by their hash.")
        elif own != other:
            found.append(f"Their data differ: {name} {own} and {other}.")
    if not shared:
        found.append("They record no data in common: nobody can tell whether they answered the same questions.")
    counts = [_asked(one) for one in (first, second)]
    if counts[0] != counts[1]:
        found.append(f"They were asked different numbers of questions: {_counts(counts[0])} and {_counts(counts[1])}.")
    judges = [_judge(one) for one in (first, second)]
    if judges[0] != judges[1]:
        found.append(f"Their judges differ: {judges[0]} and {judges[1]}. Scores of different judges do not compare.")
    if first.lines.keys() != second.lines.keys() and any(
        "order" in line.group for line in {*first.lines, *second.lines}
    ):
        found.append("One was judged in both orders of presentation, the other in one.")
    return found


def _asked(result: Result) -> list[int]:
    """Of each split how many questions (or pictures)."""
    if "splits" in result.content:
        return [own["n"] for own in result.content["splits"].values()]
    if "AVG" in result.content:
        return [result.content["AVG"]["count"]]
    return [result.items]


def _counts(found: list[int]) -> str:
    return ", ".join(f"{number:,}" if isinstance(number, int) else "not recorded" for number in found)


def _judge(result: Result) -> str | None:
    judge = result.run.get("judge")
    if not isinstance(judge, dict):
        return None
    return f"{', '.join(judge.get('answered_as') or [str(judge.get('model'))])} with {judge.get('request')}"


def _notes(first: Result, second: Result) -> list[str]:
    prompts = [(one.run.get("prompts") or {}).get("sha256") for one in (first, second)]
    templates = [(one.content.get("flags") or {}).get("templates") for one in (first, second)]
    found = []
    if None not in prompts and prompts[0] != prompts[1] or templates[0] != templates[1]:
        found.append("Their prompts differ: what is compared is run and prompts together.")
    for one, hash_, other in zip((first, second), prompts, reversed(prompts)):
        if hash_ is None and other is not None:
            found.append(f"{one.label} does not record its prompts: they may differ.")
    scoring = [(one.run.get("asking") or {}).get("scoring") for one in (first, second)]
    if scoring[0] != scoring[1] and None not in scoring:
        found.append(f"Their answers were had in different ways: {scoring[0]} and {scoring[1]}.")
    return found


def differing(first: Result, second: Result) -> list[tuple[str, str, str]]:
    """(setting, first's, second's) of those in which the runs differ, in what the files say of themselves."""
    own, others = (dict(flat(one)) for one in (first, second))
    names = dict.fromkeys([*own, *others])
    pairs = [(name, own.get(name, NOT_RECORDED), others.get(name, NOT_RECORDED)) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]


def flat(result: Result) -> Iterator[tuple[str, str]]:
    """(name, value) of what shaped a run, in what its file says of itself."""
    run = {name: value for name, value in result.run.items() if name not in _ELSEWHERE}
    run["checkpoint"] = checkpoint_of(result)
    run["flags"] = result.content.get("flags") or {}
    for name, value in run.items():
        if value is None and (name in _TOLD_BY_ANSWERS or name == "compression" and run["checkpoint"] is None):
            yield name, NOT_RECORDED
            continue
        if not isinstance(value, dict):
            yield name, said(value)
            continue
        left_out = {"answering": _OF_ANSWERS, "judge": _OF_JUDGE}.get(name, ())
        for part, own in value.items():
            if part not in left_out and not (name == "flags" and part in run):
                yield f"{name}: {part}", said(own)


def checkpoint_of(result: Result) -> str | None:
    """The hash of the checkpoint that was asked; None where nobody knows."""
    return (result.run.get("checkpoint") or {}).get("sha256")


def compression_of(result: Result) -> str:
    """What was asked for, for a reader; of an unknown checkpoint nothing is presumed."""
    asked = result.run.get("compression")
    if asked is None:
        return NOT_RECORDED if checkpoint_of(result) is None else "as the checkpoint says"
    return f"{asked:g}x"


def said(value: object) -> str:
    """A setting for a reader."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(said, value)) if isinstance(value, (list, tuple)) else str(value)


def _unpaired(first: Result, second: Result):
    for line, own in first.lines.items():
        other = second.lines.get(line)
        if other is None or None in (own.value, other.value):
            continue
        interval = None
        if own.interval and other.interval:
            down = math.hypot(other.value - other.interval[0], own.interval[1] - own.value)
            up = math.hypot(other.interval[1] - other.value, own.value - own.interval[0])
            interval = (other.value - own.value - down, other.value - own.value + up)
        if interval:
            yield Difference(line, own.value, other.value, interval)


def _paired(first: Result, pairs: list[tuple[Record, Record]]):
    """A difference for each line that questions count in, over those that both have values of."""
    statistic, kind = STATISTICS[first.benchmark.kind], first.benchmark.kind
    both = [pair for pair in pairs if pair[0].values and pair[1].values]
    counted = {line for own, _ in both for line in own.lines}
    for line in [line for line in first.lines if line in counted]:
        values = np.array([own.values + other.values for own, other in both if line in own.lines])
        width = values.shape[-1] // 2

        def difference(drawn: np.ndarray) -> np.ndarray:
            return statistic(drawn[..., width:]) - statistic(drawn[..., :width])  # noqa: B023 (called in this turn)

        figures = float(statistic(values[:, :width])), float(statistic(values[:, width:]))
        only = p = None
        if kind == "right":
            only = int((values[:, 0] > values[:, width]).sum()), int((values[:, 0] < values[:, width]).sum())
            p = mcnemar(*only)
        low, high = bootstrap(values, difference, seed=0)
        yield Difference(line, *figures, (low, high), only, p)


def _paired_pope(first: Result, pairs: list[tuple[Record, Record]]):
    """A difference for each line; those of accuracy within a split as of any right or wrong answers."""
    found = {one.line: one for one in _paired(first, pairs)}
    for line, own, other, interval in pope_pairs.differences(pairs):
        if not math.isnan(own + other):
            found.setdefault(line, Difference(line, own, other, interval))
    return [found[line] for line in first.lines if line in found]


def mcnemar(first: int, second: int) -> float:
    """McNemar's exact test, two-sided: how likely fair coins would split first + second changed questions as unevenly."""
    changed, fewer = first + second, min(first, second)
    tail = sum(math.comb(changed, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**changed)


def _weight(pair: tuple[Record, Record]) -> float:
    """How much a changed answer matters: by how much the assistant's own value changed."""
    own, other = pair
    return abs(own.values[-1] - other.values[-1]) if own.values and other.values else 0.0
