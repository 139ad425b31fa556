"""open_clip's zero-shot evaluator, mended for today's NumPy, and the way this package replaces a name for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from open_clip_train import zero_shot
from torch import Tensor


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
