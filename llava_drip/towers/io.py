"""Towers on disk, in timm's own directory format: config.json (architecture, arguments, preprocessing) + model.safetensors."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import timm
import torch
from safetensors import safe_open
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer

from llava_drip.cli import one_line
from llava_drip.towers import pretrained
from llava_drip.towers.contract import TOWERS, check_tower
from llava_drip.towers.directories import TOWER_FILES, tower_directory

_ANEW = "copy the tower's directory anew, or save it again with save_tower"


def save_tower(tower: torch.nn.Module, directory: str | Path, mean: tuple[float, ...], std: tuple[float, ...]) -> Path:
    """Write a timm-registered tower so that `load_tower(directory)` and `timm.create_model("local-dir:...")` read it back.

    A token budget of set_compression is kept, unless it names one for each image of a batch.

    A tower that is there already stays until the new one is whole.

    mean, std: the pixel normalisation it was trained with.
    """
    directory = Path(directory)
    # Also where there is none: timm remembers by itself the arguments that a tower was made with.
    budget = _budget_arguments(tower) if hasattr(tower, "budget") else {}
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=directory) as partial:
        save_for_hf(
            tower,
            partial,
            model_args=_arguments(tower) | budget,
            model_config={"pretrained_cfg": {"mean": list(mean), "std": list(std), **_input_size(tower)}},
            safe_serialization=True,
        )
        # config.json first away and last back: the weights of one tower never stand beside the configuration of another.
        (directory / "config.json").unlink(missing_ok=True)
        for name in ("model.safetensors", "config.json"):
            readable_as_usual(Path(partial, name))
            os.replace(Path(partial, name), directory / name)
    return directory


def readable_as_usual(path: Path) -> None:
    """The mode of a file that anyone makes here: safetensors writes its own for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def load_tower(
    name_or_directory: str, *, num_classes: int = 0, any_model: bool = False, **arguments
) -> torch.nn.Module:
    """A tower: from a directory that save_tower wrote, or the folder of a run that did; by a name of this package
    (drip_base_patch16_224, say), with random weights; or a pretrained plain ViT of timm, open_clip or Hugging Face, by name or
    directory (pretrained.py).

    num_classes: 0 for a tower without classifier; the saved one is kept where it has as many classes, else it starts anew.
    any_model: timm's own names and directories give timm's own models, which make no TokenBatch, by name with random weights.
    arguments: timm arguments over the recorded ones (compression, pool_after, img_size, ...). Another compression also lifts a
        saved token budget, which belongs to the old one.
    Raises:
        ValueError: neither a directory nor a known name; a directory that lacks a file, or whose file, named, is damaged
            or does not fit the other; or a model that is no tower (towers/contract.py), as timm's own are not.
    """
    name_or_directory = str(name_or_directory)
    path = Path(name_or_directory).expanduser()
    if pretrained.is_pretrained_name(name_or_directory):
        return pretrained.load_pretrained(name_or_directory, num_classes=num_classes, **arguments)
    if path.is_dir():
        try:
            path = tower_directory(name_or_directory)  # a run's folder holds its tower in one below
        except ValueError:
            missing = [name for name in TOWER_FILES if not (path / name).is_file()]
            raise ValueError(f"{path}: not a tower directory, {' and '.join(missing)} missing") from None
        _check_files(path)
        name = f"local-dir:{path}"
    elif timm.is_model(name_or_directory):
        name = name_or_directory
        if not any_model and pretrained.is_timm_vit(name):
            return pretrained.load_pretrained(name, num_classes=num_classes, **arguments)
    else:
        raise ValueError(f"{name_or_directory}: neither a tower directory nor a model name that timm knows")
    try:
        tower = timm.create_model(name, pretrained=path.is_dir(), num_classes=num_classes, **arguments)
    except Exception as error:  # timm and the tower each raise their own
        raise ValueError(_reason(error, name_or_directory, path, arguments)) from error
    if not any_model and type(tower) is VisionTransformer:
        return pretrained.load_pretrained(name_or_directory, num_classes=num_classes, **arguments)
    if not any_model:
        check_tower(tower, name_or_directory)
    if "compression" in arguments and "budget" not in arguments and hasattr(tower, "set_compression"):
        tower.set_compression(None)
    return tower


def _check_files(path: Path) -> None:
    """ValueError naming the file of a tower directory that cannot be read, or an architecture that timm does not know."""
    config, weights = (path / name for name in TOWER_FILES)
    try:
        recorded = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config}: not valid JSON ({error}); {_ANEW}") from error
    if not isinstance(recorded, dict) or not isinstance(recorded.get("architecture"), str):
        raise ValueError(f"{config}: must be an object that names an 'architecture'; {_ANEW}")
    if not timm.is_model(recorded["architecture"]):
        raise ValueError(
            f"{config}: architecture {recorded['architecture']!r} is no model that timm knows; give {TOWERS}, or {_ANEW}"
        )
    for key in ("model_args", "pretrained_cfg"):
        if not isinstance(recorded.get(key, {}), dict):
            raise ValueError(f"{config}: {key!r} must be an object; {_ANEW}")
    try:
        with safe_open(weights, framework="pt"):  # the header says how long the file must be
            pass
    except Exception as error:  # safetensors' own, which is no OSError nor ValueError
        raise ValueError(f"{weights}: cannot be read ({one_line(error, 240)}); {_ANEW}") from error


def _reason(error: Exception, name: str, path: Path, arguments: dict) -> str:
    """One line: which of the files, both readable, is wrong; or what is with the name."""
    config, weights = (path / file for file in TOWER_FILES)
    given = " with " + ", ".join(f"{key}={value!r}" for key, value in arguments.items()) if arguments else ""
    if not path.is_dir():
        known, _, tag = name.partition(".")
        if tag and "pretrained tag" in str(error):
            return f"{name}: timm knows no pretrained weights {tag!r} for {known} ({one_line(error, 240)}); leave out '.{tag}'"
        return f"{name}{given}: cannot be made: {one_line(error, 240)}"
    try:
        timm.create_model(f"local-dir:{path}", num_classes=0, **arguments)
    except Exception:  # without the weights too
        pass
    else:
        return f"{weights}: not the weights of the tower in {config}{given} ({one_line(error, 240)}); {_ANEW}"
    return f"{config}{given}: makes no tower: {one_line(error, 240)}; mend it, or {_ANEW}"


def budget_of(tower: torch.nn.Module) -> float | None:
    """The one token budget (patches per token) that set_compression gave a tower; None: none, or one for each image."""
    budget = getattr(tower, "budget", None)
    return None if budget is None or torch.as_tensor(budget).ndim else float(budget)


def _budget_arguments(tower: torch.nn.Module) -> dict:
    """timm arguments for the budget that set_compression gave a tower, and over what it is shared."""
    budget = budget_of(tower)
    return {"budget": budget, "over": "image" if budget is None else getattr(tower, "over", "image")}


def _arguments(tower: torch.nn.Module) -> dict:
    """timm arguments that rebuild the tower, without the budget, which set_compression may have changed."""
    return {key: value for key, value in getattr(tower, "model_args", {}).items() if key not in ("budget", "over")}


def _input_size(tower: torch.nn.Module) -> dict:
    """The size that the tower has, which need not be its preset's."""
    size = getattr(getattr(tower, "patch_embed", None), "img_size", None)
    return {} if size is None else {"input_size": [3, *size]}


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
