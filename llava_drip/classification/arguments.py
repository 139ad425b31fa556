"""The command line of scripts/train_imagenet.py: timm's names for what timm's train.py has, and what is wrong with it.

A recipe (YAML, see training/recipe.py) may come first; flags given after it win.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable

from llava_drip import cli
from llava_drip.classification.checks import check, check_run
from llava_drip.training import range_test as range_flags
from llava_drip.training.recipe import with_recipe


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and each flag's default, where it has one and its help does not tell it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default is None or action.default == [] or "(default" in (action.help or "")
        return action.help if told else super()._get_help_string(action)


Switch = argparse.BooleanOptionalAction
PRECISIONS = ("fp32", "bf16", "fp16")
KINDS = ("folder", "parquet", "webdataset")  # of data


def new_parser(prog: str, description: str) -> cli.ArgumentParser:
    """A parser without flags, of a program that takes a recipe."""
    return cli.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=Help,
        epilog=f"A recipe may come first: {prog} RECIPE.yaml [--flag value ...]",
    )


def make_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """All flags. Groups are the parts of the program that read them."""
    parser = new_parser(prog, description)
    add_data_flags(parser)
    add_evaluation_flags(parser)
    add_model_flags(parser)
    add_teacher_flags(parser)
    add_augmentation_flags(parser)
    add_step_flags(parser)
    add_schedule_flags(parser)
    add_run_flags(parser)
    return parser


def add_evaluation_flags(parser: argparse.ArgumentParser, labels: bool = True) -> None:
    """labels: whether those pictures must have them."""
    group = parser.add_argument_group("evaluation")
    kind = (
        "labelled pictures like --train-data" if labels else "pictures, whose labels are looked at where there are any"
    )
    group.add_argument("--val-data", help=f"{kind}; without it nothing is evaluated")
    group.add_argument(
        "--crop-pct", type=float, help="share of the picture's side that is looked at (default: the model's)"
    )


def add_schedule_flags(parser: argparse.ArgumentParser, ema: bool = True) -> None:
    """ema: also those of averaged weights, and of predictors that learn alone."""
    group = parser.add_argument_group("schedule")
    group.add_argument("--epochs", type=int, default=300, help="warm-up included")
    group.add_argument("--lr", type=float, help="learning rate as it is; else it follows from --lr-base")
    group.add_argument("--lr-base", type=float, default=3e-3, help="learning rate at a step's batch of --lr-base-size")
    group.add_argument("--lr-base-size", type=int, default=4096)
    group.add_argument("--lr-base-scale", choices=["linear", "sqrt"], default="linear", help="how it follows the batch")
    group.add_argument(
        "--sched", choices=["cosine", "constant", "wsd"], default="cosine", help="wsd: of timm newer than 1.0.26"
    )
    group.add_argument("--warmup-epochs", type=float, default=30, help="of --epochs; the rate rises linearly")
    group.add_argument("--warmup-lr", type=float, default=1e-6, help="where warm-up begins")
    group.add_argument("--min-lr", type=float, default=0.0)
    if not ema:
        return
    group.add_argument(
        "--backbone-freeze-epochs",
        type=float,
        help="of --epochs, at the start, in which the predictors of a tower learn alone (DynamicViT: 5 of 30; default: none)",
    )
    group.add_argument(
        "--model-ema", action=Switch, default=False, help="average the weights, and evaluate the average too"
    )
    group.add_argument("--model-ema-decay", type=float, default=0.9999)
    group.add_argument(
        "--model-ema-warmup", action=Switch, default=False, help="begin the average fast, for short runs"
    )


def add_run_flags(parser: argparse.ArgumentParser, fsdp: bool = True) -> None:
    """fsdp: also whether to divide the model."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output", required=True, help="folder of this run: checkpoints, records, last/ and best/ towers"
    )
    group.add_argument(
        "--resume", action=Switch, default=False, help="go on from the newest checkpoint in --output, if there is one"
    )
    if fsdp:
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
    group.add_argument(
        "--report-to",
        nargs="+",
        choices=["tensorboard", "wandb"],
        default=[],
        help="tensorboard: to OUTPUT/tensorboard",
    )
    group.add_argument("--wandb-project", default="llava_drip")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--train-data",
        required=True,
        help="folder with a sub-folder a class, folder of .parquet or .tar files, or shards 'train-{000..146}.tar'",
    )
    group.add_argument("--dataset-type", choices=["auto", *KINDS], default="auto")
    group.add_argument(
        "--classes",
        help="file of class names in the order of the labels (.txt, .json); needed for webdataset, and for parquet without names",
    )
    group.add_argument("--label-key", help="column or ending of the label (default: cls in shards, label in parquet)")
    group.add_argument(
        "--train-num-samples",
        type=int,
        help="pictures of an epoch; needed for shards without sizes.json or __len__ beside them",
    )
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
        help="timm name, a tower's directory, a run's folder of this program or train_clip.py, or a pretrained ViT of open_clip "
        "(ViT-B-32/laion2b_s34b_b79k) or Hugging Face (openai/clip-vit-base-patch16; directories too)",
    )
    group.add_argument("--pretrained", action=Switch, default=False, help="timm's pretrained weights of that name")
    group.add_argument(
        "--initial-checkpoint", help="file of weights (timm, open_clip or OpenAI CLIP naming) to begin with"
    )
    group.add_argument(
        "--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help="further arguments of the model"
    )
    group.add_argument(
        "--compression", type=float, help="patches per token that a tower is trained for, a DRIP, say, or a DynamicViT"
    )
    group.add_argument(
        "--img-size", type=int, help="pixels of a side; positions of loaded weights are interpolated to it"
    )
    group.add_argument("--drop-path", type=float, help="stochastic depth rate")
    group.add_argument(
        "--freeze",
        choices=["none", "backbone"],
        default="none",
        help="backbone: a linear probe, the classifier alone learns",
    )
    group.add_argument(
        "--backbone-lr-scale",
        type=float,
        metavar="SHARE",
        help="learning rate of all but a tower's predictors, as a share of the full rate, constant until the schedule falls "
        "below it (DynamicViT: 0.01; default: all learn alike)",
    )
    group.add_argument("--grad-checkpointing", action=Switch, default=False)


def add_teacher_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("teacher (default weights: those of DynamicViT, Rao et al., NeurIPS 2021)")
    group.add_argument(
        "--teacher",
        help="a classifier of the same classes that the student learns from too: a timm name (with its pretrained weights), a "
        "tower's directory, or a run's folder of this program",
    )
    group.add_argument(
        "--init-from-teacher",
        action=Switch,
        default=False,
        help="begin with the teacher's weights, all but the predictors'",
    )
    group.add_argument("--classification-loss-weight", type=float, help="of the labels' cross-entropy (default: 1.0)")
    group.add_argument(
        "--distill-logits-loss-weight", type=float, help="of KL(teacher || student) of the logits (default: 0.5)"
    )
    group.add_argument(
        "--distill-tokens-loss-weight",
        type=float,
        help="of the mean squared difference between the student's tokens and the teacher's of the same patches, both after the "
        "last norm (default: 0.5)",
    )


def add_augmentation_flags(parser: argparse.ArgumentParser, labels: bool = True) -> None:
    """labels: also smoothing."""
    group = parser.add_argument_group("augmentation (timm's)")
    group.add_argument("--scale", type=float, nargs=2, default=[0.08, 1.0], help="area of the random crop")
    group.add_argument("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3])
    group.add_argument("--hflip", type=float, default=0.5)
    group.add_argument("--color-jitter", type=float, default=0.0)
    group.add_argument("--aa", help="RandAugment and the like, e.g. rand-m9-mstd0.5-inc1")
    group.add_argument("--reprob", type=float, default=0.0, help="random erasing")
    group.add_argument("--interpolation", default="bicubic", choices=["bicubic", "bilinear", "random"])
    if labels:
        group.add_argument("--smoothing", type=float, default=0.0, help="of labels")
    group.add_argument("--mixup", type=float, default=0.0, help="alpha")
    group.add_argument("--cutmix", type=float, default=0.0, help="alpha")
    group.add_argument(
        "--aug-repeats", type=int, default=1, help="augmented copies of each picture in a batch (repeated augmentation)"
    )


def add_step_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimizer and step")
    group.add_argument(
        "--batch-size",
        type=int,
        default=128,
        help="of one process; the step's is times processes times --grad-accum-steps",
    )
    group.add_argument("--grad-accum-steps", type=int, default=1)
    group.add_argument("--opt", default="adamw", help="any of timm.optim.list_optimizers()")
    group.add_argument("--opt-betas", type=float, nargs=2, metavar=("B1", "B2"), help="of optimizers that have them")
    group.add_argument("--opt-eps", type=float, help="of optimizers that have one")
    group.add_argument("--momentum", type=float, default=0.9, help="of optimizers that have one")
    group.add_argument("--weight-decay", type=float, default=0.3)
    group.add_argument(
        "--layer-decay", type=float, help="factor of the learning rate from one block to the one below it"
    )
    group.add_argument("--clip-grad", type=float, default=1.0, help="norm; 0: none")
    group.add_argument(
        "--rate-loss-weight",
        type=float,
        help="of all that a DRIP tower asks for its boundaries: the rate loss plus detail_weight (an argument of the tower) "
        "times the detail loss; of the entropy rule its head's cross-entropy; of a DynamicViT's ratio loss (default: the "
        "tower's own: 5.0 of a DRIP whose boundaries are drawn, 2.0 of a DynamicViT, else 1.0)",
    )
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--precision", choices=PRECISIONS, default="bf16", help="mixed precision; fp32: none")
    group.add_argument("--device", help="cpu to leave GPUs alone (default: GPUs where there are any)")


def parse(argv: list[str] | None, prog: str, description: str) -> Namespace:
    """The flags. Exits with status 2 and one line on stderr where they are wrong."""
    return parsed(make_parser(prog, description), argv)


def parsed(parser: cli.ArgumentParser, argv: list[str] | None, *checks: Callable[[Namespace], None]) -> Namespace:
    """The flags of a run, those of its recipe too, checked; `checks` raise ValueError for what else must hold."""
    try:
        args = parser.parse_args(with_recipe(argv, negative=True))
        for check_part in (check, check_run, *checks):
            check_part(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def parse_lr_finder(argv: list[str] | None, prog: str, description: str) -> Namespace:
    """The flags of scripts/lr_finder.py: those of training but the schedule's and the run's, which a recipe may hold."""
    parser = new_parser(prog, description)
    range_flags.add_flags(parser)
    for add in (add_data_flags, add_model_flags, add_teacher_flags, add_augmentation_flags, add_step_flags):
        add(parser)
    training = make_parser(prog, description)
    left_out = {flag.lstrip("-") for flag in training._option_string_actions} - {
        flag.lstrip("-") for flag in parser._option_string_actions
    }
    try:
        args = parser.parse_args(with_recipe(argv, negative=True, skip=left_out))
        args.report_to = []
        check(args)
        range_flags.check_flags(args)
    except ValueError as error:
        parser.error(str(error))
    return args
