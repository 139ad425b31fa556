"""python scripts/train_clip.py --model DRIP-B-16-4x --train-data 'train-{000..331}.tar' --train-num-samples 3000000

CLIP training of a DRIP tower (or any open_clip model) by open_clip's own trainer, with open_clip's own flags and some more
(`--help` lists ours first). A recipe, a YAML file of `flag: value` lines, may stand first; flags after it win:

    python scripts/train_clip.py RECIPE.yaml --train-data 'train-{000..331}.tar' --name run

One GPU, or many:

    torchrun --nproc_per_node 8 -- scripts/train_clip.py --local-loss --gather-with-grad --model DRIP-B-16-4x ...

(The -- keeps torchrun from taking --logs for one of its own flags.)

On a CPU, in minutes (open_clip's defaults, mixed precision and 10,000 steps of warm-up, are meant for GPUs):

    python scripts/train_clip.py --model DRIP-mini-8-4x --train-data 'train-{00000..00005}.tar' \\
        --dataset-type webdataset --train-num-samples 6000 --device cpu --precision fp32 --workers 1 \\
        --batch-size 64 --epochs 3 --lr 1e-3 --warmup 20 --log-every-n-steps 20

Data: webdataset shards, parquet files, or a csv of paths and captions. What cannot be read is left out, and counted in the log.
Each epoch's line in LOGS/NAME/out.log, and row in epochs.jsonl, says what it brought; `--zeroshot-data` and `--retrieval-data`
add zero-shot accuracy and retrieval.

Continue a run with its `--name` and `--resume latest`, within an epoch where `--save-every-n-steps` was given: it then does what
it would have done without the interruption. Continual pretraining, on other data from a run's weights: `--pretrained LOGS/NAME`.

LOGS/NAME loads in open_clip ("local-dir:LOGS/NAME"), LOGS/NAME/tower in timm and as `pretrain_projector.py --vision_tower`.
Ends with exit code 1 and one line for what the user can mend.
"""

from __future__ import annotations

import sys

from llava_drip import cli
from llava_drip.contrastive import arguments
from llava_drip.contrastive.train import train


def main() -> None:
    with cli.one_line_usage():
        arguments.parse(sys.argv[1:])  # open_clip's parser would print its usage, 60 lines; train parses again
    train(sys.argv[1:])


if __name__ == "__main__":
    cli.run(main, "train_clip.py")
