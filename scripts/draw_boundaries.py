"""python scripts/draw_boundaries.py photo.jpg --model runs/drip_4x --compression 2 4 10 --output boundaries

Draws how towers cut images into segments. For each image one figure: a row a model, and in it the image as the tower saw it
(resized and cropped as in evaluation), how probable a boundary is at each place along the scan, and the segments at each
compression, which is met exactly.

A model is a tower's directory (as save_tower writes it), a training run's folder, a pretrained plain ViT of timm, open_clip or
Hugging Face, or a name of this package (drip_*), whose weights are random: such a row shows what the initialization does, not
what training would find, and says so. Two patch sizes side by side:

    python scripts/draw_boundaries.py *.jpg --model drip_base_patch32_224 drip_base_patch16_224 --output boundaries

Of a TokenLearner (tokenlearner_*), whose tokens are mixtures of all patches, the figure shows where each token looks:

    python scripts/draw_boundaries.py photo.jpg --model runs/tokenlearner --output maps

--unlimited adds the mode without a budget, in which each image decides. --unpool adds a row in which each patch shows the token
that it went into. The same command draws the same figures.

A SeNaTra (senatra_*) has no budget: drawn are its segments after each grouping layer, and mean colours by its soft maps; with
--model-kwargs num_classes=N, of a tower with such a classifier, also the class of each patch.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from llava_drip import cli
from llava_drip.draw.results import ENDINGS


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = cli.ArgumentParser(prog="draw_boundaries.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="JPEG, PNG, WebP, GIF or BMP")
    parser.add_argument(
        "--model", nargs="+", required=True, metavar="MODEL", help="tower directory, folder of a run, or timm name"
    )
    parser.add_argument("--labels", nargs="+", metavar="TEXT", help="one a model (default: names and directories)")
    parser.add_argument(
        "--model-kwargs",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="timm arguments of every model, img_size=448, say",
    )
    parser.add_argument("--compression", type=float, nargs="+", metavar="C", help="patches per token (default: 2 4 10)")
    parser.add_argument("--unlimited", action="store_true", help="also without a budget: each image decides")
    parser.add_argument(
        "--unpool",
        nargs="?",
        const="colour",
        choices=["colour", "features"],
        help="also what each patch keeps of itself: the mean colour of its segment (default), or its token's features as "
        "principal components",
    )
    parser.add_argument(
        "--output", default="boundaries", help="folder, or for one image a file that ends in .png, .svg or .pdf"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random weights (0)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    args = parser.parse_args(argv)
    for value in args.compression or []:
        if not 1 <= value < math.inf:
            parser.error(f"--compression {value:g}: must be at least 1 (patches per token), and finite")
    if args.labels and len(args.labels) != len(args.model):
        parser.error(f"--labels: {len(args.labels)} for {len(args.model)} models; give one a model")
    suffix = Path(args.output).suffix
    if suffix in ENDINGS and not Path(args.output).is_dir():
        if len(args.images) > 1:
            parser.error(f"--output {args.output}: a file holds one image, {len(args.images)} are given; name a folder")
    elif suffix and not Path(args.output).is_dir():
        parser.error(f"--output {args.output}: must be a folder, or end in {', '.join(ENDINGS)}")
    return args


def files(output: str, images: Sequence[str]) -> list[Path]:
    """The figure of each image, in its folder, which is made: named after the image, with a number where two have one name."""
    path = Path(output)
    if path.suffix in ENDINGS and not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        return [path]
    path.mkdir(parents=True, exist_ok=True)
    result: list[Path] = []
    for image in images:
        stem, number = Path(image).stem, 1
        while (file := path / f"{stem}{f'-{number}' if number > 1 else ''}.png") in result:
            number += 1
        result.append(file)
    return result


def one_drawing(args: argparse.Namespace, kinds: Sequence[str]) -> str:
    """What is drawn of all towers. ValueError: they have no figure in common, or a flag has no meaning for them."""
    for name, kind in zip(args.model, kinds):
        if kind != kinds[0]:
            raise ValueError(f"--model: of {args.model[0]} {kinds[0]} are drawn, of {name} {kind}; draw them apart")
    if kinds[0] != "segments at a budget":
        for flag in ("compression", "unlimited", "unpool"):
            if getattr(args, flag):
                raise ValueError(
                    f"--{flag}: {args.model[0]} has a fixed number of tokens, and one drawing; leave it out"
                )
    return kinds[0]


def main() -> None:
    args = parse()
    import timm  # after parsing: --help is quick
    import torch
    from tqdm import tqdm

    import llava_drip  # noqa: F401  (registers the towers)
    from llava_drip.draw.boundaries import draw_boundaries
    from llava_drip.draw.groups import draw_groups, has_groups, read_groups
    from llava_drip.draw.reading import read_boundaries
    from llava_drip.draw.token_maps import draw_token_maps, read_token_maps
    from llava_drip.images import load_image
    from llava_drip.towers import TokenLearnerViT
    from llava_drip.towers.contract import check_budget
    from llava_drip.towers.directories import tower_directory
    from llava_drip.towers.io import load_tower
    from llava_drip.towers.pretrained import is_timm_vit

    for image in args.images:  # before minutes of drawing
        load_image(image)
    device = cli.checked_device(args.device)
    arguments = cli.key_values(args.model_kwargs, "--model-kwargs")
    towers, labels = [], []
    for i, name in enumerate(args.model):
        directory = tower_directory(name)
        torch.manual_seed(args.seed)
        towers.append(load_tower(str(directory or name), **arguments).to(device).eval())
        random = timm.is_model(name) and not is_timm_vit(name)
        label = args.labels[i] if args.labels else name
        if random:
            label += f"\nrandom weights, seed {args.seed}"
            print(
                f"draw_boundaries.py: {name} is a timm name, so its weights are random (--seed {args.seed}): what is drawn is "
                "the initialization, nothing is learned",
                file=sys.stderr,
            )
        labels.append(label)

    def kind(tower) -> str:
        if isinstance(tower, TokenLearnerViT):
            return "maps of tokens"
        return "grouping layers" if has_groups(tower) else "segments at a budget"

    drawn = one_drawing(args, [kind(tower) for tower in towers])
    compressions = [*(args.compression or [2, 4, 10]), *([None] if args.unlimited else [])]
    if not any(hasattr(tower, "set_compression") for tower in towers):
        if args.compression or args.unlimited:
            check_budget(towers[0], args.model[0])
        compressions = [None]  # once, not for each budget
    outputs = files(args.output, args.images)
    several = len(args.images) > 1
    for image, output in zip(
        tqdm(args.images, desc="drawing", unit=" images", disable=None if several else True), outputs, strict=True
    ):
        picture = load_image(image)
        if drawn == "maps of tokens":
            draw_token_maps(labels, [read_token_maps(tower, picture) for tower in towers], output, Path(image).name)
            continue
        if drawn == "grouping layers":
            draw_groups(labels, [read_groups(tower, picture) for tower in towers], output, Path(image).name)
            continue
        readings = [read_boundaries(tower, picture, compressions) for tower in towers]
        draw_boundaries(labels, readings, output, Path(image).name, args.unpool)
    print(
        "wrote", ", ".join(map(str, outputs)) if len(outputs) <= 4 else f"{len(outputs)} figures to {outputs[0].parent}"
    )


if __name__ == "__main__":
    cli.run(main, "draw_boundaries.py")
