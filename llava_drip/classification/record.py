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

from llava_drip.classification.model import Classifier
from llava_drip.classification.sources import Source
from llava_drip.files import write_whole

# Flags that may change when a run goes on: how it is run, not what it computes.
FREE = {"output", "resume", "device", "report_to", "wandb_project", "save_every_n_steps", "keep_checkpoints"}
FREE |= {"log_every_n_steps", "eval_every_n_epochs", "val_data", "grad_checkpointing", "budgets"}
FREE_OF_FOLDERS = {"workers", "shuffle_buffer"}  # they make the order of shards


def run_record(
    args: Namespace,
    program: str,
    command: list[str],
    classifier: Classifier,
    source: Source,
    steps_an_epoch: int,
    step_batch: int,
    lr: float,
    ranks: int,
    frozen: str | None,
) -> dict:
    """What run.json holds. frozen: SHA-256 of what does not train (model.frozen_hash)."""
    parameters = list(classifier.model.parameters())
    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    return {
        "program": program,
        "command": command,
        "model": classifier.name,
        "flags": dict(sorted(vars(args).items())),
        "steps_an_epoch": steps_an_epoch,
        "step_batch": step_batch,
        "lr": lr,
        "ranks": ranks,
        "parameters": sum(p.numel() for p in parameters),
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "frozen_sha256": frozen,
        "data": {"train": args.train_data, "val": args.val_data, "kind": source.kind, "classes": source.names},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "accelerate": accelerate.__version__,
        },
        "machine": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU",
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def write_record(output: Path, record: dict) -> None:
    write_whole(output / "run.json", json.dumps(record, indent=2))


def check_same_run(output: Path, record: dict) -> dict:
    """The record of the run that is resumed. ValueError naming what would make it another run."""
    path = output / "run.json"
    try:
        before = json.loads(path.read_text())
        flags, data = before["flags"], before["data"]
        if before["program"] != record["program"]:
            raise ValueError(f"it is a run of {before['program']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--resume: {path} cannot be read ({error}); without it nobody knows what the run was"
        ) from error
    free = FREE | {"batch_size", "grad_accum_steps"}
    if record["data"]["kind"] == "folder":
        free |= FREE_OF_FOLDERS
    for name, value in json.loads(json.dumps(record["flags"])).items():
        if name not in free and flags.get(name) != value:
            raise ValueError(
                f"--resume: --{name.replace('_', '-')} was {flags.get(name)}, now {value}; give the run's own flags, or "
                "another --output"
            )
    if before["step_batch"] != record["step_batch"]:
        raise ValueError(
            f"--resume: a step had {before['step_batch']} pictures (processes x --batch-size x --grad-accum-steps), "
            f"now {record['step_batch']}"
        )
    if data["classes"] != record["data"]["classes"]:
        raise ValueError("--resume: --train-data has other classes now, or in another order")
    if before["steps_an_epoch"] != record["steps_an_epoch"]:
        raise ValueError(
            f"--resume: an epoch had {before['steps_an_epoch']:,} steps, now {record['steps_an_epoch']:,}: --train-data has "
            "changed, or is divided otherwise; give the same processes, --batch-size and --grad-accum-steps"
        )
    return before
