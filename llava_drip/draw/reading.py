"""A tower is asked about one image: the image as it saw it, its boundary probabilities, its segments at each token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from llava_drip.tokens import TokenBatch
from llava_drip.towers.contract import budget_kept, check_tower, evaluating
from llava_drip.towers.inputs import prepare


@dataclass(frozen=True)
class Cut:
    """One image at one token budget.

    Attributes:
        compression: patches per token that were asked for; None: the image, or the tower, decided.
        segments: [N] int64, the token of each patch, in raster order.
        tokens: how many tokens there are.
        features: [N, D] fp32, the token of each patch after the last block.
    """

    compression: float | None
    segments: Tensor
    tokens: int
    features: Tensor


@dataclass(frozen=True)
class Reading:
    """What one tower made of one image.

    Attributes:
        image: the image as the tower saw it, resized and cropped.
        grid_size: (rows, columns) of patches, N = rows * columns.
        scan: the order in which the tower reads patches (towers/scan.py).
        probabilities: [N] fp32, that a segment ends with each patch, in raster order; None: the tower decides nothing.
        cuts: one for each budget.
        measure: what `probabilities` are, in the words of the tower's rule; "boundary probability", unless they are no such.
    """

    image: Image.Image
    grid_size: tuple[int, int]
    scan: str
    probabilities: Tensor | None
    cuts: tuple[Cut, ...]
    measure: str = "boundary probability"


@torch.no_grad()
def read_boundaries(tower: nn.Module, image: Image.Image, compressions: Sequence[float | None]) -> Reading:
    """Run a tower on one image at each token budget; its own budget and mode are left as they were.

    Args:
        tower: with `set_compression`, e.g. a Drip.
        image: RGB of any size. It is resized and cropped at the centre as in evaluation, by the tower's pretrained_cfg.
        compressions: patches per token, >= 1, met exactly; None: each image decides. A tower whose number of tokens cannot be
            chosen (no set_compression) answers the same at each, with a Cut of compression None.

    Raises:
        ValueError: no budget, one below 1, or a model that makes no TokenBatch.
    """
    if not compressions:
        raise ValueError("read_boundaries: no compression to draw")
    check_tower(tower, type(tower).__name__)
    if not hasattr(tower, "set_compression"):
        compressions = [None] * len(compressions)
    seen, pixels = prepare(tower, image)
    pixels = pixels.to(next(tower.parameters()).device)
    answers = {}
    with evaluating(tower), budget_kept(tower):
        # Without a budget first: with two poolings what is probable in the second depends on what the first was allowed.
        for compression in dict.fromkeys((None, *compressions)):
            if hasattr(tower, "set_compression"):
                tower.set_compression(compression)
            answers[compression] = tower.forward_features(pixels)
    decided = (tokens.boundary_probs for tokens in answers.values() if tokens.boundary_probs is not None)
    probabilities = next(decided, None)
    return Reading(
        image=seen,
        grid_size=tower.patch_embed.grid_size,
        scan=getattr(tower, "scan", "raster"),
        probabilities=None if probabilities is None else probabilities[0].float().cpu(),
        cuts=tuple(_cut(compression, answers[compression]) for compression in compressions),
        measure=getattr(getattr(tower, "boundary_predictor", None), "measure", Reading.measure),
    )


def _cut(compression: float | None, tokens: TokenBatch) -> Cut:
    return Cut(compression, tokens.segments[0].cpu(), int(tokens.lengths[0]), tokens.unpool()[0].float().cpu())
