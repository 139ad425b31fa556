"""train(args): one run of the ImageNet recipe, from flags to a tower on disk. The step is in step.py."""

from __future__ import annotations

import logging
import math
from argparse import Namespace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from llava_drip.classification.epoch import finish_epoch, start_run
from llava_drip.classification.launch import hold_backbone, learning_rate
from llava_drip.classification.model import frozen_hash
from llava_drip.classification.run import CLASSIFICATION, Run, Task, prepare
from llava_drip.classification.step import train_step
from llava_drip.training.meters import StepClock
from llava_drip.training.seeds import seed_step

log = logging.getLogger("llava_drip.train")
logging.getLogger("accelerate").setLevel(logging.WARNING)  # it tells of every file of a checkpoint


def train(args: Namespace, command: list[str], task: Task = CLASSIFICATION) -> Path:
    """Runs, or goes on with, the training that the flags describe (arguments.parse).

    Args:
        command: how the program was started, for the record.
    Returns:
        The output folder: run.json, epochs.jsonl, steps.jsonl, checkpoints/step-N, and the towers last/ and best/ (by top-1 on
        --val-data) in timm's directory format.
    Raises:
        ValueError: flags, data or checkpoints that are wrong; a loss that is no longer a number.
    """
    run = prepare(args, command, task)
    try:
        if task.evaluates_start and run.step == 0:
            start_run(run)
        for epoch in range(run.loader.epoch, args.epochs):
            _train_epoch(run, epoch)
            finish_epoch(run, epoch + 1)
        _finish(run)
    except BaseException:
        # The process group stays: leaving it would wait for ranks that wait for this one. Who started them ends them.
        for tracker in run.accelerator.trackers:
            tracker.finish()
        raise
    run.accelerator.end_training()
    return run.output


def _train_epoch(run: Run, epoch: int) -> None:
    args, accelerator = run.args, run.accelerator
    run.loader.set_epoch(epoch)
    first = run.step - epoch * run.steps_an_epoch  # steps of this epoch before a kill
    if first == 0:
        run.sums = run.new_sums()
    run.clock = StepClock()
    run.model.train()
    bar = tqdm(
        total=run.steps_an_epoch,
        initial=first,
        desc=f"epoch {epoch + 1}/{args.epochs}",
        unit="step",
        leave=False,
        disable=None if run.main else True,  # None: where nobody looks on, log lines tell the same
    )
    batches = iter(run.loader)
    with bar:
        for _ in range(first, run.steps_an_epoch):
            micro = [next(batches) for _ in range(args.grad_accum_steps)]
            if first and not run.clock.seconds:  # data passed over after a resumption is no part of a step
                run.clock.restart()
            run.scheduler.step_update(run.step)
            hold_backbone(args, run.optimizer, learning_rate(args, run.step_batch), run.step / run.steps_an_epoch)
            lr = max(group["lr"] for group in run.optimizer.param_groups)
            seed_step(args.seed, "step", run.step, accelerator.process_index)
            if run.noise is not None:
                run.noise.at(run.step)
            clip = args.clip_grad or None
            losses = train_step(
                accelerator, run.model, run.optimizer, run.objective, micro, clip, tokens=run.sums.tokens
            )
            run.step += 1
            if run.ema is not None:
                run.ema.update(run.classifier, step=run.step)
            run.sums.add(losses)
            run.clock.tick()
            bar.update()
            done = run.step - epoch * run.steps_an_epoch
            over = done == run.steps_an_epoch
            saves = bool(args.save_every_n_steps) and run.step % args.save_every_n_steps == 0 and not over
            if saves or over or done % args.log_every_n_steps == 0:
                means = _means(run, losses, lr)  # also before every checkpoint: none holds weights that are no numbers
                if over or done % args.log_every_n_steps == 0:
                    _log_step(run, means, lr, bar)
            if saves:
                run.save()
                run.clock.restart()


def _means(run: Run, losses: dict[str, Tensor], lr: float) -> dict[str, float]:
    """A step's losses over all ranks (a collective). ValueError on each of them where the loss is no number."""
    means = {name: run.accelerator.reduce(value, "mean").item() for name, value in losses.items()}
    if not math.isfinite(means["loss"]):
        raise ValueError(
            f"the loss is {means['loss']} at step {run.step}: lower the learning rate ({lr:.3g}), or check the data; "
            f"checkpoints before it are in {run.output / 'checkpoints'}"
        )
    return means


def _log_step(run: Run, means: dict[str, float], lr: float, bar: tqdm) -> None:
    bar.set_postfix(loss=f"{means['loss']:.3f}", lr=f"{lr:.2e}")
    run.accelerator.log({f"train/{name}": value for name, value in {**means, "lr": lr}.items()}, step=run.step)
    if run.main:
        run.records("steps").add({"step": run.step, **means, "lr": lr})
        if bar.disable:
            log.info(f"step {run.step:,}: loss {means['loss']:.4f}, lr {lr:.2e}, {run.clock.median():.3f} s a step")


def _finish(run: Run) -> None:
    if run.frozen is not None:
        now = frozen_hash(run.classifier)
        assert now == run.frozen, "frozen weights have changed"
        log.info(f"frozen weights unchanged: SHA-256 {now[:16]}")
    if run.task.finish is not None:
        run.task.finish(run)
    name = {"top1": "top-1"}.get(run.classifier.measures[0], run.classifier.measures[0])
    best = f", {run.output / 'best'} ({name} {run.best:.2%})" if run.best >= 0 else ""
    log.info(f"towers: {run.output / 'last'}{best}")
