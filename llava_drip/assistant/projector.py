"""From the tower's tokens to the language model's width, with or without a word on where each token lies."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from llava_drip.tokens import TokenBatch

PLACE_DIM = 8
_PLACE_SCALE = 1.5  # rms of a wave over the picture: a new position layer is about as loud as a new projector


def segment_places(tokens: TokenBatch, grid_size: tuple[int, int]) -> Tensor:
    """Where each token lies: the mean over its patches of waves over the picture.

    A dense tower's tokens come in raster order, so their number in the sequence says where they lie. Pooled tokens have lost
    that: the same number is another place in the next picture.

    Args:
        tokens: of segments (patches that were dropped are in none), or one for each patch. T tokens in all.
        grid_size: rows and columns of patches.
    Returns:
        [T, PLACE_DIM] fp32: sines and cosines of x and y (0 .. 1), a quarter and a half of a wave across the picture, each
        with mean 0 over the picture: what all places share says nothing, and would drown what tells them apart.
    Raises:
        ValueError: tokens that are neither (nothing says where they lie), naming the first such image.
    """
    device = tokens.values.device
    y, x = torch.meshgrid(*(torch.linspace(0, 1, n, device=device) for n in grid_size), indexing="ij")
    phases = torch.stack([c.flatten() * math.pi / 2 * k for k in (1, 2) for c in (x, y)], 1)
    waves = torch.cat([phases.sin(), phases.cos()], 1)
    waves = waves - waves.mean(0)
    waves = _PLACE_SCALE * waves / waves.pow(2).mean(0).sqrt().clamp(min=1e-3)  # a grid of one row has no y
    total = len(tokens.values)
    if tokens.segments is None:
        for image, length in enumerate(tokens.packing.lengths):
            if length != len(waves):
                raise ValueError(
                    "segment_positions needs a tower whose tokens are patches or segments of patches; image "
                    f"{image} has {length} tokens for {len(waves)} patches, and nothing says where they lie"
                )
        return waves.repeat(len(tokens), 1)
    first = tokens.lengths.cumsum(0) - tokens.lengths
    kept = (tokens.segments >= 0).flatten().to(waves.dtype)
    token = (tokens.segments.clamp(min=0) + first[:, None]).flatten()
    sums = waves.new_zeros(total, PLACE_DIM).index_add(0, token, waves.repeat(len(tokens), 1) * kept[:, None])
    # A SeNaTra's token may be that of no patch: it says nothing of where it lies.
    return sums / tokens.sizes.clamp(min=1)[:, None]


class Projector(nn.Sequential):
    """LLaVA's projector under LLaVA's parameter names (0.*, 2.*), and `position.*` where segment_positions asks for it."""

    def __init__(self, kind: str, vision_dim: int, text_dim: int, segment_positions: bool = False):
        """kind: "linear" or "mlp2x_gelu"."""
        layers = [nn.Linear(vision_dim, text_dim)]
        if kind == "mlp2x_gelu":
            layers += [nn.GELU(), nn.Linear(text_dim, text_dim)]
        super().__init__(*layers)
        self.depth = len(layers)
        if segment_positions:
            self.position = nn.Linear(PLACE_DIM, text_dim)

    def forward(self, values: Tensor, places: Tensor | None = None) -> Tensor:
        """values [T, vision_dim], and places [T, PLACE_DIM] for a projector with segment positions → [T, text_dim]."""
        # Not [0].weight.dtype: under ZeRO-3 naming a weight fetches it.
        dtype = next(self.parameters()).dtype
        values = values.to(dtype)
        for layer in list(self.children())[: self.depth]:
            values = layer(values)
        return values + self.position(places.to(dtype)) if hasattr(self, "position") else values
