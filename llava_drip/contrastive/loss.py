"""Any open_clip loss, plus the boundary-rate loss."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class BoundaryLoss(nn.Module):
    """base(...) + weight * mean(rate_loss).

    Wraps instead of inheriting, so that the softmax (ClipLoss), sigmoid (SigLipLoss) and distillation losses all take
    it. The rate loss is a mean over the images of this rank; DistributedDataParallel's gradient average makes it one
    over all ranks. Under gradient accumulation the trainer calls the loss once for each part of the batch, with the
    other parts detached: their gradients add up to that of the whole batch, as they do for the contrastive loss.
    """

    def __init__(self, base: nn.Module, weight: float):
        super().__init__()
        self.base = base
        self.weight = weight
        self.on_tokens: Callable[[Tensor], None] | None = None  # called with num_tokens [B] for every loss

    def forward(self, *, rate_loss: Tensor, num_tokens: Tensor, output_dict: bool = False, **outputs: Tensor):
        """
        Args:
            rate_loss: [B] fp32.
            num_tokens: [B] int64.
            outputs: what `base` takes: image_features, text_features, logit_scale, ...
        Returns:
            The dictionary of `base` with "boundary_loss" (weighted, as the trainer sums the entries), or their sum.
        """
        losses = self.base(**outputs, output_dict=True)
        losses["boundary_loss"] = self.weight * rate_loss.mean()
        if self.on_tokens is not None:
            self.on_tokens(num_tokens)
        return losses if output_dict else sum(losses.values())
