"""python eval/zero_shot.py --model DRIP-B-16-4x --checkpoint logs/RUN --data val/ --classes names.txt --json out.json

Zero-shot classification by open_clip's evaluator: prints top-1 and top-5 accuracy and the mean visual tokens.

    --checkpoint   an epoch_N.pt of scripts/train_clip.py, or the run's folder
    --data         a folder with one sub-folder a class, or webdataset shards of .jpg and .cls ('val-{00..12}.tar')
    --classes      class names in the order of the labels: one a line, or JSON
"""

from __future__ import annotations

import argparse
import json
import os
import sys

import open_clip
import torch

from llava_drip.cli import one_line
from llava_drip.contrastive.checkpoint import find_checkpoint, load_clip
from llava_drip.contrastive.zero_shot import TEMPLATES, classify, read_class_names


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="open_clip model name, e.g. DRIP-B-16-4x")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--classes", required=True)
    parser.add_argument("--json", help="file to write the result to")
    parser.add_argument(
        "--templates", choices=sorted(TEMPLATES), default="openai", help="80 (openai) or 7 (simple) prompts"
    )
    parser.add_argument(
        "--compression", type=float, help="patches per token to meet exactly (default: the image decides)"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "amp", "amp_bf16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> dict:
    if args.json and not os.path.isdir(os.path.dirname(args.json) or "."):
        raise ValueError(f"--json: no folder {os.path.dirname(args.json)}")
    class_names = read_class_names(args.classes)
    model, transform = load_clip(args.checkpoint, args.model, args.device)
    tokenizer = open_clip.get_tokenizer(args.model, context_length=model.context_length)
    if args.compression is not None:
        if not hasattr(model.visual, "trunk") or not hasattr(model.visual.trunk, "set_compression"):
            raise ValueError(f"--compression: the tower of {args.model} has a fixed number of tokens")
        model.visual.trunk.set_compression(args.compression)
    result = classify(
        model,
        transform,
        tokenizer,
        args.data,
        class_names,
        templates=TEMPLATES[args.templates],
        batch_size=args.batch_size,
        workers=args.workers,
        precision=args.precision,
        device=args.device,
    )
    return {"model": args.model, "checkpoint": str(find_checkpoint(args.checkpoint)), "data": args.data, **result}


if __name__ == "__main__":
    args = parse()
    try:
        result = main(args)
    except (ValueError, OSError) as error:
        sys.exit(f"zero_shot.py: error: {one_line(error)}")
    print(f"{result['images']} images of {result['classes']} classes", end=": ")
    print(f"top-1 {result['top1']:.4f}, top-5 {result['top5']:.4f}")
    if result["tokens_per_image"] is not None:
        print(f"{result['tokens_per_image']:.2f} visual tokens per image of {result['patches_per_image']} patches")
    if args.json:
        partial = f"{args.json}.partial"
        with open(partial, "w") as file:
            json.dump(result, file, indent=2)
        os.replace(partial, args.json)
