"""Runs side by side: the metric, the tokens that an image got, and what that costs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from llava_drip.measure.flops import count_macs
from llava_drip.reports.run import SHARES, TITLES, Run, number

TOKENS = ("tokens", "compression", "compression_p5", "compression_p95")


def tower_gmacs(run: Run, tokens: float | None, at: str = "last") -> float | None:
    """Billions (1e9) of multiply-accumulates of one image through the run's tower at that many tokens (measure/flops.py).

    tokens: of an image, on average, in the blocks after pooling. None where the run kept no tower, or one that is no ViT.
    """
    directory = run.tower(at)
    if directory is None:
        return None
    with torch.device("meta"):  # sizes alone are asked for
        tower = timm.create_model(f"local-dir:{directory}", pretrained=False)
    if not isinstance(tower, VisionTransformer):
        return None
    return count_macs(tower, tokens) / 1e9


def describe(run: Run, label: str, metric: str, at: str = "last") -> dict:
    """One run's row: {"label", "run", "model", "parameters", "epochs", "epoch", "metrics", "tokens", "compression",
    "compression_p5", "compression_p95", "gmacs", "step_seconds", "peak_memory_gib"}; None for what the run does not say.

    epoch: which one the metrics and tokens are of, the last or the best that has the metric. epochs: all. step_seconds: median
    of the epochs' medians; peak_memory_gib: highest of all epochs.
    """
    row = run.row(metric, at)
    steps = [value for each in run.epochs if (value := number(each, "step_seconds")) is not None]
    peaks = [value for each in run.epochs if (value := number(each, "peak_memory_gib")) is not None]
    return {
        "label": label,
        "run": run.name,
        "model": run.model,
        "parameters": run.info.get("parameters"),
        "epochs": int(run.epochs[-1]["epoch"]),
        "epoch": int(row["epoch"]),
        "metrics": {name: value for name in TITLES if (value := number(row, name)) is not None},
        **{name: number(row, name) for name in TOKENS},
        "gmacs": tower_gmacs(run, number(row, "tokens"), at),
        "step_seconds": statistics.median(steps) if steps else None,
        "peak_memory_gib": max(peaks, default=None),
    }


def grouped(rows: Sequence[dict]) -> list[dict]:
    """Rows of one label (seeds) as one: means, and under "spread" the (lowest, highest) of each metric.

    Raises:
        ValueError: runs of one label trained different models, or another number of epochs.
    """
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["label"], []).append(row)
    result = []
    for label, members in groups.items():
        for what in ("model", "epochs"):
            if len(found := sorted({str(member[what]) for member in members})) > 1:
                raise ValueError(
                    f"--group: runs labelled {label!r} differ in {what} ({', '.join(found)}); give other --labels"
                )
        names = [name for name in members[0]["metrics"] if all(name in member["metrics"] for member in members)]
        values = {name: [member["metrics"][name] for member in members] for name in names}
        means = {key: _mean([member[key] for member in members]) for key in (*TOKENS, "gmacs", "step_seconds")}
        peaks = [member["peak_memory_gib"] for member in members if member["peak_memory_gib"] is not None]
        result.append(
            {
                **members[0],
                **means,
                "run": [member["run"] for member in members],
                "epoch": [member["epoch"] for member in members],
                "metrics": {name: statistics.fmean(of_name) for name, of_name in values.items()},
                "spread": {name: (min(of_name), max(of_name)) for name, of_name in values.items()},
                "peak_memory_gib": max(peaks, default=None),
            }
        )
    return result


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else statistics.fmean(values)


def markdown(rows: Sequence[dict], metric: str) -> str:
    """A table, a row a run (or group): the metric first, then the other shares that any row has."""
    names = [metric, *(name for name in SHARES if name != metric and any(name in row["metrics"] for row in rows))]
    heads = ["run", "model", "epochs", *(TITLES[name] for name in names)]
    heads += ["tokens", "compression (p5 .. p95)", "GMACs", "step (s)", "peak memory (GiB)"]
    lines = [heads, ["---"] * 3 + ["---:"] * (len(heads) - 3)]
    for row in rows:
        runs = len(row["run"]) if "spread" in row else 1
        label = row["label"] + (f" ({runs} runs)" if runs > 1 else "")
        cells = [label, row["model"], str(row["epochs"])]
        cells += [format_metric(name, row["metrics"].get(name), row.get("spread", {}).get(name)) for name in names]
        cells += [_format(row["tokens"], ".1f"), format_compression(row), _format(row["gmacs"], ".3g")]
        cells += [_format(row["step_seconds"], ".3f"), _format(row["peak_memory_gib"], ".2f")]
        lines.append([cell.replace("|", r"\|") for cell in cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def format_metric(name: str, value: float | None, spread: tuple[float, float] | None = None) -> str:
    """71.32% for a share, 1.234 for a loss, with (lowest .. highest) where there are several runs; - for None."""
    if value is None:
        return "-"
    scale, form, unit = (100, ".2f", "%") if name in SHARES else (1, ".4g", "")
    text = f"{value * scale:{form}}{unit}"
    if spread is not None and spread[0] != spread[1]:
        text += f" ({spread[0] * scale:{form}} .. {spread[1] * scale:{form}})"
    return text


def format_compression(row: dict) -> str:
    """3.92x (3.05 .. 5.12), or - for a tower without tokens."""
    if row.get("compression") is None:
        return "-"
    text = f"{row['compression']:.2f}x"
    low, high = row.get("compression_p5"), row.get("compression_p95")
    return text if low is None or high is None or low == high else f"{text} ({low:.2f} .. {high:.2f})"


def _format(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
