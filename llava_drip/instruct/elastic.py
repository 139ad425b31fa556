"""One assistant for every visual-token budget: in tuning each picture of each step is given a budget of its own, drawn anew."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llava_drip.assistant import LlavaDripForConditionalGeneration
from llava_drip.training.seeds import seed_of


def check_range(given: Sequence[float]) -> None:
    """ValueError: --elastic_compression is not two compressions, the lower one first."""
    if len(given) != 2 or not 1 <= given[0] <= given[1] < math.inf:
        words = " ".join(f"{value:g}" for value in given)
        raise ValueError(f"--elastic_compression {words}: must be LOW HIGH with 1 <= LOW <= HIGH")


class ElasticBudget:
    """Draws a compression for each picture, log-uniform between two; the same again when a run is resumed by as many processes
    with as large parts of the batch."""

    def __init__(self, model: LlavaDripForConditionalGeneration, low: float, high: float, seed: int):
        """ValueError: a tower whose budget cannot be chosen image by image."""
        if not getattr(model.vision_tower, "counts_vary", False):
            raise ValueError(
                f"--elastic_compression: a {type(model.vision_tower).__name__} has no budget for each image; give a DRIP tower"
            )
        self.model, self.low, self.high, self.seed = model, low, high, seed
        self.step, self.part = -1, 0
        self.end()

    def draw(self, step: int, part: int, rank: int, images: int) -> Tensor:
        """[images] fp32, patches per token. part: which of a step's batches on this rank."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, step, part, rank))
        low, high = math.log(self.low), math.log(self.high)
        return torch.exp(low + (high - low) * torch.rand(images, generator=generator)).clamp(self.low, self.high)

    def begin(self, step: int, rank: int, images: int) -> None:
        """Before a batch."""
        self.step, self.part = step, self.part + 1 if step == self.step else 0
        self.model.set_compression(self.draw(step, self.part, rank, images) if images else None)

    def end(self) -> None:
        """After a batch: the result, and checkpoints, let each image decide."""
        self.model.set_compression(None)
