"""Boundary-rate losses: what keeps the number of tokens near its target.

The binomial prior is that of Dynamic Token Pooling (Nawrot et al., ACL 2023, arXiv:2211.09761).
"""

from __future__ import annotations

import torch
from torch import Tensor


def straight_through_loss(loss, tokens: Tensor, expected: Tensor, patches: int, rate: float | Tensor) -> Tensor:
    """A rate loss with the value at the drawn token counts and the gradient at the expected ones.

    The count that was drawn scatters around its expectation; the gradient there says more about that scatter than about the
    probabilities, and drowns what the task says about them.

    Args:
        loss: a function of RATE_LOSSES.
        tokens: [B] drawn counts. expected: [B] sums of probabilities, with gradient.
    Returns:
        [B] fp32.
    """
    smooth = loss(expected, patches, rate)
    return smooth + (loss(tokens, patches, rate) - smooth).detach()


def binomial_rate_loss(tokens: Tensor, patches: int, rate: float | Tensor) -> Tensor:
    """-log Binomial(tokens; patches, rate) / patches, for each image.

    Args:
        tokens: [B] token counts; need not be whole numbers.
        patches: N, patches of an image.
        rate: target tokens per patch, 1 / compression, in (0, 1); a float or [B].
    Returns:
        [B] fp32.
    """
    k = tokens.float()
    rate = torch.as_tensor(rate, dtype=torch.float32, device=k.device)
    n = torch.tensor(float(patches), device=k.device)
    log_choose = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return -(log_choose + k * torch.log(rate) + (n - k) * torch.log1p(-rate)) / n


RATE_LOSSES = {"binomial": binomial_rate_loss}
