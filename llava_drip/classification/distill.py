"""distill(args): one run of scripts/distill_tower.py, on the loop of train.py; what it reads and what it says at the end."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from pathlib import Path

from llava_drip.classification.distillation import DistillationLoss, Distiller
from llava_drip.classification.evaluate import evaluate
from llava_drip.classification.run import Run, Task
from llava_drip.classification.sources import Source, open_pictures, open_source
from llava_drip.classification.train import train
from llava_drip.cli import key_values, merged, one_line
from llava_drip.files import write_whole
from llava_drip.towers.contract import budget_kept
from llava_drip.towers.convert import convert
from llava_drip.training.seeds import seed_step

log = logging.getLogger("llava_drip.train")
BUDGETS = "budgets.json"


def distill(args: Namespace, command: list[str]) -> Path:
    """Runs, or goes on with, the distillation that the flags describe (distill_arguments.parse).

    Args:
        command: how the program was started, for the record.
    Returns:
        The output folder, as train.train leaves it; epoch 0 of epochs.jsonl is the student before training. best/ is by top-1
        where --val-data has the labels of the teacher's classes, else by similarity. budgets.json has the last student at each of
        --budgets.
    Raises:
        ValueError: flags, teacher, data or checkpoints that are wrong; a loss that is no longer a number.
    """
    return train(args, command, DISTILLATION)


def make_distiller(args: Namespace, source: Source | None = None) -> Distiller:
    """Student and teacher of the flags, from the seed, on the CPU."""
    seed_step(args.seed, "model")
    flags = {
        "compression": args.compression,
        "pool_after": args.pool_after,
        "elastic": args.elastic and tuple(args.elastic),
        "img_size": args.img_size,
        "drop_path_rate": args.drop_path,
    }
    arguments = merged(key_values(args.model_kwargs, "--model-kwargs"), flags)
    try:
        tower = convert(args.teacher, **arguments)
    except ValueError as error:
        raise ValueError(f"--teacher: {error}") from error
    if tower.is_dense:
        what = "compression" if tower.compression == 1 else "budget"  # each may come by a flag or by --model-kwargs
        raise ValueError(f"{what} 1: a student at compression 1 is the teacher; give more")
    if args.crop_pct is not None:  # saved with the tower: who loads it evaluates as this run does
        tower.pretrained_cfg = {**tower.pretrained_cfg, "crop_pct": args.crop_pct}
    if args.grad_checkpointing:
        tower.set_grad_checkpointing()
    if args.rate_loss_weight is None:
        args.rate_loss_weight = tower.rate_loss_weight
    layer = args.patch_layer
    if layer is None and tower.has_class_token and len(tower.blocks) - 1 > tower.pool_depths[-1]:
        layer = -2
    try:
        return Distiller(tower, args.train, layer or None, name=tower.pretrained_cfg["architecture"])
    except ValueError as error:
        raise ValueError(f"--patch-layer: {error}") from error


def _open_val(args: Namespace, source: Source, distiller: Distiller) -> Source:
    """--val-data: with labels where they are those of the teacher's classes, else the pictures alone; says why.

    Raises:
        ValueError: --classes or --label-key, of labels that are not to be had or of no use.
    """
    meant = "--classes" if args.classes else "--label-key" if args.label_key else None
    if not distiller.classifies:
        if meant:
            raise ValueError(f"{meant}: has no use, the teacher classifies nothing; leave it out")
        return open_pictures("--val-data", args.val_data, args.dataset_type)
    try:
        labelled = open_source("--val-data", args.val_data, args.dataset_type, args.classes, args.label_key)
    except ValueError as error:
        if meant:
            raise
        why = one_line(error, 200)
    else:
        if labelled.num_classes == distiller.num_classes:
            distiller.labelled = True
            return labelled
        if args.classes:
            raise ValueError(
                f"--classes: has {labelled.num_classes} names, the teacher {distiller.num_classes} classes"
            )
        why = f"--val-data has {labelled.num_classes} classes, the teacher {distiller.num_classes}"
        if labelled.num_classes is None:
            why = "--val-data does not tell the names of its classes; --classes does"
        if meant:
            raise ValueError(f"{meant}: has no use, {why}")
    log.info(f"no top-1: {why}")
    return open_pictures("--val-data", args.val_data, args.dataset_type)


def _finish(run: Run) -> None:
    """Says what was reached, and evaluates at --budgets (a collective)."""
    if run.evaluation is None:
        return
    rows = [row for row in run.records("epochs").read() if "similarity" in row]
    if run.main and rows:
        if rows[0]["epoch"] == 0:  # --val-data may have been given from some resume on
            log.info(f"student before: {_summary(rows[0])}")
        log.info(f"student after: {_summary(rows[-1])}")
        if "teacher_top1" in rows[-1]:
            log.info(f"teacher: top-1 {rows[-1]['teacher_top1']:.2%}, {run.classifier.patches} tokens")
    if not run.args.budgets:
        return
    results = []
    with budget_kept(run.classifier.model):
        for budget in run.args.budgets:
            run.classifier.model.set_compression(budget)
            row = evaluate(run.accelerator, run.classifier, run.evaluation, f"evaluation at {budget:g}x")
            results.append({"budget": budget, **row})
            log.info(f"student at {budget:g}x: {_summary(row)}")
    if run.main:
        write_whole(run.output / BUDGETS, json.dumps(results, indent=2))


def _summary(row: dict) -> str:
    top1 = f"top-1 {row['top1']:.2%}, " if "top1" in row else ""
    return f"{top1}similarity to the teacher {row['similarity']:.4f}, {row['tokens']:.1f} tokens"


DISTILLATION = Task(
    program="distill_tower.py",
    open_train=lambda args: open_pictures("--train-data", args.train_data, args.dataset_type),
    make=make_distiller,
    open_val=_open_val,
    objective=DistillationLoss,
    evaluates_start=True,
    finish=_finish,
)
