"""What happens around the steps and epochs of open_clip's train_one_epoch: randomness, records, checkpoints, evaluation.

The trainer iterates over `_Steps` instead of the loader. What comes before a batch is yielded happens before the step's work;
what comes after it, when the step is over and before the next batch is taken: there the loader's state is that of the steps
done, and a checkpoint can be written.
"""

from __future__ import annotations

import builtins
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from open_clip import get_input_dtype
from open_clip_train import train as trainer_train
from open_clip_train.data import DataInfo
from open_clip_train.distributed import is_master
from open_clip_train.precision import get_autocast
from open_clip_train.train import evaluate, train_one_epoch
from torch import Tensor, nn

from llava_drip.cli import one_line
from llava_drip.contrastive.epoch import EpochMeters, mean_over_ranks
from llava_drip.contrastive.model import has_boundaries, patches_of, tower_of
from llava_drip.contrastive.report import Report
from llava_drip.contrastive.resume import OURS, STEP_CHECKPOINT, settings_of
from llava_drip.contrastive.validation import Evaluation, Patience, is_due
from llava_drip.towers import Drip
from llava_drip.training.loader import TrainLoader
from llava_drip.training.meters import TokenHistogram, reset_peak_memory
from llava_drip.training.seeds import SharedNoise, kept_randomness, seed_step
from llava_drip.training.skips import Skips

ZERO_SHOT = {"imagenet-zeroshot-val-top1": "zero_shot_top1", "imagenet-zeroshot-val-top5": "zero_shot_top5"}


class StepNoise(SharedNoise):
    """SharedNoise for --accum-freq: a batch passes twice, for features and for gradients, with the same boundaries."""

    def __init__(self, seed: int, rank: int, ranks: int, batches: int):
        self.batches = batches
        super().__init__(seed, rank, ranks)

    def __call__(self, like: Tensor) -> Tensor:
        self.calls %= self.batches
        return super().__call__(like)


class Run:
    """A run from its first epoch in this process to its last."""

    def __init__(self, args: Namespace, argv: list[str], model: nn.Module, save_whole: Callable):
        """
        Args:
            argv: the command line, for the run's description.
            model: open_clip's, not wrapped.
            save_whole: torch.save, by way of a temporary file.
        """
        self.args, self.argv, self.model, self.save_whole = args, argv, model, save_whole
        self.position: dict = {}  # what the checkpoint held of ours (resume.py)
        self.evaluation: Evaluation | None = None
        self.started = False
        self.meters: EpochMeters | None = None
        self.row: dict | None = None  # of an epoch that is not yet written down
        self.steps_done = 0

    @property
    def folder(self) -> Path:
        return Path(self.args.logs, self.args.name)

    def train_one_epoch(self, model, data, loss, epoch, optimizer, scaler, scheduler, dist_model, args, tb_writer=None):
        """open_clip_train.train.train_one_epoch and all that surrounds it."""
        loader = data["train"].dataloader
        steps = loader.num_batches // args.accum_freq
        if not self.started:
            self._start(loader, epoch, steps)
        self.report.tb_writer = tb_writer
        data["train"].set_epoch(epoch)
        first = getattr(loader, "first", 0)
        tower = tower_of(self.model)
        counts = has_boundaries(self.model)
        self.meters = EpochMeters(args.device, args.accum_freq, patches_of(tower) if counts else None)
        if first:
            self.meters.resume(self.position["meters"])
        loss.on_tokens = self.meters.add_tokens if counts else None
        reset_peak_memory()
        wrapped = _Steps(self, loader, epoch, steps, first)
        self.save = lambda completed, state: self._save(model, optimizer, scaler, completed, state)
        self.lr = lambda: optimizer.param_groups[0]["lr"]
        self.meters.clock.restart()
        with _counting_from(first):
            train_one_epoch(
                model,
                {**data, "train": DataInfo(wrapped)},
                loss,
                epoch,
                optimizer,
                scaler,
                scheduler,
                dist_model,
                args,
                tb_writer,
            )
        if self.meters.steps == 0:
            raise ValueError(
                f"epoch {epoch} had no training step: a step takes --accum-freq {args.accum_freq} batches of --batch-size "
                f"{args.batch_size} on each rank, an epoch has {loader.num_batches}"
            )
        self.steps_done = steps * (epoch + 1)
        images = args.batch_size * args.accum_freq * args.world_size
        row = {"epoch": epoch + 1, "step": self.steps_done, "lr": self.lr(), **self.meters.summary(images)}
        if counts:
            row["compression_eval"] = self._eval_compression(tower, wrapped.images)
        elif tower is not None:  # nothing is drawn by chance: training has as many tokens as eval
            compression = self._eval_compression(tower, wrapped.images)
            row |= {
                "tokens": patches_of(tower) / compression,
                "compression": compression,
                "compression_p5": compression,
                "compression_p95": compression,
            }
        skips = loader.all_skips() if isinstance(loader, TrainLoader) else Skips()
        self.row = row | {"skipped": skips.state()}
        if self.evaluation is not None and is_due(args, epoch + 1):
            if is_master(args):
                self.row |= _or_reason(lambda: self.evaluation(self.model))
            self.patience.wait()
        if not any(name in data for name in ("val", "imagenet-val", "imagenet-v2")):
            self._finish_epoch()

    def evaluate(self, model, data, epoch, args, tb_writer=None, tokenizer=None):
        """open_clip_train.train.evaluate on its own validation sets; their figures join the epoch's."""
        with kept_randomness():
            if self.row is None:  # nothing is trained
                return evaluate(model, data, epoch, args, tb_writer=tb_writer, tokenizer=tokenizer)
            metrics = _or_reason(lambda: evaluate(model, data, epoch, args, tb_writer=tb_writer, tokenizer=tokenizer))
        self.patience.wait()
        if "evaluation_error" in metrics:
            self.row |= metrics
            metrics = {}
        metrics = {name: float(value) for name, value in metrics.items()}
        beside = "zero_shot_top1" in self.row  # --zeroshot-data has said its own: two domains side by side
        for name, ours in ZERO_SHOT.items():
            if name in metrics:
                self.row[ours.replace("zero_shot", "imagenet") if beside else ours] = metrics[name]
        if metrics:
            self.row["validation"] = metrics
        self._finish_epoch()
        return metrics

    def extra(self, state: dict | None = None, meters: dict | None = None) -> dict:
        """What a checkpoint holds of ours; see resume.py."""
        return {"step": self.steps_done, "settings": self.settings, "loader": state, "meters": meters}

    def _start(self, loader, epoch: int, steps: int) -> None:
        if self.position.get("loader"):
            loader.resume(self.position["loader"])
        self.started, self.patience, self.settings = True, Patience(), settings_of(self.args)
        done = steps * epoch + getattr(loader, "first", 0) // self.args.accum_freq
        self.report = Report(self.args, self.folder)
        self.report.start(self.argv, self.model, loader, epoch, done)
        tower, self.noise = tower_of(self.model), None
        if isinstance(tower, Drip):
            args = self.args
            tower.noise = self.noise = StepNoise(args.seed, args.rank, args.world_size, args.accum_freq)

    def before_batch(self, step: int, part: int) -> None:
        """Before the work on a batch: part `part` of optimizer step `step`, counted from 0 over the run."""
        # Augmentation in this process (--workers 0) has just drawn from the same generators.
        seed_step(self.args.seed, "step", step, part, self.args.rank)
        if part == 0 and self.noise is not None:
            self.noise.at(step)

    def after_step(self, epoch: int, step: int, steps: int, state) -> None:
        """After optimizer step `step` of an epoch's `steps`, counted from 0. state: () → the loader's state, a collective."""
        args, meters = self.args, self.meters
        meters.end_step()
        self.steps_done = steps * epoch + step + 1
        if step % args.log_every_n_steps == 0 or step + 1 == steps:  # the trainer's own condition
            losses = mean_over_ranks(meters.last)
            window = meters.take_window() if meters.tokens is not None else None
            scalars = {"lr": self.lr(), "logit_scale": self.model.logit_scale.item()}
            self.report.step(self.steps_done, epoch, losses | scalars, window)
        if self._save_is_due() and step + 1 < steps:  # the end of an epoch is saved when it is written down
            self.save(epoch, state())

    def _eval_compression(self, tower: nn.Module, images: Tensor) -> float:
        """The same weights in eval mode on one batch [B, 3, h, w] of each rank: without noise it should spend as much."""
        args = self.args
        images = images.to(device=args.device, dtype=get_input_dtype(args.precision))
        use = TokenHistogram(patches_of(tower), images.device)
        tower.eval()
        with torch.no_grad(), get_autocast(args.precision, device_type=images.device.type)():
            use.add(tower.forward_features(images).lengths)
        tower.train()
        return use.summary()["compression"]

    def _finish_epoch(self) -> None:
        row, self.row = self.row, None
        self.report.epoch(row)
        if self._save_is_due() and not self._epoch_is_kept(row["epoch"]):
            self.save(row["epoch"], None)

    def _epoch_is_kept(self, epoch: int) -> bool:
        """Whether the trainer saves after so many completed epochs (its own condition), which makes ours needless.

        Worse than needless at a run's end: killed between the two, it would find nothing left to do, and epoch_N.pt were missing.
        """
        args = self.args
        every = args.save_frequency
        return epoch == args.epochs or (every > 0 and epoch % every == 0) or args.save_most_recent

    def _save_is_due(self) -> bool:
        return self.args.save_every_n_steps > 0 and self.steps_done % self.args.save_every_n_steps == 0

    def _save(self, model, optimizer, scaler, completed: int, state: dict | None) -> None:
        meters = self.meters.state() if state is not None else None  # a collective
        if not self.args.save_logs:
            return
        checkpoint = {
            "epoch": completed,
            "name": self.args.name,
            "state_dict": getattr(model, "_orig_mod", model).state_dict(),
            "optimizer": optimizer.state_dict(),
            OURS: self.extra(state, meters),
        }
        if scaler is not None:
            checkpoint["scaler"] = scaler.state_dict()
        self.save_whole(checkpoint, self.folder / "checkpoints" / STEP_CHECKPOINT)


def _or_reason(evaluation: Callable[[], dict]) -> dict:
    """What an evaluation found; or {"evaluation_error": why not}: a bad file of it must not cost the epoch that was trained."""
    try:
        return evaluation()
    except (ValueError, OSError) as error:
        logging.error(f"Evaluation failed, training goes on: {one_line(error)}")
        return {"evaluation_error": one_line(error)}


class _Steps:
    """One epoch's batches, as the trainer iterates over them."""

    def __init__(self, run: Run, loader, epoch: int, steps: int, first: int):
        self.run, self.loader, self.epoch, self.steps, self.first = run, loader, epoch, steps, first
        self.num_batches, self.num_samples = loader.num_batches, loader.num_samples
        self.images: Tensor | None = None  # of the last batch

    def __iter__(self) -> Iterator[list[Tensor]]:
        parts = self.run.args.accum_freq
        for number, batch in builtins.enumerate(self.loader, self.first):
            step, part = divmod(number, parts)
            self.images = batch[0]
            self.run.before_batch(self.steps * self.epoch + step, part)
            yield batch
            if part == parts - 1:
                state = getattr(self.loader, "state", None)
                self.run.after_step(self.epoch, step, self.steps, state)


@contextmanager
def _counting_from(first: int) -> Iterator[None]:
    """open_clip's loop numbers its batches from `first`: its steps, learning rates and log lines follow from that."""
    trainer_train.enumerate = lambda iterable: builtins.enumerate(iterable, first)
    try:
        yield
    finally:
        del trainer_train.enumerate
