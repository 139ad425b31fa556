"""python eval/zero_shot.py --checkpoint logs/RUN --data val/ --classes names.txt --json out.json

Zero-shot classification by open_clip's evaluator: prints top-1 and top-5 accuracy and the mean visual tokens.

    --checkpoint   an epoch_N.pt of scripts/train_clip.py, or the run's folder
    --model        the model's name; a run's folder knows it
    --data         a folder with one sub-folder a class, or webdataset shards of .jpg and .cls ('val-{00..12}.tar')
    --classes      class names in the order of the labels: one a line, or JSON
"""

from __future__ import annotations

import argparse
import time

from llava_drip import cli
from llava_drip.contrastive import programs
from llava_drip.contrastive.zero_shot import TEMPLATES, classify, labelled_files, read_class_names


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = cli.ArgumentParser(prog="zero_shot.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--classes", required=True)
    parser.add_argument(
        "--templates", choices=sorted(TEMPLATES), default="openai", help="80 (openai) or 7 (simple) prompts"
    )
    programs.add_flags(parser)
    args = parser.parse_args(argv)
    programs.check_flags(parser, args)
    return args


def main() -> None:
    args = parse()
    class_names = read_class_names(args.classes)
    clip = programs.open_clip_model(args)
    started = time.perf_counter()
    result = classify(
        clip.model,
        clip.transform,
        clip.tokenizer,
        args.data,
        class_names,
        templates=TEMPLATES[args.templates],
        batch_size=args.batch_size,
        workers=args.workers,
        precision=args.precision,
        device=clip.device,
    )
    seconds = time.perf_counter() - started
    print(f"{result['images']} images of {result['classes']} classes", end=": ")
    print(f"top-1 {result['top1']:.4f}, top-5 {result['top5']:.4f}")
    prompts = [template(name) for name in class_names for template in TEMPLATES[args.templates]]
    data = {"data": labelled_files(args.data), "classes": args.classes}
    programs.report(args, result, clip.device, seconds, data, prompts)


if __name__ == "__main__":
    cli.run(main, "zero_shot.py")
