"""A picture as a model sees it in evaluation: of its size, resized, cropped and normalised as its configuration says."""

from __future__ import annotations

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """(3, height, width) that a model takes: its own, where it tells, else its configuration's."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return (3, *size) if size is not None else tuple(resolve_data_config(model=model)["input_size"])


def prepare(model: nn.Module, image: Image.Image) -> tuple[Image.Image, Tensor]:
    """An RGB picture of any size as a tower or a model of timm sees it, and its normalised pixels [1, 3, height, width] fp32."""
    config = resolve_data_config({"input_size": input_size(model)}, model=model)
    keys = ("input_size", "interpolation", "crop_pct", "crop_mode")
    raw = create_transform(**{key: config[key] for key in keys}, normalize=False)(image)  # [3, height, width] uint8
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    return Image.fromarray(raw.permute(1, 2, 0).numpy()), ((raw / 255 - mean) / std)[None]
