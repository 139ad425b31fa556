"""What the evaluation programs of CLIP models share: their flags, the model these name, and the file they write."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import nn

from llava_drip import cli
from llava_drip.contrastive.checkpoint import find_checkpoint, load_clip, load_tokenizer
from llava_drip.files import write_whole
from llava_drip.fingerprint import fingerprint
from llava_drip.record import described
from llava_drip.towers.contract import check_budget


class Clip(NamedTuple):
    """A model ready to be evaluated: `transform` is PIL → [3, h, w], `tokenizer` list of texts → [n, context]."""

    model: nn.Module
    transform: Callable
    tokenizer: Callable
    device: str


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every evaluation of a CLIP model has."""
    parser.add_argument(
        "--checkpoint", required=True, help="an epoch_N.pt of scripts/train_clip.py, or the run's folder"
    )
    parser.add_argument(
        "--model", help="open_clip model name, e.g. DRIP-B-16-4x (default: the run's open_clip_config.json)"
    )
    parser.add_argument("--json", help="file to write the result to")
    parser.add_argument(
        "--compression", type=float, help="patches per token to meet exactly (default: the image decides)"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "amp", "amp_bf16"])
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program for a number out of range."""
    for flag, least in (("batch_size", 1), ("workers", 0)):
        if getattr(args, flag) < least:
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least {least}")


def open_clip_model(args: argparse.Namespace) -> Clip:
    """The model that the flags name, in eval mode, at the compression they ask for.

    Raises:
        ValueError: a flag that cannot be followed. That of --json is found here too, before anything is measured.
    """
    if args.json and not os.path.isdir(os.path.dirname(args.json) or "."):
        raise ValueError(f"--json: no folder {os.path.dirname(args.json)}")
    device = str(cli.checked_device(args.device))
    model, transform = load_clip(args.checkpoint, args.model, device)
    if args.compression is not None:
        trunk = getattr(model.visual, "trunk", None)
        check_budget(trunk, f"--compression: the tower of {args.model or args.checkpoint}")
        trunk.set_compression(args.compression)
    return Clip(model, transform, load_tokenizer(args.checkpoint, model, args.model), device)


def report(
    args: argparse.Namespace,
    result: dict,
    device: str,
    seconds: float,
    data: Mapping[str, str | Iterable[str]],
    prompts: Iterable[str],
) -> None:
    """Prints what the visual tokens were and what was skipped, and writes --json: the flags, the result, and the record of it
    (record.py).

    seconds: of the evaluation, loading left out. data: name → the files that were read. prompts: the texts that stand
    for classes or pictures.
    """
    if result["tokens_per_image"] is not None:
        print(
            f"{result['tokens_per_image']:.2f} visual tokens per image of {result['patches_per_image']} patches: "
            f"compression {result['compression']:.2f} ({result['compression_p5']:.2f} .. {result['compression_p95']:.2f})"
        )
    skipped = result["skipped"]
    if skipped["counts"]:
        counts = ", ".join(f"{number:,} {cause}" for cause, number in skipped["counts"].items())
        print(f"skipped: {counts}, such as {skipped['examples'][0]}")
    if args.json:
        checkpoint = str(find_checkpoint(args.checkpoint))
        named = {"model": args.model, "checkpoint": checkpoint, "data": args.data}
        others = {name: value for name, value in vars(args).items() if name not in named and name != "json"}
        run = described(
            checkpoint={"path": checkpoint, "sha256": fingerprint(checkpoint)},
            data=data,
            prompts=prompts,
            compression=args.compression,
            tokens_per_image=result["tokens_per_image"],
            seconds=seconds,
            device=device,
            packages=("open_clip_torch",),
        )
        content = {**named, "flags": others, **result, "run": run}
        write_whole(args.json, json.dumps(content, indent=2))
