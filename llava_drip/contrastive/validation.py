"""What is evaluated while training: zero-shot classification and retrieval, by rank 0, without a trace in the training."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch import nn

from llava_drip.contrastive.captions import open_captions
from llava_drip.contrastive.retrieval import retrieve
from llava_drip.contrastive.zero_shot import classify, read_class_names
from llava_drip.training.seeds import kept_randomness

PATIENCE = timedelta(
    days=2
)  # of ranks that wait for rank 0's evaluation; NCCL's own barrier would give up after ten minutes
RECALLS = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]


class Patience:
    """A barrier at which ranks wait as long as it takes. Made by all ranks at once."""

    def __init__(self):
        self.group = None
        if dist.is_available() and dist.is_initialized():
            self.group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def wait(self) -> None:
        if self.group is not None:
            dist.barrier(self.group)


def is_due(args: Namespace, epoch: int) -> bool:
    """Whether --zeroshot-frequency asks for an evaluation after so many completed epochs: open_clip's rule."""
    frequency = args.zeroshot_frequency
    return frequency > 0 and (epoch % frequency == 0 or epoch == args.epochs)


class Evaluation:
    """--zeroshot-data and --retrieval-data, as often as wanted. Opening reads the lists, not the pictures."""

    def __init__(self, args: Namespace, transform: Callable, tokenizer: Callable):
        """ValueError names a file that cannot be used."""
        self.args, self.transform, self.tokenizer = args, transform, tokenizer
        self.classes = self.captions = None
        if args.zeroshot_data is not None:
            self.classes = read_class_names(args.zeroshot_classes)
        if args.retrieval_data is not None:
            self.captions = open_captions(args.retrieval_data, args.retrieval_images, args.retrieval_split)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Of this process's model, in eval mode and back: what was asked for, as shares (0 .. 1).

        {"zero_shot_top1", "zero_shot_top5", "image_to_text_R@1", ..., "text_to_image_R@10"}
        """
        args, found = self.args, {}
        how = {
            "batch_size": args.batch_size,
            "workers": args.workers,
            "precision": args.precision,
            "device": args.device,
        }
        with kept_randomness():
            if self.classes is not None:
                result = classify(model, self.transform, self.tokenizer, args.zeroshot_data, self.classes, **how)
                found |= {"zero_shot_top1": result["top1"], "zero_shot_top5": result["top5"]}
            if self.captions is not None:
                result = retrieve(model, self.transform, self.tokenizer, self.captions, **how)
                found |= {name: result[name] for name in RECALLS}
        return found
