"""What is measured: a model from a specification, its size, its tokens, and what an image costs it.

A specification is what a command line says of one tower: a timm name, the directory of a tower or the folder of a run, or a
pretrained ViT (towers/pretrained.py), and after it, in the same word, arguments: "drip_base_patch16_224 compression=10".
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from timm.layers import to_2tuple
from torch import nn

from llava_drip import towers
from llava_drip.cli import key_values, one_line
from llava_drip.images import load_image
from llava_drip.measure.counting import Count, count
from llava_drip.measure.flops import has_plain_blocks, tower_macs
from llava_drip.measure.grouping import senatra_macs
from llava_drip.towers.directories import tower_directory
from llava_drip.towers.inputs import input_size, prepare
from llava_drip.towers.io import load_tower

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


@dataclass(frozen=True)
class Subject:
    """label: what tables call it. name: of the model, or its place. arguments: timm's."""

    label: str
    name: str
    arguments: dict

    @classmethod
    def parse(cls, specification: str, label: str | None = None) -> Subject:
        """ValueError: no name, or an argument that is not KEY=VALUE."""
        words = shlex.split(specification)
        if not words:
            raise ValueError("an empty word names no tower")
        return cls(label or specification, words[0], key_values(words[1:], specification))

    def make(self, num_classes: int = 1000, img_size: int | None = None) -> nn.Module:
        """The model, in eval mode; random weights from seed 0 where it is a name without weights.

        img_size: pixels of a side, where the arguments do not say; None: its own.
        Raises:
            ValueError: no such model, an argument or a size that it does not take.
        """
        torch.manual_seed(0)
        directory = tower_directory(self.name)
        arguments = {**({} if img_size is None else {"img_size": img_size}), **self.arguments}
        options = {"num_classes": num_classes, "any_model": True}
        place = str(directory or self.name)
        try:
            model = load_tower(place, **options, **arguments).eval()
        except ValueError as error:
            if "img_size" not in arguments or "img_size" not in str(error):
                raise
            arguments.pop("img_size")  # a CNN takes any size, and no such argument
            model = load_tower(place, **options, **arguments).eval()
        asked = img_size if (own := self.arguments.get("img_size")) is None else own
        if asked is None or input_size(model)[1:] == (size := to_2tuple(asked)):
            return model
        # It does not tell its size, so measurements go by its configuration.
        model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "input_size": (3, *size)}
        try:
            with torch.inference_mode():
                model(torch.zeros(1, 3, *size))
        except Exception as error:  # the model's own
            raise ValueError(f"{self.name}: takes no pictures of {asked} pixels: {one_line(error)}") from error
        return model


def presets(pattern: str = "*") -> list[str]:
    """The timm names of this package's own towers."""
    own = f"{towers.__name__}."
    return [name for name in timm.list_models(pattern) if timm.model_entrypoint(name).__module__.startswith(own)]


def check_closed_form(model: nn.Module, found: Count) -> float | None:
    """The closed form's MACs for what was counted, None where there is none. Both are computed from the same sizes in two ways:
    that they agree is an invariant."""
    if not has_plain_blocks(model):
        return None
    closed = tower_macs(model, found.tokens if isinstance(model, towers.Drip) and not model.is_dense else None)
    assert abs(closed - found.products) < 0.01 * closed, f"counted {found.products:.4g}, in closed form {closed:.4g}"
    return closed


def describe(model: nn.Module) -> dict:
    """What one image costs, boundaries at the tower's own compression exactly; GMACs are 1e9 multiply-accumulates of products
    (counting.py).

    Returns:
        {"parameters", "image_size": (height, width), "tokens", "gmacs", "gmacs_without_attention", "gmacs_without_grouping": of a
        SeNaTra, and attention within its windows alone, else None, "gmacs_other", "gmacs_closed_form"}
    """
    found = count(model)
    closed = check_closed_form(model, found)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image_size": list(input_size(model)[1:]),
        "tokens": found.tokens,
        "gmacs": found.products / 1e9,
        "gmacs_without_attention": (found.products - found.attention) / 1e9,
        "gmacs_without_grouping": _without_grouping(model),
        "gmacs_other": found.other / 1e9,
        "gmacs_closed_form": None if closed is None else closed / 1e9,
    }


def _without_grouping(model: nn.Module) -> float | None:
    if not isinstance(model, towers.Senatra):
        return None
    parts = senatra_macs(model)
    return (sum(parts.values()) - parts["grouping"]) / 1e9


# Over given images


def find_images(folder: str | Path, most: int) -> list[Path]:
    """The first `most` pictures below a folder, by name. ValueError: no folder, or none in it."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of images")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES and path.is_file())
    if not found:
        raise ValueError(f"{folder}: no image in it ({', '.join(IMAGES)})")
    return found[:most]


def over_images(
    model: nn.Module, paths: Sequence[Path], progress: Callable[[Iterable[Path]], Iterable[Path]] = iter
) -> dict:
    """What these images cost, each counted by itself, where the image decides unless a budget was asked of the tower.

    Returns:
        {"images": how many, "tokens", "tokens_p5", "tokens_p95" (None where there are none), "gmacs": mean, "gmacs_p5",
        "gmacs_p95"}
    """
    found = [count(model, prepare(model, load_image(path))[1]) for path in progress(paths)]
    products = [one.products / 1e9 for one in found]
    result = {"images": len(found), "gmacs": float(np.mean(products))}
    result |= {f"gmacs_p{q}": float(np.percentile(products, q)) for q in (5, 95)}
    counted = None not in [one.tokens for one in found]
    tokens = [one.tokens for one in found] if counted else [np.nan]
    values = [float(np.mean(tokens)), *(float(np.percentile(tokens, q)) for q in (5, 95))]
    return result | dict(zip(("tokens", "tokens_p5", "tokens_p95"), values if counted else [None] * 3))
