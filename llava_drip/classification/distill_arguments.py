"""The command line of scripts/distill_tower.py: the flags of train_imagenet.py that make sense without labels, and its own."""

from __future__ import annotations

import argparse
import math
from argparse import Namespace

from llava_drip.classification import arguments as shared

TRAINED = ("late", "all", "boundaries")


def make_parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = shared.new_parser(prog, description)
    _add_tower_flags(parser)
    _add_loss_flags(parser)
    shared.add_data_flags(parser)
    shared.add_evaluation_flags(parser, labels=False)
    shared.add_augmentation_flags(parser, labels=False)
    shared.add_step_flags(parser)
    shared.add_schedule_flags(parser, ema=False)
    shared.add_run_flags(parser, fsdp=False)
    parser.set_defaults(fsdp=False, model_ema=False)  # flags that this program lacks
    parser.set_defaults(epochs=10, warmup_epochs=0.5, weight_decay=0.05)
    return parser


def _add_tower_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("teacher and student")
    group.add_argument(
        "--teacher",
        required=True,
        help="a run's folder, a directory (timm, open_clip, Hugging Face), a timm name, open_clip:MODEL/TAG or hf-hub:ID",
    )
    group.add_argument(
        "--compression", type=float, help="patches per token that the student is trained for (default: 4)"
    )
    group.add_argument("--pool-after", type=int, help="dense blocks before pooling (default: the entry point's)")
    group.add_argument(
        "--elastic",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="train each picture for a compression drawn between these: one tower for every budget between",
    )
    group.add_argument(
        "--model-kwargs",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="further arguments of the student, e.g. boundary=similarity scan=hilbert",
    )
    group.add_argument(
        "--train",
        choices=TRAINED,
        default="late",
        help="late: blocks after pooling and predictor; all: those before too; boundaries: the predictor alone. Never the head",
    )
    group.add_argument("--img-size", type=int, help="pixels of a side, of both; positions are interpolated to it")
    group.add_argument("--drop-path", type=float, help="stochastic depth rate of the student")
    group.add_argument("--grad-checkpointing", action=shared.Switch, default=False)


def _add_loss_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("losses (each between student and teacher), and what is told of them")
    group.add_argument("--embedding-loss-weight", type=float, default=5.0, help="1 - cosine of the pooled features")
    group.add_argument(
        "--output-loss-weight",
        type=float,
        default=1.0,
        help="of the head's outputs: KL divergence of classifiers, 1 - cosine of a CLIP's image embeddings",
    )
    group.add_argument(
        "--patch-loss-weight",
        type=float,
        default=1.0,
        help="1 - cosine of each token and the mean of the teacher's patches over its segment",
    )
    group.add_argument(
        "--patch-layer",
        type=int,
        help="the block whose patches are compared, -1, -2, ...; 0: behind the last norm (default: 0; of towers with a class "
        "token -2, which LLaVA reads)",
    )
    group.add_argument("--temperature", type=float, default=1.0, help="of the KL divergence")
    group.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        default=[],
        help="patches per token at which the student is evaluated in the end, each met exactly; to OUTPUT/budgets.json",
    )


def parse(argv: list[str] | None, prog: str, description: str) -> Namespace:
    """The flags. Exits with status 2 and one line on stderr where they are wrong."""
    return shared.parsed(make_parser(prog, description), argv, _check)


def _check(args: Namespace) -> None:
    if args.patch_layer is not None and args.patch_layer > 0:
        raise ValueError(f"--patch-layer counts from the end, at most 0, got {args.patch_layer}")
    for flag in ("classes", "label_key"):
        if getattr(args, flag) and not args.val_data:
            raise ValueError(f"--{flag.replace('_', '-')}: only labels of --val-data are looked at; give that too")
    if args.budgets and not args.val_data:
        raise ValueError("--budgets: there is nothing to evaluate; give --val-data")
    for budget in args.budgets:
        if not 1 <= budget < math.inf:
            raise ValueError(f"--budgets must be at least 1, and finite, got {budget}")
