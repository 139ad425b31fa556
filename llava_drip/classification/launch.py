"""Processes, devices and precision by accelerate; optimizer and schedule by timm."""

from __future__ import annotations

import importlib.util
import math
from argparse import Namespace
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from llava_drip.cli import one_line
from llava_drip.towers.dense import PREDICTORS


def make_accelerator(args: Namespace, output: Path) -> Accelerator:
    """One process, or one of those that torchrun started. ValueError for a tracker, device or precision that is not there."""
    for name in args.report_to:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--report-to {name}: not installed; pip install {name}")
    cpu = args.device == "cpu" or not torch.cuda.is_available()
    if args.device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device {args.device}: cpu or cuda; choose among GPUs with CUDA_VISIBLE_DEVICES")
    if args.device == "cuda" and cpu:
        raise ValueError("--device cuda: no GPU is available here")
    if args.precision == "fp16" and cpu:
        raise ValueError("--precision fp16: of GPUs; on a CPU give bf16 or fp32")
    return Accelerator(
        cpu=cpu,
        mixed_precision="no" if args.precision == "fp32" else args.precision,
        gradient_accumulation_steps=args.grad_accum_steps,
        log_with=args.report_to or None,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "tensorboard")),
        step_scheduler_with_optimizer=False,
    )


def make_optimizer(args: Namespace, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """timm's: no weight decay for biases, norms and what the model exempts. ValueError for an optimizer or flag it refuses."""
    if args.opt not in list_optimizers():
        raise ValueError(f"--opt: no optimizer {args.opt!r}; timm.optim.list_optimizers() names all")
    options = {}
    if _divides_backbone(args):
        groups = _with_backbone(model, args.weight_decay)
        options["param_group_fn"] = lambda model: groups
    if args.opt_betas is not None:
        options["betas"] = tuple(args.opt_betas)
    if args.opt_eps is not None:
        options["eps"] = args.opt_eps
    try:
        return create_optimizer_v2(
            model,
            args.opt,
            lr=lr,
            weight_decay=args.weight_decay,
            momentum=args.momentum,
            layer_decay=args.layer_decay,
            **options,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"--opt {args.opt}: {one_line(error, 200)}") from error


def _divides_backbone(args: Namespace) -> bool:
    return any(getattr(args, name, None) is not None for name in ("backbone_lr_scale", "backbone_freeze_epochs"))


def _with_backbone(model: nn.Module, weight_decay: float) -> list[dict]:
    """timm's groups by weight decay, each divided into predictors and all else, which is marked "backbone". ValueError: a model
    without predictors."""
    predictors = {id(parameter) for name, parameter in model.named_parameters() if name.startswith(PREDICTORS)}
    if not predictors:
        raise ValueError(
            f"--backbone-lr-scale, --backbone-freeze-epochs: a {type(model).__name__} has no predictors beside its backbone"
        )
    groups = []
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    for group in param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt):
        for backbone in (False, True):
            own = [parameter for parameter in group["params"] if (id(parameter) not in predictors) == backbone]
            groups += [{**group, "params": own, "backbone": backbone}] if own else []
    return groups


def hold_backbone(args: Namespace, optimizer: torch.optim.Optimizer, lr: float, epoch: float) -> None:
    """After the schedule's rate has been set: none for the backbone in the first --backbone-freeze-epochs, then at most
    --backbone-lr-scale of the full rate `lr`.

    epoch: how many have passed.
    """
    if not _divides_backbone(args):
        return
    share = 1.0 if args.backbone_lr_scale is None else args.backbone_lr_scale
    most = 0.0 if epoch < (args.backbone_freeze_epochs or 0) else share * lr
    for group in optimizer.param_groups:
        if group["backbone"]:
            group["lr"] = min(group["lr"], most)


def learning_rate(args: Namespace, step_batch: int) -> float:
    """--lr, or --lr-base scaled from --lr-base-size to the batch of a step over all processes (linear: Goyal et al., 2017)."""
    if args.lr is not None:
        return args.lr
    ratio = step_batch / args.lr_base_size
    return args.lr_base * (ratio if args.lr_base_scale == "linear" else math.sqrt(ratio))


def make_scheduler(args: Namespace, optimizer: torch.optim.Optimizer, lr: float, steps_an_epoch: int) -> Scheduler:
    """timm's; `step_update(n)` before step n (from 0) sets its rate.

    Of --epochs the first --warmup-epochs rise to the full rate, and the others fall from it (timm's own default lets the cosine
    begin at step 0 behind the warm-up: its full rate is never reached). ValueError: a last rate above the full one.
    """
    if args.min_lr > lr:
        raise ValueError(f"--min-lr {args.min_lr:g} is above the learning rate {lr:.3g}")
    prefix = args.sched == "cosine"  # "wsd" counts its warm-up by itself, "constant" needs no length
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="step" if args.sched == "constant" else args.sched,  # steps of factor 1: timm 1.0.26 has no "constant"
        decay_rate=1.0,
        num_epochs=args.epochs - args.warmup_epochs if prefix else args.epochs,
        warmup_epochs=args.warmup_epochs,
        warmup_prefix=prefix,
        warmup_lr=min(args.warmup_lr, lr),
        min_lr=args.min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps_an_epoch,
    )
    if scheduler is None:  # what an older timm says to a name it does not know
        raise ValueError(f"--sched {args.sched}: timm {timm.__version__} has no such schedule; update timm")
    return scheduler
