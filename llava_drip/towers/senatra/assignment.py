"""Which output token of a grouping layer each input token went to, softly, and what follows from it for a stack of layers.

An input grid of h x w tokens becomes an output grid of ceil(h / 2) x ceil(w / 2). The children of an output token are the 2 x 2
input tokens at its place. Locally, an input token may go to the window x window output tokens around its own; that many weights
are kept of each, so memory and time are linear in the number of tokens. Densely, it may go to any.

The rows of A_up, input over output tokens, sum to 1: a Markov chain. The product over layers says how much of a final token is
in each place of the picture (section 3.2 of the paper).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST = 1e-12  # of a column's sum, fp32: a token to which nobody goes is updated by nothing
_CHUNK = 64  # final tokens whose maps are made at once for hard segments


def halved(grid: tuple[int, int]) -> tuple[int, int]:
    """The grid that a grouping layer makes of a grid."""
    return tuple(-(-size // 2) for size in grid)


def to_children(x: Tensor) -> Tensor:
    """[B, h, w, D] → [B, ho, wo, 4, D], zeros where an odd side has no second child."""
    h, w = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
    return x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3, 4)


def from_children(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of to_children: [B, ho, wo, 4, D] → [B, h, w, D]."""
    x = x.unflatten(3, (2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, : grid[0], : grid[1]]


def neighbours(x: Tensor, window: int) -> Tensor:
    """[B, ho, wo, D] → [B, ho, wo, D, window²]: the tokens around each, row by row; zeros outside the grid."""
    half = window // 2
    x = F.pad(x, (0, 0, half, half, half, half))
    return x.unfold(1, window, 1).unfold(2, window, 1).flatten(-2)


def to_neighbours(x: Tensor, window: int) -> Tensor:
    """The adjoint of neighbours: [B, ho, wo, D, window²] → [B, ho, wo, D], each contribution added where it belongs."""
    ho, wo = x.shape[1:3]
    columns = x.permute(0, 3, 4, 1, 2).flatten(3).flatten(1, 2)
    return F.fold(columns, (ho, wo), window, padding=window // 2).permute(0, 2, 3, 1)


@dataclass(frozen=True)
class Assignment:
    """A_up of one grouping layer.

    Attributes:
        up: fp32. Local: [B, ho, wo, 4, window²], of each child over the output tokens around its own (children beyond an odd
            side: zeros). Dense: [B, h·w, ho·wo].
        grid: (h, w) of the input tokens.
        window: None: dense.
    """

    up: Tensor
    grid: tuple[int, int]
    window: int | None

    @property
    def out_grid(self) -> tuple[int, int]:
        return halved(self.grid)

    @property
    def down(self) -> Tensor:
        """A_down, in the form of `up`: the weights of each output token's inputs sum to 1 (to 0 where it has none)."""
        if self.window is None:
            return self.up / self.up.sum(1, keepdim=True).clamp(min=_LEAST)
        sums = to_neighbours(self.up.sum(3, keepdim=True), self.window)
        return self.up / neighbours(sums, self.window).clamp(min=_LEAST)

    def upsample(self, x: Tensor) -> Tensor:
        """A_up x: output tokens' [B, ho·wo, K] → input tokens' [B, h·w, K]."""
        up = self.up.to(x.dtype)
        if self.window is None:
            return up @ x
        around = neighbours(x.unflatten(1, self.out_grid), self.window)
        return from_children(up @ around.transpose(-1, -2), self.grid).flatten(1, 2)

    def gather(self, children: Tensor) -> Tensor:
        """A_downᵀ x: the mean of each output token's inputs. Local: [B, ho, wo, 4, D], dense: [B, h·w, D] → [B, ho, wo, D]."""
        down = self.down.to(children.dtype)
        if self.window is None:
            return (down.transpose(1, 2) @ children).unflatten(1, self.out_grid)
        return to_neighbours(children.transpose(-1, -2) @ down, self.window)

    def matrix(self) -> Tensor:
        """[B, h·w, ho·wo]: A_up written out. Quadratic in the number of tokens where it is local."""
        if self.window is None:
            return self.up
        n = self.out_grid[0] * self.out_grid[1]
        return self.upsample(torch.eye(n, device=self.up.device).expand(len(self.up), n, n))


def upsample(assignments: Sequence[Assignment], x: Tensor) -> Tensor:
    """The product of A_up over layers, the first one leftmost, times x: [B, final tokens, K] → [B, N, K]."""
    with torch.autocast(x.device.type, enabled=False):  # of weights that differ little half precision makes ties
        for assignment in reversed(assignments):
            x = assignment.upsample(x)
    return x


def soft_maps(assignments: Sequence[Assignment]) -> Tensor:
    """[B, final tokens, h, w] fp32: how much of each place went into each final token; they sum to 1 at every place."""
    last = assignments[-1]
    n = last.out_grid[0] * last.out_grid[1]
    chain = upsample(assignments, torch.eye(n, device=last.up.device).expand(len(last.up), n, n))
    return chain.transpose(1, 2).unflatten(2, assignments[0].grid)


@torch.no_grad()
def hard_segments(assignments: Sequence[Assignment]) -> Tensor:
    """[B, N] int64: the final token that each place went into most. Maps are made of a few tokens at a time, so memory stays
    linear in the number of places."""
    last = assignments[-1]
    n = last.out_grid[0] * last.out_grid[1]
    best = segments = None
    for begin in range(0, n, _CHUNK):
        some = torch.eye(n, device=last.up.device)[:, begin : begin + _CHUNK]
        values, places = upsample(assignments, some.expand(len(last.up), *some.shape)).max(-1)
        if best is None:
            best, segments = values, places
        else:
            better = values > best
            best, segments = torch.where(better, values, best), torch.where(better, places + begin, segments)
    return segments
