"""A result file of a program in eval/ in one form: lines of figures with intervals, and what it says of itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llava_drip.evaluation.pope import COUNTS, SHARES, shares
from llava_drip.evaluation.relative import LEVEL, ORDERS, RESAMPLES, percentile_interval
from llava_drip.evaluation.science_qa import AVERAGE, remarks, wilson
from llava_drip.instruct.scienceqa import CATEGORIES

PROGRAMS = "llava_bench, science_qa, pope, zero_shot or retrieval"
POPE_NAMES = dict(zip(SHARES, ("accuracy", "precision", "recall", "F1", "answered yes")))
POPE_MEAN = "mean of the splits, %"
_HALVES = {"coco": "COCO", "in_the_wild": "In-the-Wild"}
_WILSON = f"{LEVEL} % intervals are Wilson's"
_BOOTSTRAP = f"{LEVEL} % intervals are of a bootstrap over questions"


class Line(NamedTuple):
    """Which figure: a row of the table, and the group of rows that it belongs to."""

    group: str
    name: str


class Figure(NamedTuple):
    """value: None where there is nothing to divide by. interval: (low, high), where one is known."""

    value: float | None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Benchmark:
    """What a result is of. Results of one benchmark stand in one table.

    Attributes:
        name: for a heading.
        program: file that wrote it.
        kind: what a question's values are ("right", "relative", "rouge_l": records.STATISTICS); None: no question is kept.
        headline: the line that stands for all; None: there are no scores.
        intervals: how the intervals were had, a sentence.
        item: what the seconds are divided by.
        digits: decimals of a figure.
    """

    name: str
    program: str
    kind: str | None
    headline: Line | None
    intervals: str
    item: str = "answer"
    digits: int = 2


@dataclass(frozen=True)
class Result:
    """A result file.

    Attributes:
        label: what the page calls the run.
        lines: every figure, in the order in which they are shown.
        items: answers (or pictures) that the seconds were spent on.
        run: what the file says of itself (record.described).
        remarks: what a reader of the figures has to know, a sentence each.
        content: the whole file.
    """

    path: Path
    label: str
    benchmark: Benchmark
    lines: dict[Line, Figure]
    items: int | None
    run: dict
    remarks: tuple[str, ...]
    content: dict

    @property
    def headline(self) -> Figure | None:
        line = self.benchmark.headline
        return None if line is None else self.lines[line]

    @property
    def seconds_per_item(self) -> float | None:
        seconds = self.run.get("seconds")
        return seconds / self.items if isinstance(seconds, (int, float)) and self.items else None


def read_result(path: str | Path, label: str | None = None) -> Result:
    """Reads a file that one of the programs wrote with --json. label: default the file's name without its ending.

    Raises:
        ValueError: naming the file, and the field that is missing or of another kind.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: not JSON ({error}); give the files that eval/{PROGRAMS} wrote with --json"
        ) from error
    reader = next((read for key, read in _READERS.items() if isinstance(content, dict) and key in content), None)
    if reader is None:
        raise ValueError(f"{path}: no result of eval/{PROGRAMS}; give the files that they wrote with --json")
    if not isinstance(content.get("run"), dict):
        raise ValueError(f"{path}: has no 'run', what it says of itself; write it again with --json")
    try:
        benchmark, lines, items, said = reader(content)
        found = Result(path, label or path.stem, benchmark, lines, items, content["run"], tuple(said), content)
        assert benchmark.headline is None or benchmark.headline in lines
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path}: not as its program writes it ({what}); write it again with --json") from error
    return found


def _llava_bench(content: dict) -> tuple:
    run = content["run"]
    half = f"LLaVA-Bench {_HALVES[run['bench']]}" if "bench" in run else "LLaVA-Bench reviews"
    asked = (run.get("prompts") or {}).get("count")
    if "answers" in content:
        benchmark = Benchmark(f"{half}, answers only", "eval/llava_bench.py", None, None, "")
        return benchmark, {}, content["answers"]["n"], ["Nobody has judged these answers."]
    groups = {name: group for name, group in content.items() if name != "run"}
    if "rouge_l" in content["all"]:
        group = "ROUGE-L, 0 to 1"
        lines = {Line(group, name): _figure(own, "rouge_l") for name, own in groups.items()}
        what = "ROUGE-L counts words shared with the reference answers; it is no judgement and no relative score."
        name, told = f"{half}, ROUGE-L", f"{what} {_BOOTSTRAP}."
        benchmark = Benchmark(name, "eval/llava_bench.py", "rouge_l", Line(group, "all"), told, "answer", 3)
        return benchmark, lines, asked, []
    lines = {Line("relative score, %", name): _figure(own, "relative") for name, own in groups.items()}
    for key, title in (("model", "assistant"), ("reference", "reference")):
        lines |= {Line(f"mean score of the {title}, 1 to 10", n): _figure(own, key, False) for n, own in groups.items()}
    if "difference" in content["all"]:
        for order in (*ORDERS, "difference"):
            name = {"difference": "difference between the orders"}.get(order, order.replace("_", " "))
            lines[Line("relative score by the order of presentation, %", name)] = _figure(content["all"], order, False)
    said = []
    if content["all"]["failed"]:
        count = content["all"]["failed"] + content["all"]["n"]
        said.append(f"{content['all']['failed']:,} of {count:,} questions have a failed review and count in no score.")
    headline = Line("relative score, %", "all")
    benchmark = Benchmark(f"{half}, judged", "eval/llava_bench.py", "relative", headline, f"{_BOOTSTRAP}.", "answer", 1)
    return benchmark, lines, asked, said


def _science_qa(content: dict) -> tuple:
    names, group = (AVERAGE, *CATEGORIES), "accuracy, %"
    lines = {
        Line(group, name): Figure(_number(content[name], "acc"), _pair(content["interval"][name])) for name in names
    }
    for guess, figures in content.get("guesses", {}).items():
        lines[Line("what guessing gets, %", guess)] = Figure(_number(figures, AVERAGE))
    said = [f"{line[0].upper()}{line[1:]}." for line in remarks(content)]
    split = content["run"].get("split")
    name = f"ScienceQA, {split}" if split else "ScienceQA"
    benchmark = Benchmark(name, "eval/science_qa.py", "right", Line(group, AVERAGE), f"{_WILSON}.")
    return benchmark, lines, content[AVERAGE]["count"] - content["unanswered"], said


def _pope(content: dict) -> tuple:
    lines, said, splits = {}, [], content["splits"]
    for split, own in splits.items():
        tp, fp, tn, fn = (own[name] for name in COUNTS)
        parts = {"accuracy": (tp + tn, own["n"]), "precision": (tp, tp + fp), "recall": (tp, tp + fn)}
        parts["yes"] = (tp + fp, own["n"])
        for name in SHARES:
            interval = _pair(wilson(*parts[name])) if name in parts else _f1_interval(tp, fp, tn, fn)
            lines[Line(f"{split}, %", POPE_NAMES[name])] = Figure(_number(own, name), interval)
        if own["unclear"]:
            said.append(
                f"{split}: {own['unclear']:,} of {own['n']:,} answers say neither yes nor no; they count as yes."
            )
    headline = Line(f"{next(iter(splits))}, %", POPE_NAMES["accuracy"])
    intervals = f"{_WILSON}, those of F1 of a bootstrap over questions."
    if len(splits) > 1:
        for name in SHARES:
            lines[Line(POPE_MEAN, POPE_NAMES[name])] = Figure(_number(content["mean"], name))
        headline = Line(POPE_MEAN, POPE_NAMES["accuracy"])
        intervals += " The splits share questions, so their mean has none."
    benchmark = Benchmark(f"POPE, {', '.join(splits)}", "eval/pope.py", "right", headline, intervals)
    return benchmark, lines, sum(own["n"] for own in splits.values()), said


def _f1_interval(tp: int, fp: int, tn: int, fn: int) -> tuple[float, float] | None:
    """Percentile bootstrap of F1, in percent: questions drawn anew are counts drawn from their shares."""
    if not 2 * tp + fp + fn:
        return None
    counts = np.array([tp, fp, tn, fn])
    drawn = np.random.default_rng(0).multinomial(counts.sum(), counts / counts.sum(), RESAMPLES)
    f1 = np.nan_to_num(shares(drawn)[:, SHARES.index("f1")])
    return _pair(percentile_interval(f1))


def _zero_shot(content: dict) -> tuple:
    group, count = "accuracy, %", content["images"]
    lines = {Line(group, f"top-{k}"): _share(content[f"top{k}"], count) for k in (1, 5)}
    name = f"Zero-shot classification, {content['classes']:,} classes"
    benchmark = Benchmark(name, "eval/zero_shot.py", None, Line(group, "top-1"), f"{_WILSON}.", "picture")
    return benchmark, lines, count, _skipped(content)


def _retrieval(content: dict) -> tuple:
    lines = {}
    ways = {"image_to_text": ("text for a picture", "images"), "text_to_image": ("picture for a text", "captions")}
    for way, (title, counted) in ways.items():
        for k in (1, 5, 10):
            lines[Line(f"{title}, recall, %", f"R@{k}")] = _share(content[f"{way}_R@{k}"], content[counted])
    for way, (title, _) in ways.items():
        for k in (1, 5, 10):
            chance = Figure(100 * _number(content["chance"], f"{way}_R@{k}"))
            lines[Line("what a random ranking gets, %", f"{title}, R@{k}")] = chance
    intervals = f"{_WILSON}; those of texts take the texts of one picture for independent, and are too narrow by that."
    name = f"Retrieval, {content['images']:,} pictures and {content['captions']:,} texts"
    headline = Line(f"{ways['image_to_text'][0]}, recall, %", "R@1")
    benchmark = Benchmark(name, "eval/retrieval.py", None, headline, intervals, "picture")
    return benchmark, lines, content["images"], _skipped(content)


def _skipped(content: dict) -> list[str]:
    counts = content["skipped"]["counts"]
    return [f"Left out: {', '.join(f'{number:,} {cause}' for cause, number in counts.items())}."] if counts else []


def _share(share: float, count: int) -> Figure:
    """Of 0 .. 1, in percent."""
    return Figure(100 * share, _pair(wilson(share * count, count)))


def _figure(group: dict, name: str, interval: bool = True) -> Figure:
    return Figure(_number(group, name), _pair(group["interval"]) if interval else None)


def _number(group: dict, name: str) -> float | None:
    value = group[name]
    if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
        raise ValueError(f"{name!r} is {value!r:.60}, no number")
    return value


def _pair(interval) -> tuple[float, float] | None:
    if interval is None:
        return None
    low, high = interval
    return float(low), float(high)


# What only this program's results have → its reader.
_READERS: dict[str, Callable] = {
    AVERAGE: _science_qa,
    "splits": _pope,
    "top1": _zero_shot,
    "image_to_text_R@1": _retrieval,
    "all": _llava_bench,
    "answers": _llava_bench,
}
