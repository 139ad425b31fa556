"""Towers on disk, in timm's own directory format: config.json (architecture, arguments, preprocessing) + model.safetensors."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from timm.models import save_for_hf

from llava_drip.towers.contract import check_tower

TOWER_FILES = ("config.json", "model.safetensors")


def save_tower(tower: torch.nn.Module, directory: str | Path, mean: tuple[float, ...], std: tuple[float, ...]) -> Path:
    """Write a timm-registered tower so that `load_tower(directory)` and `timm.create_model("local-dir:...")` read it back.

    A token budget of set_compression is kept, unless it names one for each image of a batch.

    mean, std: the pixel normalisation it was trained with.
    """
    directory = Path(directory)
    # Also where there is none: timm remembers by itself the arguments that a tower was made with.
    budget = {"budget": budget_of(tower)} if hasattr(tower, "budget") else {}
    save_for_hf(
        tower,
        str(directory),
        model_args=_arguments(tower) | budget,
        model_config={"pretrained_cfg": {"mean": list(mean), "std": list(std)}},
        safe_serialization=True,
    )
    return directory


def load_tower(name_or_directory: str, **arguments) -> torch.nn.Module:
    """A tower without its classifier, from a directory that save_tower wrote or, by timm name, with random weights.

    arguments: timm arguments over the recorded ones (compression, pool_after, img_size, ...). Another compression also lifts a
        saved token budget, which belongs to the old one.
    Raises:
        ValueError: neither a directory nor a registered name; a directory that lacks a file; or a model that is no tower
            (towers/contract.py), as timm's own are not.
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
    tower = timm.create_model(name, pretrained=path.is_dir(), num_classes=0, **arguments)
    check_tower(tower, name_or_directory)
    if "compression" in arguments and "budget" not in arguments and hasattr(tower, "set_compression"):
        tower.set_compression(None)
    return tower


def budget_of(tower: torch.nn.Module) -> float | None:
    """The one token budget (patches per token) that set_compression gave a tower; None: none, or one for each image."""
    budget = getattr(tower, "budget", None)
    return None if budget is None or torch.as_tensor(budget).ndim else float(budget)


def _arguments(tower: torch.nn.Module) -> dict:
    """timm arguments that rebuild the tower, without the budget, which set_compression may have changed."""
    return {key: value for key, value in getattr(tower, "model_args", {}).items() if key != "budget"}


def describe_tower(tower: torch.nn.Module) -> dict:
    """What rebuilds the tower and prepares its pixels: architecture, model_args, image_size, mean, std, and its budget if any."""
    cfg, budget = tower.pretrained_cfg, budget_of(tower)
    return {
        "architecture": cfg["architecture"],
        "model_args": _arguments(tower),
        "image_size": tower.patch_embed.img_size[0],
        "mean": list(cfg["mean"]),
        "std": list(cfg["std"]),
        **({} if budget is None else {"budget": budget}),
    }
