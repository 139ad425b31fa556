"""python scripts/lr_finder.py --model drip_small_patch16_224 --train-data train/ --batch-size 256 --output lr_drip

Learning-rate range test: a short run whose learning rate rises from --start-lr to --end-lr, for any tower or timm model, on any
data that scripts/train_imagenet.py takes, with the same flags. Give it the recipe to be trained; it reads all but the schedule:

    python scripts/lr_finder.py scripts/recipes/imagenet_scratch.yaml --train-data train/ --output lr_scratch

The same for CLIP training, with the flags and recipes of scripts/train_clip.py, after the word clip:

    python scripts/lr_finder.py clip scripts/recipes/clip_cpu.yaml --train-data 'shards/{00000..00005}.tar' --output lr_clip

Writes OUTPUT.png (loss against rate, suggestions marked) and OUTPUT.json, and prints the suggestions. They are for the batch size
of the test; nothing is trained that one would keep.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from llava_drip import cli


def main() -> None:
    clip = sys.argv[1:2] == ["clip"]
    output, test = _clip(sys.argv[2:]) if clip else _classification(sys.argv[1:])
    # After parsing: --help is quick. Before the test: what is not installed is told at once.
    from llava_drip.draw.range_test import draw
    from llava_drip.training.range_test import write_json

    result, title = test()
    draw(result, f"{output}.png", title)
    write_json(result, f"{output}.json")
    print(result)
    print(f"{output}.png, {output}.json")


def _classification(argv: list[str]):
    from llava_drip.classification import arguments

    args = arguments.parse_lr_finder(argv, "lr_finder.py", __doc__)
    from llava_drip.classification.lr_finder import range_test

    output = Path(args.output).expanduser()
    return output, partial(range_test, args, output.parent)


def _clip(argv: list[str]):
    from llava_drip.training import range_test as flags

    parser = cli.ArgumentParser(prog="lr_finder.py clip", description="Further flags: train_clip.py --help.")
    flags.add_flags(parser)
    args, rest = parser.parse_known_args(argv)
    try:
        flags.check_flags(args)
    except ValueError as error:
        parser.error(str(error))
    from llava_drip.contrastive.lr_finder import range_test

    def test():
        with cli.one_line_usage():
            return range_test(rest, args.start_lr, args.end_lr, args.steps, args.beta)

    return Path(args.output).expanduser(), test


if __name__ == "__main__":
    cli.run(main, "lr_finder.py")
