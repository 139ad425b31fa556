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


def let_gradient_reach_boundaries(values: Tensor, sizes: Tensor, confidence: Tensor) -> Tensor:
    """Give the task's gradient a way to the boundaries, without changing a value.

    A boundary separates the tokens on its sides, k and k + 1. Were it less certain, both would move towards what they would be
    as one segment, their size-weighted mean. Each token is therefore written as its mean minus (1 - confidence) times that move;
    as confidence is 1 in value (straight-through), only the gradient is new: for each boundary, how the loss changes when the
    two segments melt together. It is zero between equal neighbours, so boundaries pay only where they separate different things.
    A boundary that was not drawn has no such term: to first order, cutting a segment in two leaves the mean as it was.

    Args:
        values: [T, D] segment means.
        sizes: [T] patches of each token.
        confidence: [T] of the boundary that ends each token: value 1, gradient of its probability. Constant (no gradient) for
            the last token of an image, which nothing separates from the next image.
    Returns:
        [T, D], equal to `values`.
    """
    doubt = confidence[:-1, None] - 1  # zero in value
    step = (values[:-1] - values[1:]).detach()
    share = (sizes[1:] / (sizes[:-1] + sizes[1:]))[:, None]
    nothing = values.new_zeros(1, values.shape[-1])
    left = torch.cat([doubt * share * step, nothing])
    right = torch.cat([nothing, doubt * (share - 1) * step])
    return values + (left + right).to(values.dtype)
