"""What several tests of towers share."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def shake(model: nn.Module) -> nn.Module:
    """Random values everywhere: fresh biases and norms are zeros and ones, which hides what is forgotten."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
