"""The learning-rate range test of CLIP training: open_clip's trainer, as scripts/train_clip.py runs it, at a rate that rises."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

from open_clip_train import main as trainer
from open_clip_train.distributed import world_info_from_env
from torch import Tensor
from tqdm import tqdm

from llava_drip.contrastive import arguments, register
from llava_drip.contrastive.adapter import Progress, run_trainer
from llava_drip.contrastive.evaluator import replaced
from llava_drip.contrastive.train import TrainingError, logging_restored, mistakes_named
from llava_drip.training.range_test import RangeTest, analyse, divergence, rates, smooth

# A range test evaluates nothing, keeps nothing and begins anew.
_OFF = (
    *("val_data", "imagenet_val", "imagenet_v2", "zeroshot_data", "zeroshot_classes"),
    *("retrieval_data", "retrieval_images", "retrieval_split", "resume", "remote_sync", "copy_codebase"),
)


class _Over(Exception):
    """All steps are done, or the loss has diverged."""


def range_test(argv: list[str], start: float, end: float, steps: int, beta: float) -> tuple[RangeTest, str]:
    """Trains `steps` steps from rate start to rate end, or until the loss has diverged, in a temporary folder.

    Args:
        argv: the flags of scripts/train_clip.py, a recipe first if any; what they say of schedule and evaluation has no effect.
        beta: of the average that smooths the losses.
    Returns:
        The result, and a title: model, data, batch.
    Raises:
        ValueError: flags or data that are wrong, several ranks, or too few steps before the first loss that is no number.
    """
    register()
    with tempfile.TemporaryDirectory() as logs, logging_restored():
        args = arguments.parse(argv)
        if world_info_from_env()[2] > 1:
            raise TrainingError("a range test is for one process; --accum-freq makes a step as large")
        for name in _OFF:
            setattr(args, name, None)
        args.logs, args.name, args.report_to, args.save_every_n_steps = logs, "range_test", "", 0
        # An epoch has at least one step: the test ends before the last one does, which would be saved.
        args.lr_scheduler, args.skip_scheduler, args.epochs = "cosine", False, steps + 1
        args.save_frequency, args.save_most_recent, args.log_every_n_steps = 0, False, steps
        arguments.check(args)
        test = _Test(rates(start, end, steps), args.accum_freq, beta)
        progress = Progress(on_loss=test.on_loss)
        disabled = logging.root.manager.disable
        logging.disable(logging.INFO)  # the trainer prints the model and every step
        try:
            with replaced(trainer, cosine_lr=test.scheduler), mistakes_named(args, progress):
                run_trainer(args, argv, progress)
        except _Over:
            pass
        finally:
            logging.disable(disabled)
            test.bar.close()
    data = "synthetic" if args.train_data is None else Path(args.train_data).name
    title = f"{args.model}, {data}, batch {args.batch_size * args.accum_freq}"
    return analyse(test.points, beta), title


class _Test:
    """Sets the rate of each step, and takes its loss."""

    def __init__(self, lrs: list[float], calls: int, beta: float):
        """calls: of the loss in one step."""
        self.lrs, self.calls, self.beta = lrs, calls, beta
        self.points: list[tuple[float, float]] = []
        self.losses: list[float] = []  # of the present step
        self.bar = tqdm(total=len(lrs), desc="range test", unit="step", disable=None)

    def scheduler(self, optimizer, *_) -> Callable[[int], None]:
        """Takes open_clip's cosine_lr's place."""

        def set_rate(step: int) -> None:
            if step >= len(self.lrs) or self._diverged():
                raise _Over
            for group in optimizer.param_groups:
                group["lr"] = self.lrs[step]

        return set_rate

    def on_loss(self, losses: dict[str, Tensor]) -> None:
        self.losses.append(sum(value.item() for value in losses.values()))
        if len(self.losses) == self.calls:
            lr = self.lrs[len(self.points)]
            self.points.append((lr, sum(self.losses) / self.calls))
            self.losses = []
            self.bar.update()
            self.bar.set_postfix(lr=f"{lr:.1e}", loss=f"{self.points[-1][1]:.3f}")

    def _diverged(self) -> bool:
        losses = [loss for _, loss in self.points]
        return bool(losses) and (
            not math.isfinite(losses[-1]) or divergence(losses, smooth(losses, self.beta)) is not None
        )
