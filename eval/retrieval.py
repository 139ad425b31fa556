"""python eval/retrieval.py --checkpoint logs/RUN --data dataset_flickr30k.json --images flickr30k-images/ --json out.json

Retrieval between pictures and captions: recall at 1, 5 and 10 in both directions, beside that of a random ranking.

    --checkpoint   an epoch_N.pt of scripts/train_clip.py, or the run's folder
    --model        the model's name; a run's folder knows it
    --data         shards ('test-{00..04}.tar', .parquet, or a folder of either), Karpathy's or COCO's .json, a .jsonl, .csv or
                   .tsv of picture and caption
    --images       for a list: the folder of the pictures, or shards whose keys are their names
    --split        for a list that names splits (default: test)

Ties count as a random order of the tied would: a model that answers the same for everything gets chance.
"""

from __future__ import annotations

import argparse
import time

from llava_drip import cli
from llava_drip.contrastive import programs
from llava_drip.contrastive.captions import open_captions
from llava_drip.contrastive.retrieval import KS, retrieve


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = cli.ArgumentParser(prog="retrieval.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images")
    parser.add_argument("--split")
    programs.add_flags(parser)
    args = parser.parse_args(argv)
    programs.check_flags(parser, args)
    return args


def table(result: dict) -> str:
    """The six recalls in percent, chance in brackets."""
    lines = [f"{'':<16}" + "".join(f"{f'R@{k}':>16}" for k in KS)]
    for way in ("image_to_text", "text_to_image"):
        cells = [f"{result[f'{way}_R@{k}']:.1%} ({result['chance'][f'{way}_R@{k}']:.1%})" for k in KS]
        lines.append(f"{way.replace('_', ' '):<16}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    args = parse()
    captions = open_captions(args.data, args.images, args.split)
    clip = programs.open_clip_model(args)
    started = time.perf_counter()
    result = retrieve(
        clip.model,
        clip.transform,
        clip.tokenizer,
        captions,
        batch_size=args.batch_size,
        workers=args.workers,
        precision=args.precision,
        device=clip.device,
    )
    seconds = time.perf_counter() - started
    print(f"{result['images']} pictures, {result['captions']} captions; in brackets what a random ranking gets")
    print(table(result))
    texts = [text for own in captions.captions for text in own]  # those of unreadable pictures too
    programs.report(args, result, clip.device, seconds, captions.files(), texts)


if __name__ == "__main__":
    cli.run(main, "retrieval.py")
