"""What the rest of the package asks of a tower, checked where one is named, so that a stock timm model is refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# What may be asked for by name, in messages.
TOWERS = (
    "a drip_*, dynamicvit_*, tokenlearner_*, senatra_* or plain_vit_* of timm.list_models(), drip_base_patch16_224, say"
)
NO_FEATURE_MAPS = (
    "features_only, forward_intermediates, prune_intermediate_layers: a tower's TokenBatch has no [B, C, H, W] form; "
    "use forward_features(x, layer=-2) for an inner layer, and TokenBatch.unpool for features of each patch"
)
BUDGETS = ("compression", "budget", "over", "pool_after", "elastic")  # arguments of towers whose tokens can be chosen


def lacks_of_tower(model: nn.Module) -> list[str]:
    """What a model lacks to be a tower; empty for a tower.

    A tower has:
        forward_features(x [B, 3, height, width], *, layer=None) -> TokenBatch, `layer` as in PackedVisionTransformer
        forward_head(tokens) -> [B, num_classes], and with num_classes=0 [B, num_features]
        num_features: width D of the tokens
        patch_embed.img_size, patch_embed.grid_size: (rows, columns), of pixels and of patches

    What forward_features returns is not tried here; that it takes `layer` tells our towers from timm's models.
    """
    lacks = []
    forward_features = getattr(model, "forward_features", None)
    if forward_features is None or "layer" not in inspect.signature(forward_features).parameters:
        lacks.append("forward_features(x, layer=...)")
    for name in ("forward_head", "num_features", "patch_embed.img_size", "patch_embed.grid_size"):
        owner, _, attribute = name.rpartition(".")
        if not hasattr(getattr(model, owner, None) if owner else model, attribute):
            lacks.append(name)
    return lacks


def check_tower(model: nn.Module, name: str) -> None:
    """ValueError that says what `name` lacks to be a tower, and which names are towers."""
    if lacks := lacks_of_tower(model):
        raise ValueError(
            f"{name}: not a vision tower, a {type(model).__name__} without {', '.join(lacks)}. Take {TOWERS}"
        )


def check_budget(model: nn.Module, name: str) -> None:
    """ValueError for a model without set_compression: its number of tokens cannot be chosen once it is made. A tower may say
    in `budget_hint` what to do instead."""
    if not hasattr(model, "set_compression"):
        hint = getattr(model, "budget_hint", "")
        raise ValueError(f"{name} has no adjustable token budget{': ' if hint else ''}{hint}")


def refuse_budget(arguments: dict, name: str, hint: str) -> None:
    """ValueError for arguments about a budget, of a tower `name` that has none. hint: why, and what to do."""
    for key in BUDGETS:
        if arguments.get(key) is not None:
            raise ValueError(f"{key}={arguments[key]}: {name} has no adjustable token budget: {hint}")


@contextmanager
def budget_kept(model: nn.Module) -> Iterator[None]:
    """What set_compression had asked of a tower is asked of it again at the end; a model without budget is left alone."""
    budget, over = getattr(model, "budget", None), getattr(model, "over", "image")
    try:
        yield
    finally:
        if hasattr(model, "set_compression"):
            model.set_compression(budget, over)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; each module's own mode is put back."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
