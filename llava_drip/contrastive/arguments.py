"""The command line of scripts/train_clip.py: open_clip's flags and one of ours, and what is wrong with them.

open_clip's trainer makes its run folder first and looks at its arguments later. What a user gets wrong is found here,
before anything is written, and named by its flag.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import sys
import tarfile
from argparse import Namespace
from pathlib import Path

import open_clip
import pandas as pd
import torch
from open_clip.factory import parse_model_name
from open_clip_train.data import expand_urls, get_dataset_size
from open_clip_train.distributed import world_info_from_env
from open_clip_train.params import get_default_params, parse_args

from llava_drip.cli import one_line

IMAGE_ENDINGS = {"jpg", "jpeg", "png", "webp"}  # what open_clip reads
SCHEDULERS = ("cosine", "const", "const-cooldown")


def parse(argv: list[str]) -> tuple[Namespace, float]:
    """argv → open_clip's arguments, --boundary-loss-weight. An unknown flag ends the program with exit code 2."""
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    ours.add_argument(
        "--boundary-loss-weight",
        type=float,
        default=1.0,
        help="Weight of the boundary-rate loss, which keeps a DRIP tower at its compression (default: 1.0). "
        "The flags below are open_clip's own.",
    )
    known, rest = ours.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        ours.print_help(sys.stdout)  # open_clip's help follows, and ends the program
    args = parse_args(rest)
    if is_drip(args.model) and "timm" not in args.opt:
        # open_clip reads Adam's defaults off the name: CLIP's for a "ViT", a ResNet's for any other. DRIP is a ViT.
        adam = get_default_params("ViT")
        args = parse_args([*(f"--{name}={adam[name]}" for name in ("beta1", "beta2", "eps")), *rest])
    return args, known.boundary_loss_weight


def is_drip(model_name: str) -> bool:
    """Whether a known model's image tower is a DRIP."""
    if parse_model_name(model_name)[0] is not None:
        return False
    config = open_clip.get_model_config(model_name) or {}
    return config.get("vision_cfg", {}).get("timm_model_name", "").startswith("drip_")


def check(args: Namespace, boundary_loss_weight: float) -> None:
    """Raises ValueError for arguments with which the trainer would fail after it has begun to write."""
    if not (math.isfinite(boundary_loss_weight) and boundary_loss_weight >= 0):
        raise ValueError(f"--boundary-loss-weight must be a finite number of at least 0, got {boundary_loss_weight}")
    _check_model(args)
    if not args.train_data and args.dataset_type != "synthetic":
        if not (args.val_data or args.imagenet_val or args.imagenet_v2):
            raise ValueError(
                "no data: give --train-data (or, to evaluate, --val-data, --imagenet-val or --imagenet-v2)"
            )
    else:
        _check_training(args)
    for flag, data in (("--train-data", args.train_data), ("--val-data", args.val_data)):
        if data:
            _check_data(flag, data, args)
    for flag, folder in (("--imagenet-val", args.imagenet_val), ("--imagenet-v2", args.imagenet_v2)):
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"{flag}: no folder {folder}")


def _check_model(args: Namespace) -> None:
    schema, name = parse_model_name(args.model)
    if schema is None and open_clip.get_model_config(name.replace("/", "-")) is None:
        close = difflib.get_close_matches(name, open_clip.list_models(), n=4, cutoff=0.4)
        hint = f"did you mean {', '.join(close)}?" if close else "open_clip.list_models() names all"
        raise ValueError(f"--model: no model {name!r}; {hint}")
    if schema == "local-dir" and not Path(name).is_dir():
        raise ValueError(f"--model: no folder {name}")
    if is_drip(args.model) and (args.trace or args.torchscript):
        raise ValueError("--trace, --torchscript: the number of tokens depends on the image, a trace would fix it")
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
    if args.lr_scheduler not in SCHEDULERS:
        raise ValueError(f"--lr-scheduler must be one of {', '.join(SCHEDULERS)}, got {args.lr_scheduler}")
    if args.lr_scheduler == "const-cooldown" and args.epochs_cooldown is None:
        raise ValueError("--lr-scheduler const-cooldown needs --epochs-cooldown")


def _check_data(flag: str, data: str, args: Namespace) -> None:
    kind = _kind(flag, data, args.dataset_type)
    if kind == "csv":
        _check_csv(flag, data, args)
    elif kind == "webdataset":
        shards = expand_urls(data)[0]
        for shard in shards:
            if "://" not in shard and not shard.startswith("pipe:") and not os.path.isfile(shard):
                raise ValueError(f"{flag}: no shard {shard}")
        _check_pairs(flag, shards[0])
        if flag == "--train-data":
            _check_shard_count(shards, args)


def _kind(flag: str, data: str, dataset_type: str) -> str:
    if dataset_type != "auto":
        return dataset_type
    kinds = {"csv": "csv", "tsv": "csv", "tar": "webdataset"}  # open_clip's rule
    ending = data.split(".")[-1]
    if ending not in kinds:
        raise ValueError(f"{flag}: cannot tell the kind of data from {data!r}; give --dataset-type webdataset or csv")
    return kinds[ending]


def _check_csv(flag: str, data: str, args: Namespace) -> None:
    if not os.path.isfile(data):
        raise ValueError(f"{flag}: no file {data}")
    columns = list(pd.read_csv(data, sep=args.csv_separator, nrows=0).columns)
    for key_flag, key in (("--csv-img-key", args.csv_img_key), ("--csv-caption-key", args.csv_caption_key)):
        if key not in columns:
            raise ValueError(
                f"{flag}: {data} has the columns {columns}, not {key!r}; see {key_flag} and --csv-separator"
            )


def _check_pairs(flag: str, shard: str) -> None:
    """The trainer skips what it cannot read, for ever if it is everything and --dataset-resampled; look at one shard."""
    if not os.path.isfile(shard):  # remote
        return
    endings: dict[str, set[str]] = {}
    try:
        with tarfile.open(shard) as tar:
            for member in tar:  # two members, as a rule
                key, _, ending = member.name.rpartition(".")
                found = endings.setdefault(key, set())
                found.add(ending.lower())
                if "txt" in found and found & IMAGE_ENDINGS:
                    return
    except tarfile.TarError as error:
        raise ValueError(f"{flag}: {shard} is not a readable tar file ({one_line(error)})") from error
    raise ValueError(
        f"{flag}: {shard} holds no picture ({', '.join(sorted(IMAGE_ENDINGS))}) with a .txt of the same name"
    )


def _check_shard_count(shards: list[str], args: Namespace) -> None:
    if args.train_num_samples is None and not get_dataset_size(args.train_data)[0]:
        raise ValueError("--train-num-samples is needed: no sizes.json or __len__ lies beside the shards")
    workers = args.workers * world_info_from_env()[2]
    if not args.dataset_resampled and len(shards) < workers:
        raise ValueError(
            f"--workers: {workers} workers over all ranks need a shard each, --train-data names {len(shards)}; "
            "give fewer --workers, more shards, or --dataset-resampled"
        )
