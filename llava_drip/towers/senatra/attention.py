"""Transformer blocks on a grid of tokens, with neighborhood attention (Hassani et al., CVPR 2023, arXiv 2204.07143).

A token attends to the kernel x kernel tokens nearest to it; at the picture's edge the window moves inwards, so that every token
has as many. Without a CUDA kernel of its own this is done here in plain torch, exactly and linear in the number of tokens: the
grid is cut into tiles about as large as the window, and the queries of a tile attend, under a mask, to the tile and the rim
around it that their windows reach. A window as large as the grid is global attention.

Shapes: B images, h x w grid, C width, H heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn

from llava_drip.towers.attention import attend
from llava_drip.towers.places import Relative, rotary_angles, rotate


@dataclass(frozen=True)
class Tiling:
    """One side of the grid in tiles.

    Attributes:
        size, kernel: tokens along the side; window, at most `size`.
        tile, count: tokens of a tile, number of tiles (the last may reach beyond the grid).
        rim: tokens on both sides of a tile that its windows reach.
    """

    size: int
    kernel: int
    tile: int
    count: int
    rim: int

    @classmethod
    def of(cls, size: int, kernel: int) -> Tiling:
        if kernel >= size:
            return cls(size, size, size, 1, 0)
        half = kernel // 2
        # Where the last tile holds more than half a window of tokens, their windows, moved inwards, stay within half a window.
        fits = [n for n in range(half + 1, min(2 * kernel, size) + 1) if size % n == 0 or size % n > half]
        tile = min(fits, key=lambda n: abs(n - kernel), default=kernel)
        return cls(size, kernel, tile, -(-size // tile), half if fits else kernel - 1)

    @property
    def keys(self) -> int:
        return self.tile + 2 * self.rim

    def mask(self, device: torch.device) -> Tensor:
        """[count, tile, keys] bool: whether a query's window holds the key."""
        begin = torch.arange(self.count, device=device)[:, None] * self.tile
        query = (begin + torch.arange(self.tile, device=device)).clamp(max=self.size - 1)
        first = (query - self.kernel // 2).clamp(0, self.size - self.kernel)[..., None]
        key = (begin + torch.arange(self.keys, device=device) - self.rim)[:, None]
        return (key >= first) & (key < first + self.kernel)


@dataclass(frozen=True)
class Neighborhood:
    """The tiles of a grid and what attention in them needs; made once for all blocks of a stage.

    Attributes:
        rows, columns: tiles along both sides.
        mask: [tiles, queries of a tile, keys of a tile] bool; None where every token attends to all.
        relative: rotary angles [h * w, d / 2] of the tokens.
    """

    rows: Tiling
    columns: Tiling
    mask: Tensor | None
    relative: Relative

    @classmethod
    def of(cls, grid: tuple[int, int], kernel: int | None, head_dim: int, device: torch.device) -> Neighborhood:
        """kernel: side of the window; None for global attention."""
        rows, columns = (Tiling.of(size, kernel or size) for size in grid)
        mask = None
        if rows.count * columns.count > 1:
            by_row, by_column = rows.mask(device), columns.mask(device)
            mask = by_row[:, None, :, None, :, None] & by_column[None, :, None, :, None, :]
            mask = mask.flatten(0, 1).flatten(1, 2).flatten(2, 3)
        places = torch.cartesian_prod(*(torch.arange(size, device=device, dtype=torch.float32) for size in grid))
        angles = rotary_angles(places.view(-1, 2), head_dim)
        return cls(rows, columns, mask, Relative(angles.cos(), angles.sin()))

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that are multiplied, the masked ones too."""
        return (
            self.rows.count
            * self.rows.tile
            * self.rows.keys
            * self.columns.count
            * self.columns.tile
            * self.columns.keys
        )

    @property
    def window_pairs(self) -> int:
        """Pairs of a token and a token of its window."""
        return self.rows.size * self.rows.kernel * self.columns.size * self.columns.kernel


def neighborhood_attention(q: Tensor, k: Tensor, v: Tensor, near: Neighborhood, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v within each token's window.

    Args:
        q, k, v: [B, h, w, H, d].
        near: of the grid h x w.
        dropout: probability on the attention weights (0 in eval).
    Returns:
        [B, h, w, H, d]
    """
    B, h, w, H, d = q.shape
    if near.mask is None:
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))  # [B, H, h·w, d]
        return attend(q, k, v, None, dropout, False).transpose(1, 2).unflatten(1, (h, w))
    r, c = near.rows, near.columns
    below, right = r.count * r.tile - h, c.count * c.tile - w
    q = F.pad(q, (0, 0, 0, 0, 0, right, 0, below))
    q = q.view(B, r.count, r.tile, c.count, c.tile, H, d).permute(0, 1, 3, 5, 2, 4, 6)
    q = q.reshape(B, r.count * c.count * H, r.tile * c.tile, d)

    def with_rim(t: Tensor) -> Tensor:
        t = F.pad(t, (0, 0, 0, 0, c.rim, right + c.rim, r.rim, below + r.rim))
        t = t.unfold(1, r.keys, r.tile).unfold(2, c.keys, c.tile)  # [B, rows, columns, H, d, keys, keys]
        return t.permute(0, 1, 2, 3, 5, 6, 4).reshape(B, r.count * c.count * H, r.keys * c.keys, d)

    # One mask for all images: tiles and heads lie in the same dimension, the batch's is broadcast.
    mask = near.mask[:, None].expand(-1, H, -1, -1).flatten(0, 1)[None]
    out = attend(q, with_rim(k), with_rim(v), mask, dropout, False)
    out = out.view(B, r.count, c.count, H, r.tile, c.tile, d).permute(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(B, r.count * r.tile, c.count * c.tile, H, d)[:, :h, :w]


class GridAttention(nn.Module):
    """Self-attention of a grid of tokens within windows, with rotary positions. Parameters are those of timm's Attention."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, near: Neighborhood) -> Tensor:
        """[B, h, w, C] → [B, h, w, C]"""
        h, w = x.shape[1:3]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        q, k = (rotate(t.flatten(1, 2), near.relative).unflatten(1, (h, w)) for t in (q, k))
        out = neighborhood_attention(q, k, v, near, self.attn_drop.p if self.training else 0.0)
        return self.proj_drop(self.proj(out.flatten(-2)))


class GridBlock(nn.Module):
    """Pre-norm transformer block on a grid of tokens."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        init_values: float | None = None,
    ):
        """init_values: start of the scales of both branches; None: no scales."""
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = GridAttention(dim, num_heads, attn_drop, proj_drop)
        self.ls1 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.ls2 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, near: Neighborhood) -> Tensor:
        """[B, h, w, C] → [B, h, w, C]"""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), near)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
