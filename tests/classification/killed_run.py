"""scripts/train_imagenet.py (or, given a teacher, distill_tower.py) that is killed, with no chance to tidy up, at a given place.

python tests/classification/killed_run.py step:N FLAGS     once step N is written down
python tests/classification/killed_run.py saving:N FLAGS   when all files of checkpoint N are written, but it has no name yet
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch

from llava_drip.classification import arguments, distill_arguments
from llava_drip.classification.distill import distill
from llava_drip.classification.train import train
from llava_drip.training.records import Records


def main(kill: str, flags: list[str]) -> None:
    torch.set_num_threads(1)
    # Where a test's forkserver begot this process it would be the way of its data workers too, which then outlive a kill.
    multiprocessing.set_start_method("fork", force=True)
    where, _, number = kill.partition(":")
    add, rename = Records.add, Path.rename

    def add_and_die(self: Records, row: dict) -> None:
        add(self, row)
        if where == "step" and self.path.name == "steps.jsonl" and row["step"] == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    def die_or_rename(self: Path, target: Path) -> Path:
        if where == "saving" and self.name == f"step-{number}.partial":
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    Records.add, Path.rename = add_and_die, die_or_rename
    if any(flag.startswith("--teacher") for flag in flags):
        distill(distill_arguments.parse(flags, "distill_tower.py", "help"), ["distill_tower.py", *flags])
    else:
        train(arguments.parse(flags, "train_imagenet.py", "help"), ["train_imagenet.py", *flags])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
