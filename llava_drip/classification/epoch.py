"""The end of an epoch: evaluation, its record and line, towers on disk."""

from __future__ import annotations

import logging

from timm.utils import distribute_bn

from llava_drip.classification import sharding
from llava_drip.classification.evaluate import evaluate
from llava_drip.classification.run import Run
from llava_drip.towers.io import save_tower
from llava_drip.training.meters import describe
from llava_drip.training.skips import Skips

log = logging.getLogger("llava_drip.train")


def finish_epoch(run: Run, epochs: int) -> None:
    """After `epochs` epochs (a collective). Compression and tokens are those of --val-data where it is evaluated (by the averaged
    weights, if there are any), else those that training drew."""
    args, accelerator = run.args, run.accelerator
    row = {
        "epoch": epochs,
        "step": run.step,
        **run.sums.means(accelerator),
        "lr": max(group["lr"] for group in run.optimizer.param_groups),
        "images_per_second": run.step_batch / run.clock.median(),
    }
    if run.sums.tokens is not None:
        row |= run.sums.tokens.summary() or {}
    skips = run.loader.all_skips()
    every = args.eval_every_n_epochs
    if run.evaluation is not None and (epochs == args.epochs or (every and epochs % every == 0)):
        row |= evaluate_run(run)
    row |= run.clock.cost(accelerator.device)
    row["skipped"] = skips.state()
    accelerator.log({name: value for name, value in row.items() if isinstance(value, (int, float))}, step=run.step)
    _save_towers(run, row)
    if run.main:
        run.records("epochs").add(row)
        log.info(line(row, args.epochs, skips))
    run.save()


def start_run(run: Run) -> None:
    """Before the first step: epoch 0's record, of evaluation alone (a collective)."""
    if run.evaluation is None:
        return
    row = {"epoch": 0, "step": 0, **evaluate_run(run)}
    if run.main:
        run.records("epochs").add(row)


def evaluate_run(run: Run) -> dict:
    """What --val-data says of the weights, and of their average."""
    accelerator, average = run.accelerator, run.ema.module if run.ema is not None else None
    if accelerator.num_processes > 1 and run.frozen is None:
        for model in filter(None, (run.classifier, average)):  # each rank has seen other pictures
            distribute_bn(model, accelerator.num_processes, reduce=True)
    row = evaluate(accelerator, run.classifier, run.evaluation, "evaluation", run.divided is not None)
    row["val_images"], row["val_skipped"] = row.pop("images"), row.pop("skipped")
    if average is not None:
        result = evaluate(accelerator, average, run.evaluation, "evaluation of the average")
        row |= {f"ema_{name}": result.pop(name) for name in run.classifier.measures}
        # Tokens and compression are those of the weights that are kept.
        row |= {
            name: result[name]
            for name in ("tokens", "compression", "compression_p5", "compression_p95")
            if name in result
        }
    return row


def line(row: dict, epochs: int, skips: Skips) -> str:
    """An epoch in one line."""
    parts = [f"epoch {row['epoch']}/{epochs}: loss {row['loss']:.4f}"]
    if "top1" in row:
        parts.append(f"top-1 {row['top1']:.2%}, top-5 {row['top5']:.2%}")
    if "similarity" in row:
        parts.append(f"similarity to the teacher {row['similarity']:.4f}")
    if "ema_top1" in row:
        parts.append(f"average's top-1 {row['ema_top1']:.2%}, top-5 {row['ema_top5']:.2%}")
    parts += [describe(row), str(skips)]
    parts += [f"e.g. {skips.examples[0]}"] if skips.examples else []
    val = Skips(**row.get("val_skipped", {}))
    if val.total:
        parts.append(f"of --val-data {val}, e.g. {val.examples[0]}")
    return ", ".join(parts)


def _save_towers(run: Run, row: dict) -> None:
    """last/, and best/ where top-1 rose (or what else is measured first): of the averaged weights where there are any."""
    model = (run.ema.module if run.ema is not None else run.classifier).model
    state = sharding.whole_state(run.classifier) if run.divided is not None else None
    name = run.classifier.measures[0]
    score = row.get(f"ema_{name}", row.get(name))
    better = score is not None and score > run.best
    run.best = score if better else run.best
    if not run.main:
        return
    if state is not None:
        model = run.whole
        model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    for name in ("last", *(["best"] if better else [])):
        save_tower(model, run.output / name, run.data_config["mean"], run.data_config["std"])
