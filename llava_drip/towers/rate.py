"""Boundary-rate losses: what keeps the number of tokens near its target, or below it, or within bounds.

Each takes (tokens [B], units [B], rate [B], options) and returns [B] fp32: `tokens` are counts, which need not be whole numbers;
`units` how many patches (or tokens of an earlier pooling) they come from; `rate` the target tokens per unit, in (0, 1].

binomial: the prior of Dynamic Token Pooling (Nawrot et al., ACL 2023, arXiv:2211.09761): every image is drawn to the target.
lower_bound: only spending above rate - lambda x (standard deviation of the rate over the batch) is penalised: images that need
    few tokens may go as low as they like, and the more they differ from one another the lower the mean has to be.
interval: only leaving [low, high] x rate is penalised: between them the image decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RateOptions:
    """
    Attributes:
        spread_weight: lambda of "lower_bound", in standard deviations of the rate over the batch.
        low, high: bounds of "interval", as multiples of the target rate.
    """

    spread_weight: float = 1.0
    low: float = 0.5
    high: float = 1.0

    def __post_init__(self):
        if not self.spread_weight >= 0:
            raise ValueError(f"rate_spread must be 0 or more, got {self.spread_weight}")
        if not 0 <= self.low <= self.high:
            raise ValueError(
                f"rate_interval must be 0 <= low <= high (multiples of the target rate), got {self.low}, {self.high}"
            )


def straight_through_loss(loss: Callable, tokens: Tensor, expected: Tensor, units: Tensor, rate: Tensor) -> Tensor:
    """A rate loss with the value at the drawn token counts and the gradient at the expected ones.

    The count that was drawn scatters around its expectation; the gradient there says more about that scatter than about the
    probabilities, and drowns what the task says about them.

    Args:
        loss: a function of RATE_LOSSES, its options given.
        tokens: [B] drawn counts. expected: [B] sums of probabilities, with gradient.
    Returns:
        [B] fp32.
    """
    smooth = loss(expected, units, rate)
    return smooth + (loss(tokens, units, rate) - smooth).detach()


def binomial_rate_loss(tokens: Tensor, units: Tensor, rate: Tensor, options: RateOptions = RateOptions()) -> Tensor:
    """-log Binomial(tokens; units, rate) / units, for each image. rate below 1."""
    k, n = tokens.float(), units.float()
    log_choose = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return -(log_choose + k * torch.log(rate) + (n - k) * torch.log1p(-rate)) / n


def lower_bound_rate_loss(tokens: Tensor, units: Tensor, rate: Tensor, options: RateOptions = RateOptions()) -> Tensor:
    """max(k/n - (rate - lambda σ), 0), σ the standard deviation of k/n over the batch (of this rank; no gradient through it)."""
    spent = tokens.float() / units
    deviation = spent.detach().std(correction=0)
    return (spent - (rate - options.spread_weight * deviation)).clamp(min=0)


def interval_rate_loss(tokens: Tensor, units: Tensor, rate: Tensor, options: RateOptions = RateOptions()) -> Tensor:
    """How far k/n lies outside [low x rate, high x rate]."""
    spent = tokens.float() / units
    return (spent - options.high * rate).clamp(min=0) + (options.low * rate - spent).clamp(min=0)


RATE_LOSSES = {
    "binomial": binomial_rate_loss,
    "lower_bound": lower_bound_rate_loss,
    "interval": interval_rate_loss,
}
