"""Towers on disk, in timm's own directory format: config.json (architecture, arguments, preprocessing) + model.safetensors."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from timm.models import save_for_hf

TOWER_FILES = ("config.json", "model.safetensors")


def save_tower(tower: torch.nn.Module, directory: str | Path, mean: tuple[float, ...], std: tuple[float, ...]) -> Path:
    """Write a timm-registered tower so that `load_tower(directory)` and `timm.create_model("local-dir:...")` read it back.

    mean, std: the pixel normalisation it was trained with.
    """
    directory = Path(directory)
    save_for_hf(
        tower,
        str(directory),
        model_args=getattr(tower, "model_args", {}),
        model_config={"pretrained_cfg": {"mean": list(mean), "std": list(std)}},
        safe_serialization=True,
    )
    return directory


def load_tower(name_or_directory: str, **arguments) -> torch.nn.Module:
    """A tower without its classifier, from a directory that save_tower wrote or, by timm name, with random weights.

    arguments: timm arguments over the recorded ones (compression, pool_after, img_size, ...).
    Raises:
        ValueError: neither a directory nor a registered name; or a directory that lacks a file.
    """
    path = Path(name_or_directory).expanduser()
    if path.is_dir():
        missing = [name for name in TOWER_FILES if not (path / name).is_file()]
        if missing:
            raise ValueError(f"{path}: not a tower directory, {' and '.join(missing)} missing")
        name = f"local-dir:{path}"
    elif timm.is_model(name_or_directory):
        name = name_or_directory
    else:
        raise ValueError(f"{name_or_directory}: neither a tower directory nor a model name that timm knows")
    return timm.create_model(name, pretrained=path.is_dir(), num_classes=0, **arguments)


def describe_tower(tower: torch.nn.Module) -> dict:
    """What rebuilds the tower and prepares its pixels: architecture, model_args, image_size, mean, std."""
    cfg = tower.pretrained_cfg
    return {
        "architecture": cfg["architecture"],
        "model_args": dict(getattr(tower, "model_args", {})),
        "image_size": tower.patch_embed.img_size[0],
        "mean": list(cfg["mean"]),
        "std": list(cfg["std"]),
    }
