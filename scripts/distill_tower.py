"""python scripts/distill_tower.py scripts/recipes/distill_cpu.yaml --teacher TOWER --train-data IMAGES --output runs/distilled

Turns a dense ViT into a DRIP and trains its boundaries and the blocks after pooling against the dense tower's own features:
pooled embedding, outputs, and the patches that each token stands for. Needs pictures, and no labels. One GPU, or many:

    torchrun --nproc_per_node 8 -- scripts/distill_tower.py RECIPE.yaml ...

TOWER: the folder of a run of train_imagenet.py or train_clip.py at compression 1, a directory in the format of timm, open_clip or
Hugging Face (a CLIP), a timm name, open_clip:MODEL/TAG, or hf-hub:ID. IMAGES: as train_imagenet.py takes them, or a folder of
pictures without classes. With --val-data every epoch prints the cosine similarity of the student's embedding to the teacher's,
and, where its labels are those of the teacher's classes (shards: name them by --classes), top-1 of both. Leaves the same folder
as train_imagenet.py: last/ and best/ load as any tower. --resume goes on exactly after a kill.
"""

from __future__ import annotations

import sys

from llava_drip import cli
from llava_drip.classification.distill_arguments import parse


def main() -> None:
    args = parse(sys.argv[1:], "distill_tower.py", __doc__)
    from llava_drip.classification.distill import distill  # after parsing: --help is quick

    distill(args, sys.argv)


if __name__ == "__main__":
    cli.run(main, "distill_tower.py")
