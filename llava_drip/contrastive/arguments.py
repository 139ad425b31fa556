"""The command line of scripts/train_clip.py: open_clip's flags and some of ours, and what is wrong with them.

open_clip's trainer makes its run folder first and looks at its arguments later. What a user gets wrong is found here,
before anything is written, and named by its flag.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import sys
from argparse import Namespace
from itertools import islice
from pathlib import Path

import open_clip
import pandas as pd
import torch
from open_clip.factory import parse_model_name
from open_clip_train.distributed import world_info_from_env
from open_clip_train.params import get_default_params, parse_args

from llava_drip.cli import one_line
from llava_drip.contrastive.captions import open_captions
from llava_drip.contrastive.checkpoint import find_checkpoint
from llava_drip.contrastive.pairs import SHUFFLE_BUFFER, caption_of, kind_of, shards_of
from llava_drip.contrastive.zero_shot import open_labelled_images, read_class_names
from llava_drip.training import units
from llava_drip.training.recipe import with_recipe
from llava_drip.training.skips import BadSample, Skips

LOOK_AT = 100  # samples of a shard, for one that can be used
TRANSFORMERS = ("drip_", "senatra_")  # names of timm's models that train with a ViT's optimizer
SCHEDULERS = ("cosine", "const", "const-cooldown")


def parse(argv: list[str]) -> Namespace:
    """argv (a recipe, *.yaml, may stand first) → open_clip's arguments with ours among them.

    Raises:
        ValueError: no such recipe. An unknown flag ends the program with exit code 2.
    """
    ours = _flags_of_ours()
    known, rest = ours.parse_known_args(with_recipe(argv))
    if {"-h", "--help"} & set(rest):
        ours.print_help(sys.stdout)  # open_clip's help follows, and ends the program
    args = parse_args(rest)
    if timm_tower(args.model).startswith(TRANSFORMERS) and "timm" not in args.opt:
        # open_clip reads Adam's defaults off the name: CLIP's for a "ViT", a ResNet's for any other. DRIP is a ViT.
        adam = get_default_params("ViT")
        args = parse_args([*(f"--{name}={adam[name]}" for name in ("beta1", "beta2", "eps")), *rest])
    return Namespace(**vars(args), **vars(known))


def _flags_of_ours() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS, epilog="The flags below are open_clip's own."
    )
    add = parser.add_argument
    add(
        "--boundary-loss-weight",
        type=float,
        default=1.0,
        help="Weight of all that a DRIP tower asks for its boundaries: the rate loss, which keeps it at its compression, plus "
        "detail_weight (an argument of the tower) times the detail loss; of the entropy rule its head's cross-entropy "
        "(default: 1.0).",
    )
    add(
        "--caption-key",
        metavar="KEY",
        help="Shards: take captions from this field of each sample's .json, or this parquet column: a text, or a list of "
        "texts of which every epoch draws one anew (default: the .txt).",
    )
    add(
        "--data-streams",
        type=int,
        metavar="N",
        help="Shards: read them in N streams over all ranks (default: one for each worker of each rank). The same N, "
        "--workers and batch over all ranks give the same order of samples on any number of ranks.",
    )
    add(
        "--shuffle-buffer",
        type=int,
        metavar="N",
        help=f"Shards: samples among which each stream shuffles; 1 keeps the order of the files (default: {SHUFFLE_BUFFER}).",
    )
    add(
        "--save-every-n-steps",
        type=int,
        default=0,
        metavar="N",
        help="Besides the checkpoints of epochs keep checkpoints/step_latest.pt, replaced every N optimizer steps, from which "
        "--resume latest goes on within the epoch (default: 0, never).",
    )
    add(
        "--zeroshot-data",
        metavar="DATA",
        help="Classify these labelled pictures (a folder with one sub-folder a class, or shards with .cls files) without "
        "training on their classes, every --zeroshot-frequency epochs and after the last.",
    )
    add("--zeroshot-classes", metavar="FILE", help="Their class names: one a line, or JSON.")
    add(
        "--retrieval-data",
        metavar="DATA",
        help="Rank these pictures and captions (shards, Karpathy's or COCO's .json, .jsonl, .csv; see "
        "llava_drip.contrastive.captions) as often.",
    )
    add("--retrieval-images", metavar="DIR", help="Where the pictures of a listing lie (default: beside it).")
    add("--retrieval-split", metavar="SPLIT", help='Of a listing that names splits (default: "test").')
    return parser


def is_drip(model_name: str) -> bool:
    """Whether a known model's image tower is a DRIP, by name or from the directory that it names."""
    return timm_tower(model_name).startswith("drip_")


def timm_tower(model_name: str) -> str:
    """timm's name of a known model's image tower, by name or from the directory that it names; "" where timm has none."""
    schema, name = parse_model_name(model_name)
    if schema == "local-dir":
        config = _json(Path(name, "open_clip_config.json")).get("model_cfg", {})
    else:
        config = (open_clip.get_model_config(model_name) if schema is None else None) or {}
    tower = config.get("vision_cfg", {}).get("timm_model_name", "")
    if tower.startswith("local-dir:"):
        tower = _json(Path(tower.removeprefix("local-dir:"), "config.json")).get("architecture", "")
    return tower


def _json(path: Path) -> dict:
    """An object, or {} where there is none: open_clip says what is wrong with its files."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check(args: Namespace) -> None:
    """Raises ValueError for arguments with which the trainer would fail after it has begun to write."""
    weight = args.boundary_loss_weight
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"--boundary-loss-weight must be a finite number of at least 0, got {weight}")
    _check_model(args)
    trains = args.train_data or args.dataset_type == "synthetic"
    if trains:
        _check_training(args)
    elif not (args.val_data or args.imagenet_val or args.imagenet_v2):
        raise ValueError("no data: give --train-data (or, to evaluate, --val-data, --imagenet-val or --imagenet-v2)")
    for flag, data in (("--train-data", args.train_data), ("--val-data", args.val_data)):
        if data and args.dataset_type != "synthetic":
            _check_data(flag, data, args)
    for flag, folder in (("--imagenet-val", args.imagenet_val), ("--imagenet-v2", args.imagenet_v2)):
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"{flag}: no folder {folder}")
    _check_evaluation(args, bool(trains))


def _check_model(args: Namespace) -> None:
    schema, name = parse_model_name(args.model)
    if schema is None and open_clip.get_model_config(name.replace("/", "-")) is None:
        close = difflib.get_close_matches(name, open_clip.list_models(), n=4, cutoff=0.4)
        hint = f"did you mean {', '.join(close)}?" if close else "open_clip.list_models() names all"
        raise ValueError(f"--model: no model {name!r}; {hint}")
    if schema == "local-dir" and not Path(name).is_dir():
        raise ValueError(f"--model: no folder {name}")
    if timm_tower(args.model).startswith("senatra_") and (args.trace or args.torchscript):
        raise ValueError("--trace, --torchscript: a SeNaTra's features are a TokenBatch, which cannot be traced")
    if is_drip(args.model) and (args.trace or args.torchscript):
        raise ValueError("--trace, --torchscript: the number of tokens depends on the image, a trace would fix it")
    if args.pretrained and Path(args.pretrained).is_dir():  # a run's folder
        try:
            args.pretrained = str(find_checkpoint(args.pretrained))
        except ValueError as error:
            raise ValueError(f"--pretrained: {error}") from error
    if Path(args.pretrained).is_file():
        _check_checkpoint("--pretrained", args.pretrained)
    elif args.pretrained and args.pretrained not in open_clip.pretrained.list_pretrained_tags_by_model(name):
        raise ValueError(f"--pretrained: {args.pretrained!r} is neither a file nor a tag of {name}")
    if args.resume not in (None, "latest") and "://" not in args.resume:
        _check_checkpoint("--resume", args.resume)
    log = Path(args.logs, args.name or "", "out.log")
    # Rank 0 alone writes the log, perhaps before the others come here.
    if args.name and args.resume != "latest" and world_info_from_env()[1] == 0 and log.exists():
        raise ValueError(f"--name: {log.parent} holds an earlier run; choose another name, or give --resume latest")


def _check_checkpoint(flag: str, path: str) -> None:
    """It is there, and torch reads it (onto the meta device: names and shapes, no weights)."""
    if not Path(path).is_file():
        raise ValueError(f"{flag}: no checkpoint file {path}")
    if Path(path).suffix in (".pt", ".pth", ".bin"):
        try:
            torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:  # as many kinds as there are files that are something else
            raise ValueError(f"{flag}: {path} is not a checkpoint: {one_line(error, 200)}") from error


def _check_training(args: Namespace) -> None:
    for flag in ("batch_size", "accum_freq", "epochs", "log_every_n_steps"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(args, flag)}")
    for flag in ("data_streams", "shuffle_buffer"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(args, flag)}")
    if args.save_every_n_steps < 0:
        raise ValueError(f"--save-every-n-steps must be at least 0, got {args.save_every_n_steps}")
    if args.save_every_n_steps and args.dataset_type == "synthetic":
        raise ValueError("--save-every-n-steps: synthetic data have no place to go on from")
    if args.lr_scheduler not in SCHEDULERS:
        raise ValueError(f"--lr-scheduler must be one of {', '.join(SCHEDULERS)}, got {args.lr_scheduler}")
    if args.lr_scheduler == "const-cooldown" and args.epochs_cooldown is None:
        raise ValueError("--lr-scheduler const-cooldown needs --epochs-cooldown")


def _check_evaluation(args: Namespace, trains: bool) -> None:
    for flag in ("zeroshot_data", "retrieval_data"):
        if getattr(args, flag) is not None and not trains:
            program = flag.split("_")[0].replace("shot", "_shot")
            raise ValueError(
                f"--{flag.replace('_', '-')} is looked at while training; without --train-data use eval/{program}.py"
            )
    if (args.zeroshot_data is None) != (args.zeroshot_classes is None):
        raise ValueError("--zeroshot-data and --zeroshot-classes need each other")
    for flag in ("retrieval_images", "retrieval_split"):
        if getattr(args, flag) is not None and args.retrieval_data is None:
            raise ValueError(f"--{flag.replace('_', '-')} needs --retrieval-data")
    if args.zeroshot_data is not None:
        try:
            names = read_class_names(args.zeroshot_classes)
        except ValueError as error:
            raise ValueError(f"--zeroshot-classes: {error}") from error
        try:
            open_labelled_images(args.zeroshot_data, None, len(names))
        except ValueError as error:
            raise ValueError(f"--zeroshot-data: {error}") from error
    if args.retrieval_data is not None:
        try:
            open_captions(args.retrieval_data, args.retrieval_images, args.retrieval_split)
        except ValueError as error:
            raise ValueError(f"--retrieval-data: {error}") from error


def _check_data(flag: str, data: str, args: Namespace) -> None:
    """Raises ValueError, naming the flag, for data of which nothing can be used."""
    try:
        kind = kind_of(data, args.dataset_type)
        if kind == "csv":
            _check_csv(data, args)
        else:
            _check_pairs(data, args)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error
    for ours in ("caption_key", "data_streams", "shuffle_buffer"):
        if kind == "csv" and getattr(args, ours) is not None:
            hint = "; see --csv-caption-key" if ours == "caption_key" else ""
            raise ValueError(f"--{ours.replace('_', '-')} is for shards, {data} is a table{hint}")
    if kind == "webdataset" and flag == "--train-data":
        _check_shards(args)


def _check_csv(data: str, args: Namespace) -> None:
    if not os.path.isfile(data):
        raise ValueError(f"no file {data}")
    try:
        columns = list(pd.read_csv(data, sep=args.csv_separator, nrows=0).columns)
    except (ValueError, UnicodeDecodeError) as error:  # pandas' own kinds are ValueErrors
        raise ValueError(f"{data}: not a readable table ({one_line(error, 200)})") from error
    for flag, key in (("--csv-img-key", args.csv_img_key), ("--csv-caption-key", args.csv_caption_key)):
        if key not in columns:
            raise ValueError(f"{data} has the columns {columns}, not {key!r}; see {flag} and --csv-separator")


def _check_pairs(data: str, args: Namespace) -> None:
    """There is a picture with a caption near the beginning of some shard: a wrong --caption-key would leave out everything."""
    skips = Skips()
    for unit in units.expand(data):
        if not units.is_local(unit):
            return
        for sample in islice(units.read(unit, skips), LOOK_AT):
            try:
                units.image_bytes(sample)
                caption_of(sample, args.caption_key)
                return
            except BadSample as error:
                skips.add(error.cause, str(error))
    raise ValueError(
        f"{data} holds no picture with a caption ({skips}: {skips.examples[0] if skips.total else 'no sample at all'})"
        "; see --caption-key"
    )


def _check_shards(args: Namespace) -> None:
    if args.train_data_upsampling_factors is not None:
        if not args.dataset_resampled:
            raise ValueError("--train-data-upsampling-factors needs --dataset-resampled")
        parts, factors = args.train_data.split("::"), args.train_data_upsampling_factors.split("::")
        try:
            good = len(parts) == len(factors) and all(float(factor) > 0 for factor in factors)
        except ValueError:
            good = False
        if not good:
            raise ValueError(
                f"--train-data-upsampling-factors must be one positive number for each of the {len(parts)} parts of "
                f"--train-data, joined by '::', got {args.train_data_upsampling_factors!r}"
            )
    names, _ = shards_of(args)
    if args.train_num_samples is None and not units.count_samples(names):
        raise ValueError("--train-num-samples is needed: no sizes.json or __len__ lies beside the shards")
