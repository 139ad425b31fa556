"""Where packed tokens lie in the image and how large they are, and what attention makes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RELATIVE = ("none", "rotary")
ROTARY_BASE = 100.0  # longest wavelength over the shortest, in patches


@dataclass(frozen=True)
class Places:
    """Packed tokens of a batch, prefix tokens not among them.

    Attributes:
        centroids: [T, 2] fp32 (row, column), mean over the patches of each token, in patches of the grid the tower was made for.
        sizes: [T] fp32, patches of each token.
        owner: [B * N] int64, the packed token of each patch, in scan order.
    """

    centroids: Tensor
    sizes: Tensor
    owner: Tensor


@dataclass(frozen=True)
class Relative:
    """What attention knows beyond the tokens' contents, over all packed tokens [T + B·P].

    Attributes:
        cos, sin: [T + B·P, head width / 2] fp32 of the rotary angles, or None. Prefix tokens are not turned.
        log_sizes: [T + B·P] fp32, log of the patches of each token, or None: added to the logits of attention to it, so that a
            token of n patches is attended to like n tokens of one (proportional attention of ToMe, Bolya et al., ICLR 2023).
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    log_sizes: Tensor | None = None


def sincos_positions(rows: int, columns: int, dim: int) -> Tensor:
    """[rows * columns, dim] sines and cosines of both coordinates, half a wave to a whole one across the image."""
    y, x = torch.meshgrid(torch.linspace(0, 1, rows), torch.linspace(0, 1, columns), indexing="ij")
    quarter = dim // 4
    frequencies = math.pi * 2 ** torch.linspace(0, 1, quarter)
    phases = torch.cat([c.flatten()[:, None] * frequencies for c in (y, x)], 1)
    waves = torch.cat([phases.sin(), phases.cos()], 1)
    return F.pad(waves, (0, dim - waves.shape[1]))


def rotary_angles(centroids: Tensor, head_dim: int) -> Tensor:
    """[T, head_dim / 2] fp32: angles of 2D rotary attention (Su et al., 2021; axial as in Heo et al., ECCV 2024).

    The first half of the pairs turns with the row, the second with the column, at wavelengths from 2π patches upwards. Nothing
    asks a coordinate to be whole, so a pooled token turns by the centroid of its segment.
    """
    quarter = head_dim // 4
    frequencies = ROTARY_BASE ** (-torch.arange(quarter, device=centroids.device) / quarter)
    return torch.cat([centroids[:, :1] * frequencies, centroids[:, 1:] * frequencies], 1)


def rotate(x: Tensor, relative: Relative) -> Tensor:
    """x: [T, H, d], turned pairwise (component i with i + d/2) by each token's angles."""
    a, b = x.float().chunk(2, -1)
    cos, sin = relative.cos[:, None], relative.sin[:, None]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)
