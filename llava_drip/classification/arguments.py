"""The command line of scripts/train_imagenet.py: timm's names for what timm's train.py has, and what is wrong with it.

A recipe (YAML, see training/recipe.py) may come first; flags given after it win.
"""

from __future__ import annotations

import argparse
import math
import os
from argparse import Namespace

from llava_drip import cli
from llava_drip.classification.data import KINDS
from llava_drip.training.recipe import with_recipe

Switch = argparse.BooleanOptionalAction
PRECISIONS = ("fp32", "bf16", "fp16")


def make_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """All flags. Groups are the parts of the program that read them."""
    parser = cli.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"A recipe may come first: {prog} RECIPE.yaml [--flag value ...]",
    )
    add_data_flags(parser)
    add_model_flags(parser)
    add_augmentation_flags(parser)

    group = parser.add_argument_group("optimization")
    group.add_argument("--epochs", type=int, default=300)
    group.add_argument(
        "--batch-size",
        type=int,
        default=128,
        help="of one process; the step's is times processes times --grad-accum-steps",
    )
    group.add_argument("--grad-accum-steps", type=int, default=1)
    group.add_argument("--opt", default="adamw", help="any of timm.optim.list_optimizers()")
    group.add_argument("--opt-betas", type=float, nargs=2, metavar=("B1", "B2"))
    group.add_argument("--opt-eps", type=float)
    group.add_argument("--momentum", type=float, default=0.9, help="of optimizers that have one")
    group.add_argument("--weight-decay", type=float, default=0.3)
    group.add_argument(
        "--layer-decay", type=float, help="factor of the learning rate from one block to the one below it"
    )
    group.add_argument("--clip-grad", type=float, default=1.0, help="norm; 0: none")
    group.add_argument("--lr", type=float, help="learning rate as it is; else it follows from --lr-base")
    group.add_argument("--lr-base", type=float, default=3e-3, help="learning rate at a step's batch of --lr-base-size")
    group.add_argument("--lr-base-size", type=int, default=4096)
    group.add_argument("--lr-base-scale", choices=["linear", "sqrt"], default="linear", help="how it follows the batch")
    group.add_argument("--sched", choices=["cosine", "constant", "wsd"], default="cosine")
    group.add_argument("--warmup-epochs", type=float, default=30)
    group.add_argument("--warmup-lr", type=float, default=1e-6, help="where warm-up begins")
    group.add_argument("--min-lr", type=float, default=0.0)
    group.add_argument("--rate-loss-weight", type=float, default=1.0, help="of the boundary-rate loss of a DRIP tower")
    group.add_argument(
        "--model-ema", action=Switch, default=False, help="average the weights, and evaluate the average too"
    )
    group.add_argument("--model-ema-decay", type=float, default=0.9999)
    group.add_argument(
        "--model-ema-warmup", action=Switch, default=False, help="begin the average fast, for short runs"
    )

    group = parser.add_argument_group("run")
    group.add_argument(
        "--output", required=True, help="folder of this run: checkpoints, records, last/ and best/ towers"
    )
    group.add_argument(
        "--resume", action=Switch, default=False, help="go on from the newest checkpoint in --output, if there is one"
    )
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--precision", choices=PRECISIONS, default="bf16", help="mixed precision; fp32: none")
    group.add_argument("--device", help="cpu to leave GPUs alone (default: GPUs where there are any)")
    group.add_argument(
        "--fsdp", action=Switch, default=False, help="divide weights and optimizer among the processes (FSDP 2)"
    )
    group.add_argument(
        "--save-every-n-steps",
        type=int,
        default=0,
        help="checkpoints within an epoch; one comes at each epoch's end anyway",
    )
    group.add_argument("--keep-checkpoints", type=int, default=2)
    group.add_argument("--log-every-n-steps", type=int, default=50)
    group.add_argument(
        "--eval-every-n-epochs", type=int, default=1, help="the last epoch is evaluated anyway; 0: only that one"
    )
    group.add_argument("--report-to", nargs="+", choices=["tensorboard", "wandb"], default=[])
    group.add_argument("--wandb-project", default="llava_drip")
    return parser


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--train-data",
        required=True,
        help="folder with a sub-folder a class, folder of .parquet or .tar files, or shards 'train-{000..146}.tar'",
    )
    group.add_argument("--val-data", help="likewise; without it nothing is evaluated")
    group.add_argument("--dataset-type", choices=["auto", *KINDS], default="auto")
    group.add_argument(
        "--classes", help="file of class names in the order of the labels (.txt, .json); needed for webdataset"
    )
    group.add_argument("--label-key", help="column or ending of the label (default: cls in shards, label in parquet)")
    group.add_argument("--train-num-samples", type=int, help="of shards without sizes.json or __len__ beside them")
    group.add_argument("--workers", type=int, default=8, help="processes that load data, of each training process")
    group.add_argument(
        "--data-streams",
        type=int,
        help="of shards; a fixed number keeps their order with more processes (training/streams.py)",
    )
    group.add_argument(
        "--shuffle-buffer", type=int, default=5000, help="samples that each stream of shards shuffles among"
    )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        required=True,
        help="timm name, a tower's directory, or a run's folder of this program or train_clip.py",
    )
    group.add_argument("--pretrained", action=Switch, default=False, help="timm's pretrained weights of that name")
    group.add_argument(
        "--initial-checkpoint", help="file of weights (timm, open_clip or OpenAI CLIP naming) to begin with"
    )
    group.add_argument(
        "--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help="further arguments of the model"
    )
    group.add_argument("--compression", type=float, help="patches per token that a DRIP tower is trained for")
    group.add_argument("--img-size", type=int, help="pixels; positions of loaded weights are interpolated to it")
    group.add_argument("--drop-path", type=float, help="stochastic depth rate")
    group.add_argument(
        "--freeze",
        choices=["none", "backbone"],
        default="none",
        help="backbone: a linear probe, the classifier alone learns",
    )
    group.add_argument("--grad-checkpointing", action=Switch, default=False)


def add_augmentation_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("augmentation (timm's)")
    group.add_argument("--scale", type=float, nargs=2, default=[0.08, 1.0], help="area of the random crop")
    group.add_argument("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3])
    group.add_argument("--hflip", type=float, default=0.5)
    group.add_argument("--color-jitter", type=float, default=0.0)
    group.add_argument("--aa", help="RandAugment and the like, e.g. rand-m9-mstd0.5-inc1")
    group.add_argument("--reprob", type=float, default=0.0, help="random erasing")
    group.add_argument("--interpolation", default="bicubic", choices=["bicubic", "bilinear", "random"])
    group.add_argument("--crop-pct", type=float, help="of evaluation (default: the model's)")
    group.add_argument("--smoothing", type=float, default=0.0, help="of labels")
    group.add_argument("--mixup", type=float, default=0.0, help="alpha")
    group.add_argument("--cutmix", type=float, default=0.0, help="alpha")
    group.add_argument(
        "--aug-repeats", type=int, default=1, help="augmented copies of each picture in a batch (repeated augmentation)"
    )


def parse(argv: list[str] | None, prog: str, description: str) -> Namespace:
    """The flags. Exits with status 2 and one line on stderr where they are wrong."""
    parser = make_parser(prog, description)
    try:
        args = parser.parse_args(with_recipe(argv, negative=True))
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def check(args: Namespace) -> None:
    """ValueError for a flag out of its range, or two that contradict each other."""
    at_least = {
        "epochs": 1,
        "batch_size": 1,
        "grad_accum_steps": 1,
        "workers": 0,
        "save_every_n_steps": 0,
        "aug_repeats": 1,
    }
    at_least |= {
        "keep_checkpoints": 1,
        "log_every_n_steps": 1,
        "eval_every_n_epochs": 0,
        "shuffle_buffer": 1,
        "lr_base_size": 1,
    }
    at_least |= {"data_streams": 1, "train_num_samples": 1, "img_size": 1, "compression": 1}
    at_least |= dict.fromkeys(
        ("weight_decay", "clip_grad", "warmup_epochs", "min_lr", "warmup_lr", "mixup", "cutmix", "rate_loss_weight"), 0
    )
    for name, least in at_least.items():
        value = getattr(args, name, None)
        if value is not None and not (math.isfinite(value) and value >= least):
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    for name in ("lr", "lr_base"):
        value = getattr(args, name, None)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {value}")
    for name in ("smoothing", "hflip", "reprob", "drop_path", "model_ema_decay", "layer_decay"):
        value = getattr(args, name, None)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"--{name.replace('_', '-')} must be between 0 and 1, got {value}")
    if getattr(args, "warmup_epochs", 0) > getattr(args, "epochs", math.inf):
        raise ValueError(f"--warmup-epochs {args.warmup_epochs:g} is longer than --epochs {args.epochs}")
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        raise ValueError(f"--mixup, --cutmix: they mix pairs, --batch-size {args.batch_size} must be even")
    if getattr(args, "fsdp", False) and args.model_ema:
        raise ValueError("--model-ema: not with --fsdp, which divides the weights; train with DDP (leave out --fsdp)")
    if getattr(args, "fsdp", False) and int(os.environ.get("WORLD_SIZE", 1)) < 2:
        raise ValueError("--fsdp: one process has nothing to divide; start with torchrun --nproc_per_node N")
    if getattr(args, "fsdp", False) and args.precision == "fp16":
        raise ValueError("--precision fp16: not with --fsdp, whose parts would need one loss scale; bf16 needs none")
    if args.pretrained and args.initial_checkpoint:
        raise ValueError("--pretrained, --initial-checkpoint: both name the weights to begin with; give one")
    if args.freeze == "backbone" and args.grad_checkpointing:
        raise ValueError("--grad-checkpointing: a frozen backbone keeps no activations; leave it out")


def learning_rate(args: Namespace, step_batch: int) -> float:
    """--lr, or --lr-base scaled from --lr-base-size to the batch of a step over all processes (linear: Goyal et al., 2017)."""
    if args.lr is not None:
        return args.lr
    ratio = step_batch / args.lr_base_size
    return args.lr_base * (ratio if args.lr_base_scale == "linear" else math.sqrt(ratio))
