"""python scripts/train_imagenet.py scripts/recipes/imagenet_scratch.yaml --train-data train/ --val-data val/ --output runs/drip4x

ImageNet classification of a DRIP tower, or of any timm model: from scratch, full fine-tuning, linear probe (--freeze backbone),
or a change of resolution (--img-size). Flags bear timm's names; a recipe (YAML) holds the same. One GPU, or many, on one machine
or several:

    torchrun --nproc_per_node 8 -- scripts/train_imagenet.py RECIPE.yaml ...
    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 -- \\
        scripts/train_imagenet.py RECIPE.yaml ...     (the same on every node; --output on a disk that they share)

Data: a folder with a sub-folder a class, Hugging Face parquet files, or webdataset shards of .jpg and .cls. Each epoch prints
loss, top-1, top-5, compression (mean, 5th and 95th percentile over the pictures of --val-data; without it, of training), step
time, peak memory and what was skipped, and leaves last/ and best/, which timm.create_model("local-dir:OUTPUT/best",
pretrained=True) loads after `import llava_drip`. --resume goes on exactly after a kill.
"""

from __future__ import annotations

import sys

from llava_drip import cli
from llava_drip.classification.arguments import parse


def main() -> None:
    args = parse(sys.argv[1:], "train_imagenet.py", __doc__)
    from llava_drip.classification.train import train  # after parsing: --help is quick

    train(args, sys.argv)


if __name__ == "__main__":
    cli.run(main, "train_imagenet.py")
