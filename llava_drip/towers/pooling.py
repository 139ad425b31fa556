"""From boundaries to segments to pooled tokens: pure functions over packed tokens.

A segment is a run of tokens along the scan. `ends` marks the last of each; an image's last token always ends one, so every
token is in exactly one segment, no segment reaches from one image into the next, and 1 <= segments <= tokens in every image,
whatever the boundaries.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segments_from_ends(ends: Tensor) -> Tensor:
    """ends [T] bool, True on each image's last token → [T] int64: segment of each token, counted through the batch."""
    return ends.cumsum(0) - ends.long()


def pool_segments(x: Tensor, segments: Tensor, total: int, sizes: Tensor) -> Tensor:
    """Mean of each segment over its patches.

    Args:
        x: [T, D].
        segments: [T] int64, 0 .. total - 1.
        total: number of segments, known to the caller.
        sizes: [T] fp32, patches that each token stands for already (ones before the first pooling).
    Returns:
        [total, D] in x's dtype (summed in fp32).
    """
    sums = x.new_zeros(total, x.shape[-1], dtype=torch.float32).index_add(0, segments, x.float() * sizes[:, None])
    return (sums / pool_sizes(segments, total, sizes)[:, None]).to(x.dtype)


def pool_sizes(segments: Tensor, total: int, sizes: Tensor) -> Tensor:
    """[total] fp32: patches of each segment."""
    return sizes.new_zeros(total).index_add(0, segments, sizes)


def detail_lost(content: Tensor, segments: Tensor, sizes: Tensor, pooled: Tensor) -> Tensor:
    """[T] fp32: how far each patch's content lies from its token's, squared, summed over its patches: what pooling loses.

    Content is normalised, so a patch can lose about 1 (2 if its token is its opposite).

    Args:
        content: [T, D] normalised over D (layer norm). segments, sizes: [T].
        pooled: [total, D], what pooling made of it.
    """
    return sizes * (content - pooled[segments]).square().mean(1)


def mix_across_doubtful(values: Tensor, sizes: Tensor, confidence: Tensor) -> Tensor:
    """Let tokens on both sides of a boundary run into each other as far as the boundary is doubtful; used in training.

    A boundary separates tokens k and k + 1. Without it both would be one token, their size-weighted mean. Each token is moved
    towards that mean by 1 - confidence, so a boundary between different things hurts the task unless it is certain, and one
    between equal things costs nothing: through `confidence` the task's gradient tells the predictor which is which. With
    confidence 1 nothing moves.

    Straight-through in value as well (part_of_the_way(..., 0): separate tokens in the forward pass, this gradient kept) carries
    less of that signal: there the network has adapted to separate tokens, and the first-order effect of melting two of them is
    small on true edges as elsewhere (docs/results/boundaries.md).

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


def part_of_the_way(values: Tensor, mixed: Tensor, part: float) -> Tensor:
    """values + part x (mixed - values), with the gradient of `mixed` whatever the part (straight-through)."""
    return mixed - (1 - part) * (mixed - values).detach()
