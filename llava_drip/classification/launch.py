"""Processes, devices and precision by accelerate; the optimizer by timm."""

from __future__ import annotations

import importlib.util
import os
from argparse import Namespace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from llava_drip.cli import one_line


def make_accelerator(args: Namespace, output: Path) -> Accelerator:
    """One process, or one of those that torchrun started. ValueError for trackers that are not installed."""
    for name, module in (("tensorboard", "tensorboard"), ("wandb", "wandb")):
        if name in args.report_to and importlib.util.find_spec(module) is None:
            raise ValueError(f"--report-to {name}: not installed; pip install {module}")
    cpu = args.device == "cpu" or not torch.cuda.is_available()
    if args.device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device {args.device}: cpu or cuda; choose among GPUs with CUDA_VISIBLE_DEVICES")
    if args.device == "cuda" and cpu:
        raise ValueError("--device cuda: no GPU is available here")
    if cpu:
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    return Accelerator(
        cpu=cpu,
        mixed_precision="no" if args.precision == "fp32" else args.precision,
        gradient_accumulation_steps=args.grad_accum_steps,
        log_with=args.report_to or None,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output)),
        step_scheduler_with_optimizer=False,
    )


def make_optimizer(args: Namespace, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """timm's: no weight decay for biases, norms and what the model exempts. ValueError for an optimizer or flag it refuses."""
    if args.opt not in list_optimizers():
        raise ValueError(f"--opt: no optimizer {args.opt!r}; timm.optim.list_optimizers() names all")
    options = {}
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
