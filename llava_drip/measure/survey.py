"""Towers measured side by side: what they are, what an image costs, how long passes take, how much memory; as plain records."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from llava_drip.cli import one_line
from llava_drip.machine import load, versions, where
from llava_drip.measure.memory import peak_on_cpu, peak_on_cuda
from llava_drip.measure.published import REFERENCES, published
from llava_drip.measure.speed import FAILURES, Pass, Setting, time_towers
from llava_drip.measure.subjects import Subject, describe, find_images, over_images, presets


@dataclass(frozen=True)
class Plan:
    """What is measured; see scripts/measure_towers.py for the flags of these names.

    Attributes:
        settings: of passes, in order; none: only what an image costs is counted.
        img_size: pixels of a side, None: each tower's own.
    """

    settings: list[Setting] = field(default_factory=list)
    rounds: int = 10
    warmup: int = 2
    spread: float = 0.25
    memory: bool = True
    images: str | None = None
    max_images: int = 100
    num_classes: int = 1000
    img_size: int | None = None


def survey(
    subjects: Sequence[Subject],
    plan: Plan,
    accuracy: dict[str, float] | None = None,
    after_each: Callable[[dict], None] = lambda result: None,
) -> dict:
    """Measures.

    Args:
        subjects: with different labels.
        accuracy: label (or name, of a tower without arguments) → top-1, a share of 1.
        after_each: called with what there is so far when a setting has been measured.
    Returns:
        {"machine", "versions", "plan", "load": (before, after), "towers": [{"label", "name", "arguments", what
        subjects.describe gives, "images": what over_images gives or None, "top1" or None, "passes": [{the setting, what
        Timing has, "peak_memory_gib" or None}]}]}; a setting that a tower could not run, for want of memory say, has None for
        all figures, and "error".
    Raises:
        ValueError: a subject that cannot be made, two of one label, an accuracy of none of them, or no images.
    """
    labels = [subject.label for subject in subjects]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{label}: two towers of one label; give --labels")
    if accuracy is not None and (
        strange := sorted(set(accuracy) - {s for subject in subjects for s in _names(subject)})
    ):
        raise ValueError(f"--accuracy: {', '.join(strange)}: no such tower here; there are {', '.join(labels)}")
    paths = None if plan.images is None else find_images(plan.images, plan.max_images)
    before, rows, models = load(), [], {}
    for subject in subjects:
        model = models[subject.label] = subject.make(plan.num_classes, plan.img_size)
        row = {"label": subject.label, "name": subject.name, "arguments": subject.arguments, **describe(model)}
        row["images"] = None
        if paths is not None:
            bar = tqdm(paths, desc=subject.label, unit=" images", leave=False, disable=None)
            row["images"] = over_images(model, paths, lambda _, bar=bar: bar)
        row["top1"] = None if accuracy is None else _top1(subject, accuracy)
        rows.append({**row, "passes": []})

    def result() -> dict:
        machine = where(setting.device for setting in plan.settings)
        return {**machine, "load": (before, load()), "plan": asdict(plan), "towers": rows}

    for setting in plan.settings:
        for row, measured in zip(rows, _measure(subjects, models, setting, plan), strict=True):
            row["passes"].append(measured)
        after_each(result())
    return result()


def _names(subject: Subject) -> list[str]:
    """What --accuracy may call a tower: its label, and its name where that says all of it."""
    return [subject.label] if subject.arguments else [subject.label, subject.name]


def _top1(subject: Subject, accuracy: dict[str, float]) -> float | None:
    return next((accuracy[name] for name in _names(subject) if name in accuracy), None)


def _measure(subjects: Sequence[Subject], models: dict[str, nn.Module], setting: Setting, plan: Plan) -> list[dict]:
    on_cuda = torch.device(setting.device).type == "cuda"
    timings = time_towers(models, setting, plan.rounds, plan.warmup, plan.spread)
    result = []
    for subject, timing in zip(subjects, timings, strict=True):
        peak, error, wanted = None, timing.error, plan.memory and timing.error is None
        try:
            if wanted and on_cuda:
                one = Pass(models[subject.label], setting, plan.spread)
                try:
                    peak = peak_on_cuda(one)
                finally:
                    one.end()
            elif wanted and setting.device == "cpu":
                peak = peak_on_cpu(subject, setting, plan.num_classes, plan.img_size, plan.spread)
        except FAILURES as failure:
            error = f"memory: {one_line(failure)}"
        measured = {key: value for key, value in asdict(timing).items() if key not in ("label", "error")}
        result.append({**asdict(setting), **measured, "peak_memory_gib": peak, "error": error})
    return result


def preset_costs(patterns: Sequence[str], img_size: int | None) -> dict:
    """What every preset of this package, and timm's REFERENCES, cost at one size, beside published figures.

    patterns: timm's, of names. None of them: every preset. img_size: None for each one's own.
    Returns:
        {"versions", "towers": [{"label", what subjects.describe gives, "published": [{"gmacs", "part", "source",
        "reason", "counted", "deviation": ours / theirs - 1}]}]}; figures are of 224 px, at another size there are none.
    Raises:
        ValueError: a pattern that no preset matches.
    """
    names = list(REFERENCES) if not patterns else []
    for pattern in patterns or ("*",):
        found = presets(pattern)
        if not found:
            raise ValueError(f"--presets {pattern}: matches no tower of this package")
        names += [name for name in found if name not in names]
    rows = []
    for name in tqdm(names, desc="counting", unit=" presets", leave=False, disable=None):
        row = {"label": name, **describe(Subject(name, name, {}).make(img_size=img_size))}
        figures = published(name) if row["image_size"] == [224, 224] else []
        row["published"] = [
            {
                "gmacs": figure.gmacs,
                "part": figure.part,
                "source": figure.source,
                "reason": figure.reason,
                "counted": figure.counted(row),
                "deviation": figure.counted(row) / figure.gmacs - 1,
            }
            for figure in figures
        ]
        rows.append(row)
    return {"versions": versions(), "towers": rows}


def read_accuracy(file: str | Path) -> dict[str, float]:
    """Tower → top-1 as a share of 1, from a JSON object, a JSON list of {"name", "top1"}, or a CSV file with these columns.

    Shares and percentages are both understood: percentages, if any number is above 1.
    Raises:
        ValueError: naming the file, and what is wrong with it.
    """
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            rows = [(row["name"], row["top1"]) for row in csv.DictReader(text.splitlines(), skipinitialspace=True)]
        else:
            content = json.loads(text)
            rows = content.items() if isinstance(content, dict) else [(row["name"], row["top1"]) for row in content]
        pairs = [(str(name).strip(), float(value)) for name, value in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not {{name: top1}} in JSON, nor CSV with columns name, top1 ({error!r})") from error
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"{path}: {twice} is given twice")
    for name, value in found.items():
        if not 0 <= value <= 100:  # nor NaN
            raise ValueError(f"{path}: {name}: {value} is no top-1; give a share from 0 to 1, or 0 to 100 per cent")
    scale = 100 if any(value > 1 for value in found.values()) else 1
    if scale == 100 and (small := [name for name, value in found.items() if 0 < value < 1]):
        raise ValueError(
            f"{path}: {small[0]}: {found[small[0]]} beside percentages; give all as shares or all as per cent"
        )
    return {name: value / scale for name, value in found.items()}
