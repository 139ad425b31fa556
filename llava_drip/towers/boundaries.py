"""Where one image segment ends and the next begins.

GumbelBoundaries learns it; UniformBoundaries cuts evenly, for counting operations. Both answer for the N - 1 places between
consecutive patches of the scan; the image's last patch always ends a segment and is nobody's decision.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPERATURE = 0.5  # of the Gumbel-Sigmoid, as in Nawrot et al. (ACL 2023)


def tokens_for_budget(compression: Tensor, patches: int) -> Tensor:
    """Token count [B] int64 closest to patches / compression, within 1 .. patches."""
    return (patches / compression).round().clamp(1, patches).long()


def most_probable(logits: Tensor, boundaries: Tensor) -> Tensor:
    """The given number of places with the highest logits, earlier ones first among equals.

    logits: [B, N - 1]. boundaries: [B] int64. Returns [B, N - 1] bool with `boundaries` True in each row.
    """
    rank = logits.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < boundaries[:, None]


class GumbelBoundaries(nn.Module):
    """Boundary predictor: a 2-layer MLP over how features on both sides of a place differ, sampled by a Gumbel-Sigmoid.

    In training a boundary is drawn where logit + logistic noise > 0: hard in the segments, straight-through to the relaxed
    sample in what the task sees of it (pooling.mix_across_doubtful). In eval there is no noise, and a threshold on the logits
    that is calibrated for each image: it lets through as many boundaries as sampling would draw on average, the sum of the
    probabilities. So eval spends what training spent, image by image, whatever the logits' scale. A fixed threshold does not:
    sampling at rate 0.25 may come from logits that are all negative; and one estimated over past batches lags behind logits
    that lie close together (docs/ARCHITECTURE.md).

    State dict: norm.*, fc1.*, fc2.*, size_scale [D].
    """

    def __init__(self, dim: int, compression: float, hidden: int | None = None):
        """dim: width of the patches. compression: target patches per token, >= 1. hidden: MLP width, default dim / 4."""
        super().__init__()
        hidden = hidden or max(dim // 4, 16)
        self.compression = compression
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, 1)
        # What a token knows of its size: log(patches) times this vector is added to it (0 for a single patch).
        self.size_scale = nn.Parameter(torch.zeros(dim))
        # Where uniform numbers of the logits' shape come from; a trainer may give ranks a common source (training/seeds.py).
        self.noise: Callable[[Tensor], Tensor] = torch.rand_like
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Random weights that are all positive, so that a boundary is likelier where neighbours differ more, and a bias from
        which sampling starts near the target rate.

        From weights of either sign some runs learn the opposite, boundaries within what is uniform: the task is served nearly
        as well, and neither way leads to the other (docs/results/boundaries.md).
        """
        self.norm.reset_parameters()
        for layer in (self.fc1, self.fc2):
            nn.init.uniform_(layer.weight, 0, 2 / layer.in_features)
            nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.size_scale, std=0.02)
        rate = min(1 / self.compression, 0.95)
        usual = 0.4  # what the weights above make of neighbours in pictures, on average
        nn.init.constant_(self.fc2.bias, math.log(rate / (1 - rate)) - usual)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, D] patches in scan order → logits [B, N - 1], fp32."""
        y = self.norm(x)
        hidden = F.gelu(self.fc1((y[:, 1:] - y[:, :-1]).abs()))
        return self.fc2(hidden).squeeze(-1).float()

    def sample(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Gumbel-Sigmoid: drawn [B, N - 1] bool, and the relaxed sample [B, N - 1] in 0 .. 1 that carries the gradient.

        A boundary is drawn where the relaxed sample exceeds 1/2; then the sample is how certain it is.
        """
        uniform = self.noise(logits).clamp(1e-6, 1 - 1e-6)  # fp32 logits: 1 - 1e-6 is below 1
        soft = torch.sigmoid((logits + uniform.logit()) / TEMPERATURE)
        return soft > 0.5, soft

    def decide(self, logits: Tensor, budget: Tensor | None) -> Tensor:
        """Boundaries of eval: [B, N - 1] bool. budget: [B] compressions to meet exactly, or None: each image decides."""
        if budget is None:
            # Not plain rounding: a sum of exactly k + 1/2 (a 2x tower's start) must not depend on the last bit.
            boundaries = (torch.sigmoid(logits).sum(1) + 0.4999).floor().long()
        else:
            boundaries = tokens_for_budget(budget.to(logits.device), logits.shape[1] + 1) - 1
        return most_probable(logits, boundaries)

    def extra_repr(self) -> str:
        return f"compression={self.compression}"


class UniformBoundaries(nn.Module):
    """Even cuts at the target rate, nothing learned: simulated boundaries for reproducible FLOP counts and as a baseline."""

    def __init__(self, dim: int, compression: float, hidden: int | None = None):
        super().__init__()
        self.compression = compression
        self.size_scale = nn.Parameter(torch.zeros(dim))

    def init_weights(self) -> None:
        nn.init.zeros_(self.size_scale)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, D] → [B, N - 1] zeros: no place is better than another."""
        return x.new_zeros(x.shape[0], x.shape[1] - 1, dtype=torch.float32)

    def decide(self, logits: Tensor, budget: Tensor | None) -> Tensor:
        """[B, N - 1] bool: cuts of equal length, as near as whole patches allow."""
        if budget is None:
            budget = torch.full((len(logits),), self.compression, device=logits.device)
        patches = logits.shape[1] + 1
        tokens = tokens_for_budget(budget.to(logits.device), patches)[:, None]
        segment = torch.arange(patches, device=logits.device) * tokens // patches
        return segment[:, 1:] > segment[:, :-1]


BOUNDARIES = {"gumbel": GumbelBoundaries, "uniform": UniformBoundaries}
