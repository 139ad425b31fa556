"""From boundaries to segments to pooled tokens: pure functions.

A segment is a run of patches along the scan. `ends` marks the last patch of each; the last patch of the image always ends one,
so every patch is in exactly one segment and 1 <= tokens <= patches, whatever the boundaries.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segments_from_ends(ends: Tensor) -> tuple[Tensor, Tensor]:
    """ends [B, N] bool, last column True → segments [B, N] int64 (segment of each patch), lengths [B] int64 (segments)."""
    upto = ends.cumsum(1)
    return upto - ends.long(), upto[:, -1]


def pool_segments(x: Tensor, segments: Tensor, lengths: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Mean of each segment.

    Args:
        x: [B, N, D].
        segments: [B, N] int64, contiguous runs 0, 0, 1, ... of each row.
        lengths: [B] int64, segments of each row.
        total: lengths.sum(), known to the caller.
    Returns:
        values [T, D] in x's dtype (summed in fp32), sizes [T] int64, the patches of each token.
    """
    first = lengths.cumsum(0) - lengths
    token = (segments + first[:, None]).flatten()
    sizes = torch.bincount(token, minlength=total)
    sums = x.new_zeros(total, x.shape[-1], dtype=torch.float32).index_add(0, token, x.flatten(0, 1).float())
    return (sums / sizes[:, None]).to(x.dtype), sizes


def mix_across_doubtful(values: Tensor, sizes: Tensor, confidence: Tensor) -> Tensor:
    """Let tokens on both sides of a boundary run into each other as far as the boundary is doubtful; used in training.

    A boundary separates tokens k and k + 1. Without it both would be one token, their size-weighted mean. Each token is moved
    towards that mean by 1 - confidence, so a boundary between different things hurts the task unless it is certain, and one
    between equal things costs nothing: through `confidence` the task's gradient tells the predictor which is which. With
    confidence 1 nothing moves.

    The obvious alternative, straight-through in value as well (confidence 1 in the forward pass, its gradient kept), was
    measured to carry no such signal: at confidence 1 the network has adapted to separate tokens and the first-order effect of
    melting two of them averages zero, on true edges as elsewhere (docs/results/boundaries.md).

    Args:
        values: [T, D] segment means.
        sizes: [T] patches of each token.
        confidence: [T] in 0 .. 1 of the boundary that ends each token; must be 1 for an image's last token, which nothing
            separates from the next image.
    Returns:
        [T, D].
    """
    doubt = 1 - confidence[:-1, None]
    step = values[1:] - values[:-1]
    share = (sizes[1:] / (sizes[:-1] + sizes[1:]))[:, None]  # of the right token in the common mean
    nothing = values.new_zeros(1, values.shape[-1])
    moves = torch.cat([doubt * share * step, nothing]) - torch.cat([nothing, doubt * (1 - share) * step])
    return values + moves.to(values.dtype)
