"""python scripts/convert_tower.py hf-hub:openai/clip-vit-large-patch14 --compression 4 --output towers/clip-l14-4x

Makes a DRIP of a dense ViT, and writes it as a tower's directory. At compression 1 it is the original exactly, which is checked;
its boundaries are untrained until scripts/distill_tower.py (or train_imagenet.py) has trained them.

SOURCE: a directory in the format of timm, open_clip or Hugging Face (a CLIP), the folder of a run of train_imagenet.py or
train_clip.py at compression 1, a timm name, open_clip:MODEL/TAG, or hf-hub:ID. Of a CLIP the tower gives the image embedding.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from llava_drip import cli


def parse() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = cli.ArgumentParser(prog="convert_tower.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("source", metavar="SOURCE", help="the dense ViT")
    parser.add_argument("--output", required=True, help="directory of the tower; must not be there, or be empty")
    parser.add_argument("--compression", type=float, help="patches per token to train for (4)")
    parser.add_argument("--pool-after", type=int, help="dense blocks before pooling (the entry point's: 2 of 12)")
    parser.add_argument("--img-size", type=int, help="pixels of a side; positions are interpolated to it")
    parser.add_argument(
        "--model-kwargs",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="further arguments of Drip, e.g. scan=hilbert 'compression=(2.0, 2.0)' 'pool_after=(2, 6)'",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the new boundary predictor (0)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    flags = {"compression": args.compression, "pool_after": args.pool_after, "img_size": args.img_size}
    arguments = cli.merged(cli.key_values(args.model_kwargs, "--model-kwargs"), flags)
    output = Path(args.output).expanduser()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"--output {output}: exists already; remove it, or give another")
    import torch  # after parsing: --help is quick

    from llava_drip.towers.convert import convert
    from llava_drip.towers.io import save_tower

    logging.basicConfig(format="%(message)s")
    logging.getLogger("llava_drip").setLevel(logging.INFO)
    torch.manual_seed(args.seed)
    tower = convert(args.source, **arguments)
    save_tower(tower, output, tower.pretrained_cfg["mean"], tower.pretrained_cfg["std"])
    parameters = sum(p.numel() for p in tower.parameters())
    print(
        f"{output}: {tower.pretrained_cfg['architecture']}, {parameters:,} parameters, {tower.compression:g} patches a token"
    )


if __name__ == "__main__":
    cli.run(main, "convert_tower.py")
