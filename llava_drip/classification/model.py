"""A tower (or any timm model) with a classifier: built, loaded, frozen, wrapped so that one forward gives what a step needs."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llava_drip.cli import key_values, merged, one_line
from llava_drip.towers.contract import lacks_of_tower
from llava_drip.towers.directories import tower_directory
from llava_drip.towers.io import load_tower
from llava_drip.towers.pretrained import is_pretrained_name


def create(args: Namespace, num_classes: int) -> nn.Module:
    """The model that the flags name, with `num_classes` outputs and the weights they ask for.

    Raises:
        ValueError: no such model, weights that do not fit, or an argument that it does not take.
    """
    arguments = _arguments(args)
    if Path(args.model).expanduser().is_dir() or is_pretrained_name(args.model):
        what = "a directory" if Path(args.model).expanduser().is_dir() else "a pretrained model"
        for flag in ("pretrained", "initial_checkpoint"):
            if getattr(args, flag):
                raise ValueError(f"--{flag.replace('_', '-')}: --model {args.model} is {what} with weights of its own")
    if args.initial_checkpoint and not Path(args.initial_checkpoint).expanduser().is_file():
        raise ValueError(f"--initial-checkpoint: no file {args.initial_checkpoint}")
    weights = {"pretrained": args.pretrained, "initial_checkpoint": args.initial_checkpoint}
    try:
        return build(args.model, arguments, num_classes, img_size=args.img_size, **weights)
    except ValueError as error:
        raise ValueError(f"--model: {error}") from error


def build(
    name: str,
    arguments: dict,
    num_classes: int,
    *,
    img_size: int | None = None,
    pretrained: bool = False,
    initial_checkpoint: str | None = None,
) -> nn.Module:
    """A model by timm's name, from a tower's directory or a run's folder, or a pretrained plain ViT (towers/pretrained.py).

    Args:
        arguments: timm arguments.
        img_size: pixels of a side, also for models that take no such argument. None: the model's own.
        pretrained, initial_checkpoint: of a timm name: its pretrained weights, or a file of weights.
    Raises:
        ValueError: no such model, weights that do not fit, or an argument that it does not take; names no flag.
    """
    for key in ("num_classes", "pretrained"):
        if key in arguments:
            raise ValueError(f"{name}: {key} is no argument to give: it follows from data and flags")
    directory = tower_directory(name)
    if directory is not None or is_pretrained_name(name):
        assert not pretrained and not initial_checkpoint
        place = str(directory or name)
        return _at_size(partial(load_tower, place, num_classes=num_classes, any_model=True, **arguments), img_size)
    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(f"{name} is neither a directory nor a model name that timm knows (timm.list_models)")
    overlay = {}
    if initial_checkpoint:
        # timm's own reader: other naming schemes are translated, positions interpolated.
        overlay["file"] = str(Path(initial_checkpoint).expanduser())
    make = partial(
        timm.create_model,
        name,
        pretrained=bool(pretrained or initial_checkpoint),
        num_classes=num_classes,
        **arguments,
    )
    try:
        return _at_size(make, img_size, overlay)
    except Exception as error:  # timm, torch and the hub each raise their own
        weights = f" with the weights of {initial_checkpoint}" if initial_checkpoint else ""
        raise ValueError(f"{name}{weights}: cannot be made: {one_line(error, 300)}") from error


def _at_size(make: Callable[..., nn.Module], size: int | None, overlay: dict | None = None) -> nn.Module:
    """The model for pictures of `size` pixels. Those that take any size (CNNs) have no such argument: theirs is what their
    configuration says."""
    if size is None:
        return make(pretrained_cfg_overlay=overlay) if overlay else make()
    try:
        return make(img_size=size, **({"pretrained_cfg_overlay": overlay} if overlay else {}))
    except (TypeError, ValueError) as error:
        cause = error.__cause__ or error
        if not (isinstance(cause, TypeError) and "'img_size'" in str(cause)):
            raise
    return make(pretrained_cfg_overlay={**(overlay or {}), "input_size": (3, size, size)})


def _arguments(args: Namespace) -> dict:
    """timm arguments from --model-kwargs and the flags that are such arguments."""
    arguments = key_values(args.model_kwargs, "--model-kwargs")
    merged(arguments, {"img_size": args.img_size})  # refuses it in both ways; build takes it by itself
    return merged(arguments, {"drop_path_rate": args.drop_path, "compression": args.compression})


def data_config_of(model: nn.Module) -> dict:
    """timm's input_size (3, height, width), mean, std, interpolation and crop_pct, at the size that the model has here."""
    config = resolve_model_data_config(model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return config if size is None else {**config, "input_size": (3, *size)}


class Classifier(nn.Module):
    """pixels [B, 3, h, w] → (logits [B, classes], rate loss [B] or None, tokens [B] int64 or None).

    One forward, so that DDP and FSDP see all of it. `model` is a tower, whose tokens are counted, or any timm model.

    Attributes:
        measures: names of what `measure` gives; by the first one the best epoch is chosen (higher is better).
    """

    measures: tuple[str, ...] = ("top1", "top5", "val_loss")

    def __init__(self, model: nn.Module, freeze_backbone: bool = False, name: str = ""):
        """
        Args:
            name: what people know the model by, for records.
            freeze_backbone: all but the classifier is frozen, and stays in eval mode (no drop path, no drawn boundaries).
        Raises:
            ValueError: the backbone is to be frozen, but the model names no classifier.
        """
        super().__init__()
        self.model, self.frozen, self.name = model, freeze_backbone, name
        self.is_tower = not lacks_of_tower(model)
        self.input_size: tuple[int, int] = tuple(data_config_of(model)["input_size"][1:])
        if getattr(model, "is_dense", False) and hasattr(model, "freeze_boundaries"):
            # Its predictor does not run; DistributedDataParallel would wait for its gradients.
            model.freeze_boundaries()
        if freeze_backbone:
            classifier = model.get_classifier()
            if not isinstance(classifier, nn.Module) or not list(classifier.parameters()):
                raise ValueError(f"--freeze backbone: {type(model).__name__} has no classifier of its own to train")
            model.requires_grad_(False)
            classifier.requires_grad_(True)

    @property
    def has_boundary_loss(self) -> bool:
        """Whether training has a loss of the tower's own to add (TokenBatch.rate_loss)."""
        return getattr(self.model, "has_boundary_loss", False) and not self.frozen

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    @property
    def patches(self) -> int | None:
        """Patches of one image, for towers."""
        if not self.is_tower:
            return None
        rows, columns = self.model.patch_embed.grid_size
        return rows * columns

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if mode and self.frozen:
            self.model.eval()
            self.model.get_classifier().train()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if not self.is_tower:
            return self.model(x), None, None
        tokens = self.model.forward_features(x)
        rate_loss = tokens.rate_loss if self.training and self.has_boundary_loss else None
        return self.model.forward_head(tokens), rate_loss, tokens.lengths

    def measure(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[len(measures)] fp32: sums over a batch of hits and cross-entropy. Of fewer than 5 classes top-5 is among all.

        logits: what forward gave first.
        """
        logits = logits.float()
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices.eq(labels[:, None])
        return torch.stack([hits[:, 0].sum(), hits.sum(), F.cross_entropy(logits, labels, reduction="sum")])


def frozen_hash(model: nn.Module) -> str | None:
    """SHA-256 over every frozen parameter, and every buffer of modules that do not train; None where nothing is frozen. A
    collective for a divided model."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    if not frozen:
        return None
    for prefix, module in model.named_modules():
        if not any(p.requires_grad for p in module.parameters()):
            frozen |= dict(module.named_buffers(prefix, recurse=False))
    sha = hashlib.sha256()
    for name, value in sorted(frozen.items()):
        value = value.full_tensor() if isinstance(value, DTensor) else value
        sha.update(name.encode())
        sha.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
