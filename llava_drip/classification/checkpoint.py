"""Checkpoints of a run, each whole or absent: accelerate's state of model and optimizer, and where the run was."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from llava_drip.classification import sharding
from llava_drip.cli import one_line

STATE = "trainer.json"
Divided = tuple[nn.Module, Optimizer]


def newest(output: Path) -> Path | None:
    """The checkpoint of the highest step; half-written ones (.partial) do not count."""
    found = {
        int(m[1]): path
        for path in (output / "checkpoints").glob("step-*")
        if (m := re.fullmatch(r"step-(\d+)", path.name))
    }
    whole = {step: path for step, path in found.items() if (path / STATE).is_file()}
    return whole[max(whole)] if whole else None


def save(accelerator: Accelerator, output: Path, step: int, state: dict, keep: int, divided: Divided | None) -> None:
    """Writes checkpoints/step-N (a collective), then drops all but the newest `keep`.

    divided: under FSDP the model and its optimizer, which accelerate does not know then.

    The folder gets its name when everything in it is on disk, so a run killed here goes on from the one before.
    """
    folder = output / "checkpoints"
    final, partial = folder / f"step-{step}", folder / f"step-{step}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    if divided is None:
        accelerator.save_state(str(partial))
    else:
        sharding.save(*divided, partial)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / STATE).write_text(json.dumps(state))
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        steps = sorted(int(path.name[5:]) for path in folder.glob("step-*") if path.name[5:].isdigit())
        for old in steps[:-keep]:
            shutil.rmtree(folder / f"step-{old}")
    accelerator.wait_for_everyone()


def load(accelerator: Accelerator, path: Path, divided: Divided | None) -> dict:
    """Puts model and optimizer back (a collective); returns the state that `save` was given.

    Raises:
        ValueError: the checkpoint does not fit the run, or is damaged.
    """
    try:
        state = json.loads((path / STATE).read_text())
        if divided is None:
            accelerator.load_state(str(path))
        else:
            sharding.load(*divided, path)
        return state
    except Exception as error:  # torch, safetensors and accelerate each raise their own
        raise ValueError(
            f"--resume: {path} cannot be read, or is of another model: {one_line(error, 300)}; remove it to go on from "
            "the one before"
        ) from error
