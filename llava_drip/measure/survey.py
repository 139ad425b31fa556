"""Towers measured side by side: what they are, what an image costs, how long passes take, how much memory; as plain records."""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from textwrap import shorten

import timm
import torch
from torch import nn
from tqdm import tqdm

from llava_drip.measure.memory import peak_on_cpu, peak_on_cuda
from llava_drip.measure.published import REFERENCES, published
from llava_drip.measure.speed import Pass, Setting, Timing, time_towers
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
        accuracy: label or name → top-1, a share of 1.
        after_each: called with what there is so far when a setting has been measured.
    Returns:
        {"machine", "versions", "plan", "load": (before, after), "towers": [{"label", "name", "arguments", what
        subjects.describe gives, "images": what over_images gives or None, "top1" or None, "passes": [{the setting, what
        Timing has, "peak_memory_gib" or None}]}]}; a setting that a tower could not run, for want of memory say, has None for
        all figures, and "error".
    Raises:
        ValueError: a subject that cannot be made, two of one label, or no images.
    """
    labels = [subject.label for subject in subjects]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{label}: two towers of one label; give --labels")
    paths = None if plan.images is None else find_images(plan.images, plan.max_images)
    before, rows, models = load(), [], {}
    for subject in subjects:
        model = models[subject.label] = subject.make(plan.num_classes, plan.img_size)
        row = {"label": subject.label, "name": subject.name, "arguments": subject.arguments, **describe(model)}
        row["images"] = None
        if paths is not None:
            bar = tqdm(paths, desc=subject.label, unit=" images", leave=False, disable=None)
            row["images"] = over_images(model, paths, lambda _, bar=bar: bar)
        named = accuracy or {}
        row["top1"] = named.get(subject.label, named.get(subject.name))
        rows.append({**row, "passes": []})

    def result() -> dict:
        return {**where(plan), "load": (before, load()), "plan": asdict(plan), "towers": rows}

    for setting in plan.settings:
        for row, measured in zip(rows, _measure(subjects, models, setting, plan), strict=True):
            row["passes"].append(measured)
        after_each(result())
    return result()


def _measure(subjects: Sequence[Subject], models: dict[str, nn.Module], setting: Setting, plan: Plan) -> list[dict]:
    on_cuda = torch.device(setting.device).type == "cuda"
    try:
        timings = time_towers(models, setting, plan.rounds, plan.warmup, plan.spread)
    except RuntimeError as error:  # torch's, out of memory above all: other settings may do
        failed = {field.name: None for field in fields(Timing) if field.name != "label"}
        return [{**asdict(setting), **failed, "peak_memory_gib": None, "error": one_line(error)} for _ in subjects]
    result = []
    for subject, timing in zip(subjects, timings, strict=True):
        peak = error = None
        try:
            if plan.memory and on_cuda:
                one = Pass(models[subject.label], setting, plan.spread)
                try:
                    peak = peak_on_cuda(one)
                finally:
                    one.end()
            elif plan.memory and setting.device == "cpu":
                peak = peak_on_cpu(subject, setting, plan.num_classes, plan.img_size, plan.spread)
        except RuntimeError as failure:
            error = f"memory: {one_line(failure)}"
        measured = {key: value for key, value in asdict(timing).items() if key != "label"}
        result.append({**asdict(setting), **measured, "peak_memory_gib": peak, "error": error})
    return result


def one_line(error: Exception) -> str:
    return shorten(str(error), 200, placeholder=" ...")


def preset_costs(patterns: Sequence[str], img_size: int | None) -> dict:
    """What every preset of this package, and timm's REFERENCES, cost at one size, beside published figures.

    patterns: timm's, of names. None of them: every preset. img_size: None for each one's own.
    Returns:
        {"versions", "towers": [{"label", what subjects.describe gives, "published": [{"gmacs", "attention", "source",
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
                "attention": figure.attention,
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
        found = {str(name).strip(): float(value) for name, value in rows}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not {{name: top1}} in JSON, nor CSV with columns name, top1 ({error!r})") from error
    scale = 100 if any(value > 1 for value in found.values()) else 1
    return {name: value / scale for name, value in found.items()}


def where(plan: Plan) -> dict:
    """{"machine": device → what it is, "versions", "date"}."""
    machines = {}
    for device in dict.fromkeys(setting.device for setting in plan.settings):
        on_cuda = torch.device(device).type == "cuda"
        cpu = f"{_cpu()}, {torch.get_num_threads()} thread(s) of {os.cpu_count()} cores"
        machines[device] = torch.cuda.get_device_name(device) if on_cuda else cpu
    return {"machine": machines, "versions": versions(), "date": datetime.date.today().isoformat()}


def versions() -> str:
    return f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return f"{platform.machine()} CPU"


def load() -> float | None:
    """Processes that want a core, mean of the last minute: what else a machine was doing."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
