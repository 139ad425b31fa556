"""run.json and epochs.jsonl as the trainers write them."""

from __future__ import annotations

import json
from pathlib import Path

from llava_drip.training.records import Records

HALF = (0.5, 0.5, 0.5)


def epoch(number: int, **metrics: float) -> dict:
    """A row of epochs.jsonl."""
    return {
        "epoch": number,
        "step": 10 * number,
        "loss": 2.0 / number,
        "lr": 1e-3,
        "step_seconds": 0.1 * number,
        "images_per_second": 320.0,
        "peak_memory_gib": 0.5,
        "skipped": {"counts": {}, "examples": []},
        "tokens": 16.0,
        "compression": 4.0,
        "compression_p5": 3.2,
        "compression_p95": 5.1,
        **metrics,
    }


def write_run(folder: Path, program: str, model: str, epochs: list[dict], **info) -> Path:
    """run.json and epochs.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "program": program,
        "command": [f"scripts/{program}", "--model", model, "--train-data=/secret/place/train-{00..01}.tar"],
        "model": model,
        "flags": {"model": model, "train_data": "/secret/place/train-{00..01}.tar", "lr": 1e-3},
        "versions": {"python": "3.11.7", "torch": "2.15.0"},
        "parameters": 475835,
        "data": {"train": "/secret/place/train-{00..01}.tar", "classes": ["cat", "dog"]},
        "started": "2026-11-24T05:00:00+00:00",
    }
    (folder / "run.json").write_text(json.dumps(content | info))
    records = Records(folder / "epochs.jsonl")
    for row in epochs:
        records.add(row)
    return folder
