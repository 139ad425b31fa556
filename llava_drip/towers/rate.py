"""Boundary-rate losses: what keeps the number of tokens near its target.

The binomial prior is that of Dynamic Token Pooling (Nawrot et al., ACL 2023, arXiv:2211.09761).
"""

from __future__ import annotations

import torch
from torch import Tensor


def binomial_rate_loss(tokens: Tensor, patches: int, rate: float | Tensor) -> Tensor:
    """-log Binomial(tokens; patches, rate) / patches, for each image.

    Args:
        tokens: [B] token counts, float; a straight-through count carries the gradient to the boundaries.
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
