"""What evaluations share: a model's mode and randomness put back, the tokens it spent, open_clip's zero-shot loop mended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from open_clip_train import zero_shot
from torch import Tensor, nn

from llava_drip.contrastive.model import patches_of, tower_of
from llava_drip.training.meters import TokenHistogram


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without gradients; afterwards each module's mode and torch's randomness are as they were.

    (A DataLoader draws from torch's generator, so that training after an evaluation would else go another way.)
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng([device.index for device in devices]), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


class TokenUse:
    """Tokens of the images that an evaluation saw, where the model's tower makes a TokenBatch. Of this process alone."""

    def __init__(self, model: nn.Module, device: torch.device | str):
        tower = tower_of(model)
        self.histogram = None if tower is None else TokenHistogram(patches_of(tower), device)

    def add(self, num_tokens: Tensor) -> None:
        """num_tokens: [B] int64."""
        self.histogram.add(num_tokens)

    def summary(self) -> dict[str, float | None]:
        """Means and the percentiles of compression (patches per token) over images; all None for another tower."""
        names = ("tokens_per_image", "patches_per_image", "compression", "compression_p5", "compression_p95")
        if self.histogram is None:
            return dict.fromkeys(names)
        found = self.histogram.summary(over_ranks=False) or {}
        found = {"tokens_per_image": found.get("tokens"), "patches_per_image": self.histogram.patches, **found}
        return {name: found.get(name) for name in names}


@contextmanager
def replaced(module: ModuleType, **attributes) -> Iterator[None]:
    """Other values for some attributes of a module while the block runs."""
    before = {name: getattr(module, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[float]:
    """open_clip_train.zero_shot.accuracy without its float(array of one element), which NumPy no longer allows.

    Args:
        output: [B, classes] scores. target: [B] labels.
    Returns:
        For each k, how many of the B labels are among the k highest scores.
    """
    correct = output.topk(max(topk), dim=1).indices.eq(target[:, None])
    return [float(correct[:, :k].sum()) for k in topk]


def run(model, classifier: Tensor, dataloader, args) -> tuple[float, float]:
    """open_clip_train.zero_shot.run: the shares (0 .. 1) of top-1 and top-5 hits."""
    with replaced(zero_shot, accuracy=accuracy):
        return zero_shot.run(model, classifier, dataloader, args)
