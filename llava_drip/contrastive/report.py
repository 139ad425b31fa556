"""What a run writes down: run.json, steps.jsonl, epochs.jsonl, the log, scalars for tensorboard and wandb. By rank 0 alone."""

from __future__ import annotations

import json
import logging
import platform
import sys
from argparse import Namespace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch
from open_clip_train import train as trainer_train
from open_clip_train.distributed import is_master
from torch import nn

from llava_drip.contrastive.epoch import line
from llava_drip.files import write_whole
from llava_drip.training.records import Records

VERSIONS = ("torch", "timm", "open_clip_torch", "webdataset")


class Report:
    """Other ranks may call it all the same: it does nothing there."""

    def __init__(self, args: Namespace, folder: Path):
        self.args, self.folder, self.tb_writer = args, folder, None
        self.epochs, self.steps = Records(folder / "epochs.jsonl"), Records(folder / "steps.jsonl")

    def start(self, argv: list[str], model: nn.Module, loader, epoch: int, step: int) -> None:
        """Training begins, or goes on after so many completed epochs and steps: what was written beyond them goes."""
        if not is_master(self.args):
            return
        self.epochs.cut("epoch", epoch)
        self.steps.cut("step", step)
        path, now = self.folder / "run.json", datetime.now().astimezone().isoformat(timespec="seconds")
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        device = torch.device(self.args.device)
        run = {
            "program": "train_clip.py",
            "command": [Path(sys.argv[0]).name, *argv],
            "model": self.args.model,
            "flags": json.loads(json.dumps(vars(self.args), default=str)),
            "versions": {"python": sys.version.split()[0], **{name: version(name) for name in VERSIONS}},
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "data": {
                "train_data": self.args.train_data,
                "samples": loader.num_samples,  # of an epoch, over all ranks
                "batches": loader.num_batches,  # of a rank in an epoch
            },
            "step_batch": self.args.batch_size * self.args.accum_freq * self.args.world_size,
            "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
            "started": before.get("started", now),
        }
        if before:
            run["resumed"] = [*before.get("resumed", []), now]
        write_whole(path, json.dumps(run, indent=2) + "\n")
        if step:
            logging.info(f"Training goes on after step {step} (completed epochs: {epoch})")

    def step(self, step: int, epoch: int, row: dict[str, float], window: tuple[int, dict[str, float]] | None) -> None:
        """A step at which the trainer logs.

        Args:
            step: counted from 1. epoch: completed ones.
            row: losses over all ranks, lr, logit_scale.
            window: steps since the last such step, and their tokens (TokenHistogram.summary); None where none are counted.
        """
        if not is_master(self.args):
            return
        row = {"step": step, "epoch": epoch + 1, **row}
        if window is not None:
            steps, found = window
            row |= {"tokens": found["tokens"], "compression": found["compression"]}
            text = f"{found['compression']:.3f} patches per token, {found['tokens']:.2f} tokens per image"
            logging.info(f"Train Epoch: {epoch} Compression: {text} (last {steps} steps)")
            scalars = {"compression": found["compression"], "tokens_per_image": found["tokens"]}
            self._scalars("train", scalars, step - 1, step - 1)
        self.steps.add(row)

    def epoch(self, row: dict) -> None:
        """An epoch is over; see epoch.py."""
        if not is_master(self.args):
            return
        self.epochs.add(row)
        logging.info(line(row))
        # The trainer's own evaluations have logged to wandb at this step, which takes nothing for an earlier one afterwards.
        step = row["step"]
        if "compression_eval" in row:
            scalars = {"compression_epoch": row["compression"], "compression_eval": row["compression_eval"]}
            self._scalars("train", scalars, step - 1, step)  # the trainer counts from 0
        # open_clip's figures of --val-data are "val/image_to_text_R@1", ...; these are others.
        recalls = {name: value for name, value in row.items() if "_R@" in name}
        self._scalars("retrieval", recalls, row["epoch"], step)
        scores = {name: value for name, value in row.items() if name.startswith("zero_shot")}
        self._scalars("val", scores, row["epoch"], step)

    def _scalars(self, group: str, scalars: dict[str, float], place: int, step: int) -> None:
        """place: where on tensorboard's axis; open_clip puts evaluations at their epoch."""
        scalars = {f"{group}/{name}": value for name, value in scalars.items()}
        if self.tb_writer is not None:
            for name, value in scalars.items():
                self.tb_writer.add_scalar(name, value, place)
        if self.args.wandb and scalars:
            trainer_train.wandb.log({**scalars, "step": step}, step=step)
