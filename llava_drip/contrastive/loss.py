"""Any open_clip loss, plus the boundaries' own loss; and the same gradients on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable

from open_clip import ClipLoss
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
            rate_loss: [B] fp32, as BoundaryCLIP gives it: the rate loss and the detail loss together.
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


def whole_gradients(loss: nn.Module, stock: ClipLoss) -> None:
    """Give open_clip's default gathering the gradients that one rank with the whole batch would have.

    Without --local-loss and --gather-with-grad every rank computes the whole loss, with gradients through its own features
    alone. DistributedDataParallel then averages these parts where they should be added: features get 1 / ranks of their gradient,
    while the boundary loss, the logit scale and what clips gradients see the whole one.

    Args:
        loss: what the trainer calls; gets a hook. stock: the loss that gathers.
    """
    ranks = stock.world_size
    if ranks == 1 or stock.local_loss or stock.gather_with_grad:
        return

    def scale(module: nn.Module, inputs: tuple, named: dict) -> None:
        for name in ("image_features", "text_features"):
            if named[name].requires_grad:
                named[name].register_hook(lambda gradient: gradient * ranks)

    loss.register_forward_pre_hook(scale, with_kwargs=True)
