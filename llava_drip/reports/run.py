"""A run's folder as either trainer writes it: run.json says what was trained and how, epochs.jsonl has a row an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llava_drip.files import read_object
from llava_drip.training.records import Records

RUN_FILE, EPOCHS_FILE = "run.json", "epochs.jsonl"
_RECALL = {"image_to_text": "image-to-text", "text_to_image": "text-to-image"}

# Shares of 1, higher is better; in the order in which they are taken as the metric.
SHARES = {
    "top1": "top-1 accuracy",
    "zero_shot_top1": "zero-shot top-1 accuracy",
    **{f"{side}_R@1": f"{title} recall@1" for side, title in _RECALL.items()},
    "ema_top1": "top-1 accuracy of averaged weights",
    "top5": "top-5 accuracy",
    "zero_shot_top5": "zero-shot top-5 accuracy",
    "imagenet_top1": "zero-shot top-1 accuracy on --imagenet-val",
    "imagenet_top5": "zero-shot top-5 accuracy on --imagenet-val",
    "ema_top5": "top-5 accuracy of averaged weights",
    **{f"{side}_R@{k}": f"{title} recall@{k}" for k in (5, 10) for side, title in _RECALL.items()},
}
# Lower is better.
LOSSES = {
    "val_loss": "validation loss",
    "loss": "training loss",
    "task_loss": "task loss",
    "rate_loss": "boundary loss",  # the rate loss and detail_weight times the detail loss
    "contrastive_loss": "contrastive loss",
    "boundary_loss": "boundary loss, weighted",  # the same, times --boundary-loss-weight
}
TITLES = SHARES | LOSSES


def number(row: dict, name: str) -> float | None:
    """A row's finite number of that name; None where there is none (an epoch that was not evaluated)."""
    value = row.get(name)
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if real else None


@dataclass(frozen=True)
class Run:
    """folder: as given. info: run.json. epochs: rows in the order of training, at least one."""

    folder: Path
    info: dict
    epochs: list[dict]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def model(self) -> str:
        """As recorded; of a directory its last two names."""
        name = str(self.info.get("model", "?")).removeprefix("local-dir:")
        return "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() else name

    def metrics(self) -> list[str]:
        """Names of the metrics that some epoch has."""
        return [name for name in TITLES if any(number(row, name) is not None for row in self.epochs)]

    def row(self, metric: str, at: str = "last") -> dict:
        """The last or the best epoch that has the metric. ValueError: none has."""
        rows = [row for row in self.epochs if number(row, metric) is not None]
        if not rows:
            raise ValueError(
                f"{self.folder}: no epoch has the metric {metric!r}; there are {', '.join(self.metrics())}"
            )
        if at == "last":
            return rows[-1]
        return (max if metric in SHARES else min)(rows, key=lambda row: row[metric])

    def tower(self, at: str = "last") -> Path | None:
        """The directory (timm's format) of the tower of the last or best epoch; None where the run kept none."""
        names = ("best", "last", "tower") if at == "best" else ("last", "tower", "best")
        return next((self.folder / name for name in names if (self.folder / name / "config.json").is_file()), None)


def open_run(folder: str | Path) -> Run:
    """Reads a run's folder.

    Raises:
        ValueError: there is no such folder, or no run in it, none of whose epochs has ended, or a damaged file.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"{folder}: no such run folder")
    if not (path / RUN_FILE).is_file():
        raise ValueError(
            f"{folder}: no run's folder, {RUN_FILE} is missing; give --output of train_imagenet.py or LOGS/NAME of train_clip.py"
        )
    info = read_object(path / RUN_FILE)
    rows = [row for row in Records(path / EPOCHS_FILE).read() if number(row, "epoch") is not None]
    if not rows:
        raise ValueError(f"{folder}: no epochs yet ({EPOCHS_FILE} has no row); wait for the end of the first")
    return Run(path, info, rows)


def find_run(directory: Path) -> Run | None:
    """The run that a model's directory belongs to: itself or one of the two above it; None where there is no run."""
    directory = directory.resolve()
    for folder in (directory, *list(directory.parents)[:2]):
        if (folder / RUN_FILE).is_file() and Records(folder / EPOCHS_FILE).read():
            return open_run(folder)
    return None


def choose_metric(runs: Iterable[Run], asked: str | None = None) -> str:
    """The metric asked for, else the first that all runs have.

    Raises:
        ValueError: a run lacks it, or the runs have none in common. Names those there are.
    """
    runs = list(runs)
    if asked is not None:
        for run in runs:
            if asked not in run.metrics():
                raise ValueError(f"--metric {asked}: {run.folder} has none; it has {', '.join(run.metrics())}")
        return asked
    common = [name for name in TITLES if all(name in run.metrics() for run in runs)]
    if not common:
        each = "; ".join(f"{run.folder}: {', '.join(run.metrics()) or 'none'}" for run in runs)
        raise ValueError(f"the runs have no metric in common ({each})")
    return common[0]
