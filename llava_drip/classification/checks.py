"""Flags that are out of their range, or contradict each other, named before anything is loaded."""

from __future__ import annotations

import math
import os
from argparse import Namespace

AT_LEAST_ONE = (
    *("epochs", "batch_size", "grad_accum_steps", "aug_repeats", "keep_checkpoints", "log_every_n_steps"),
    *("shuffle_buffer", "lr_base_size", "data_streams", "train_num_samples", "img_size", "compression"),
)
AT_LEAST_ZERO = (
    *("workers", "save_every_n_steps", "eval_every_n_epochs", "weight_decay", "clip_grad", "warmup_epochs", "min_lr"),
    *("warmup_lr", "mixup", "cutmix", "rate_loss_weight", "color_jitter", "momentum"),
    *("embedding_loss_weight", "output_loss_weight", "patch_loss_weight", "pool_after"),
    *(
        "classification_loss_weight",
        "distill_logits_loss_weight",
        "distill_tokens_loss_weight",
        "backbone_freeze_epochs",
    ),
)
ABOVE_ZERO = ("lr", "lr_base", "opt_eps", "temperature")
SHARES = ("smoothing", "hflip", "reprob", "drop_path", "model_ema_decay", "layer_decay", "backbone_lr_scale")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check(args: Namespace) -> None:
    """ValueError that names a flag out of its range, or two that contradict each other. Flags that a program lacks are not
    asked for."""
    for names, least in ((AT_LEAST_ONE, 1), (AT_LEAST_ZERO, 0)):
        for name in names:
            value = getattr(args, name, None)
            if value is not None and not (math.isfinite(value) and value >= least):
                raise ValueError(f"{_flag(name)} must be at least {least}, got {value}")
    for name in ABOVE_ZERO:
        value = getattr(args, name, None)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{_flag(name)} must be above 0, got {value}")
    for name in SHARES:
        value = getattr(args, name, None)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{_flag(name)} must be between 0 and 1, got {value}")
    for name, top in (("scale", 1), ("ratio", math.inf)):
        low, high = getattr(args, name)
        if not (0 < low <= high <= top and math.isfinite(high)):
            limit = " and at most 1" if top == 1 else ""
            raise ValueError(f"{_flag(name)} must be two rising numbers above 0{limit}, got {low} {high}")
    if getattr(args, "crop_pct", None) is not None and not 0 < args.crop_pct <= 1:
        raise ValueError(f"--crop-pct must be above 0 and at most 1, got {args.crop_pct}")
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        raise ValueError(f"--mixup, --cutmix: they mix pairs, --batch-size {args.batch_size} must be even")
    if getattr(args, "pretrained", False) and args.initial_checkpoint:
        raise ValueError("--pretrained, --initial-checkpoint: both name the weights to begin with; give one")
    if getattr(args, "freeze", None) == "backbone" and args.grad_checkpointing:
        raise ValueError("--grad-checkpointing: a frozen backbone keeps no activations; leave it out")
    _check_teacher(args)
    for name in ("backbone_lr_scale", "backbone_freeze_epochs"):
        if getattr(args, name, None) is None:
            continue
        if args.freeze == "backbone":
            raise ValueError(f"{_flag(name)}: --freeze backbone learns nothing of it at all; leave one of them out")
        if args.layer_decay is not None:
            raise ValueError(
                f"{_flag(name)}, --layer-decay: both give the backbone a rate of its own; leave one of them out"
            )


def _check_teacher(args: Namespace) -> None:
    """The same, of --teacher and its losses in train_imagenet.py."""
    if not hasattr(args, "init_from_teacher"):  # another program, whose teacher is its own
        return
    if args.teacher is None:
        weights = ("classification_loss_weight", "distill_logits_loss_weight", "distill_tokens_loss_weight")
        given = [name for name in weights if getattr(args, name) is not None]
        given += ["init_from_teacher"] if args.init_from_teacher else []
        if given:
            raise ValueError(f"{_flag(given[0])}: has no meaning without --teacher")
        return
    if args.distill_logits_loss_weight == args.distill_tokens_loss_weight == 0:
        raise ValueError(
            "--distill-logits-loss-weight, --distill-tokens-loss-weight: both are 0, so --teacher teaches nothing; leave it out"
        )
    if args.init_from_teacher and (args.pretrained or args.initial_checkpoint):
        other = "--pretrained" if args.pretrained else "--initial-checkpoint"
        raise ValueError(f"--init-from-teacher, {other}: both name the weights to begin with; give one")


def check_run(args: Namespace, processes: int | None = None) -> None:
    """The same, of the flags that only training has. processes: default what torchrun says."""
    if args.warmup_epochs >= args.epochs:
        raise ValueError(
            f"--warmup-epochs {args.warmup_epochs:g} must be fewer than --epochs {args.epochs}, which counts them"
        )
    if (getattr(args, "backbone_freeze_epochs", None) or 0) >= args.epochs:
        raise ValueError(
            f"--backbone-freeze-epochs {args.backbone_freeze_epochs:g} must be fewer than --epochs {args.epochs}"
        )
    if not args.fsdp:
        return
    if args.model_ema:
        raise ValueError("--model-ema: not with --fsdp, which divides the weights; train with DDP (leave out --fsdp)")
    if (processes or int(os.environ.get("WORLD_SIZE", 1))) < 2:
        raise ValueError("--fsdp: one process has nothing to divide; start with torchrun --nproc_per_node N")
    if args.precision == "fp16":
        raise ValueError("--precision fp16: not with --fsdp, whose parts would need one loss scale; bf16 needs none")
