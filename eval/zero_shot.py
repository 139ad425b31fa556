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

import open_clip

from llava_drip import cli
from llava_drip.contrastive.checkpoint import find_checkpoint, load_clip
from llava_drip.contrastive.zero_shot import TEMPLATES, classify, read_class_names


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = cli.ArgumentParser(prog="zero_shot.py", description=__doc__, formatter_class=formatter)
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
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    args = parser.parse_args(argv)
    for flag, least in (("batch_size", 1), ("workers", 0)):
        if getattr(args, flag) < least:
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least {least}")
    return args


def evaluate(args: argparse.Namespace) -> dict:
    """Measures; returns what --json gets."""
    if args.json and not os.path.isdir(os.path.dirname(args.json) or "."):
        raise ValueError(f"--json: no folder {os.path.dirname(args.json)}")
    device = str(cli.checked_device(args.device))
    class_names = read_class_names(args.classes)
    model, transform = load_clip(args.checkpoint, args.model, device)
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
        device=device,
    )
    return {"model": args.model, "checkpoint": str(find_checkpoint(args.checkpoint)), "data": args.data, **result}


def main() -> None:
    args = parse()
    result = evaluate(args)
    print(f"{result['images']} images of {result['classes']} classes", end=": ")
    print(f"top-1 {result['top1']:.4f}, top-5 {result['top5']:.4f}")
    if result["tokens_per_image"] is not None:
        print(f"{result['tokens_per_image']:.2f} visual tokens per image of {result['patches_per_image']} patches")
    if args.json:
        partial = f"{args.json}.partial"
        with open(partial, "w") as file:
            json.dump(result, file, indent=2)
        os.replace(partial, args.json)


if __name__ == "__main__":
    cli.run(main, "zero_shot.py")
