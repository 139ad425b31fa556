"""run.json: what a run is, for those who read its numbers, and for a resumed run to be the same."""

from __future__ import annotations

import datetime
import json
import platform
from argparse import Namespace
from pathlib import Path

import accelerate
import timm
import torch

from llava_drip.classification.data import Source
from llava_drip.classification.model import Classifier

# Flags that may change when a run goes on: how it is run, not what it computes.
FREE = {
    "output",
    "resume",
    "device",
    "report_to",
    "wandb_project",
    "save_every_n_steps",
    "keep_checkpoints",
    "log_every_n_steps",
}
FREE |= {"eval_every_n_epochs", "val_data", "grad_checkpointing"}


def run_record(
    args: Namespace, command: list[str], classifier: Classifier, source: Source, step_batch: int, lr: float, ranks: int
) -> dict:
    """What run.json holds."""
    parameters = list(classifier.parameters())
    return {
        "program": "train_imagenet.py",
        "command": command,
        "model": args.model,
        "flags": dict(sorted(vars(args).items())),
        "step_batch": step_batch,
        "lr": lr,
        "ranks": ranks,
        "parameters": sum(p.numel() for p in parameters),
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "data": {"train": args.train_data, "val": args.val_data, "kind": source.kind, "classes": source.names},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "accelerate": accelerate.__version__,
        },
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def check_same_run(output: Path, record: dict) -> None:
    """ValueError naming a flag with which the resumed run would not be the one that was begun."""
    path = output / "run.json"
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--resume: {path} cannot be read ({error}); without it nobody knows what the run was"
        ) from error
    for name, value in json.loads(json.dumps(record["flags"])).items():
        was = before["flags"].get(name)
        if name not in FREE | {"batch_size", "grad_accum_steps"} and was != value:
            raise ValueError(
                f"--resume: --{name.replace('_', '-')} was {was}, now {value}; give the run's own flags, or another --output"
            )
    if before["step_batch"] != record["step_batch"]:
        raise ValueError(
            f"--resume: a step had {before['step_batch']} pictures (processes x --batch-size x --grad-accum-steps), "
            f"now {record['step_batch']}"
        )
