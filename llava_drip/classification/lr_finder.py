"""The learning-rate range test of classification: the run's own model, data, optimizer and step, at a rate that rises."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from llava_drip.classification import data
from llava_drip.classification.launch import make_accelerator, make_optimizer
from llava_drip.classification.model import data_config_of
from llava_drip.classification.run import make_classifier, make_objective, open_data
from llava_drip.classification.step import train_step
from llava_drip.training.loader import TrainLoader
from llava_drip.training.range_test import RangeTest, analyse, divergence, rates, smooth
from llava_drip.training.seeds import seed_step


def range_test(args: Namespace, output: Path) -> tuple[RangeTest, str]:
    """Trains args.steps steps from args.start_lr to args.end_lr, or until the loss has diverged.

    Args:
        args: the flags of scripts/lr_finder.py.
        output: folder that accelerate may use; nothing is written to it here.
    Returns:
        The result, and a title: model, data, batch.
    Raises:
        ValueError: flags or data that are wrong, or too few steps before the first loss that is no number.
    """
    accelerator = make_accelerator(args, output)
    if accelerator.num_processes > 1:
        raise ValueError(
            f"a range test is for one process, not {accelerator.num_processes}; --grad-accum-steps makes a step as large"
        )
    source = open_data(args)
    classifier = make_classifier(args, len(source.names))
    transform = data.training_transform(args, data_config_of(classifier.model))
    pin = accelerator.device.type == "cuda"
    loader = data.training_loader(args, source, transform, len(source.names), 0, 1, pin)
    optimizer = make_optimizer(args, classifier.model, args.start_lr)
    model, optimizer = accelerator.prepare(classifier, optimizer)
    objective = make_objective(args, classifier)
    model.train()
    points: list[tuple[float, float]] = []
    batches = _endless(loader)
    bar = tqdm(rates(args.start_lr, args.end_lr, args.steps), desc="range test", unit="step", disable=None)
    for step, lr in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
            if group.get("backbone"):
                group["lr"] *= args.backbone_lr_scale
        micro = [next(batches) for _ in range(args.grad_accum_steps)]
        seed_step(args.seed, "step", step)
        losses = train_step(accelerator, model, optimizer, objective, micro, args.clip_grad or None)
        points.append((lr, losses["loss"].item()))
        bar.set_postfix(lr=f"{lr:.1e}", loss=f"{points[-1][1]:.3f}")
        smoothed = smooth([loss for _, loss in points], args.beta)
        if not math.isfinite(points[-1][1]) or divergence([loss for _, loss in points], smoothed) is not None:
            break
    bar.close()
    title = f"{args.model}, {Path(args.train_data).name}, batch {args.batch_size * args.grad_accum_steps}"
    return analyse(points, args.beta), title


def _endless(loader: TrainLoader) -> Iterator:
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        yield from loader
        epoch += 1
