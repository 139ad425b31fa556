"""A trained checkpoint back as a CLIP, or as its bare tower."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import open_clip
from open_clip.factory import LOCAL_DIR_PREFIX
from torch import nn

from llava_drip.cli import one_line
from llava_drip.contrastive import register
from llava_drip.contrastive.model import tower_of

CONFIG_NAME = "open_clip_config.json"  # open_clip's name for a model's architecture and preprocessing
WEIGHTS_NAME = "open_clip_model.safetensors"  # and for its weights
# What a run's flags may override: key in its configuration → argument of open_clip.create_model_and_transforms.
PREPROCESSING = {name: f"image_{name}" for name in ("mean", "std", "interpolation", "resize_mode")}
SIZES = {("vision_cfg", "image_size"): "force_image_size", ("text_cfg", "context_length"): "force_context_length"}


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file that `path` names: a file, a run's folder, or its checkpoints/ folder.

    In a folder: epoch_latest.pt (--save-most-recent) or the epoch_N.pt of the highest N, whichever was written last; else
    open_clip_model.safetensors.

    Raises:
        ValueError: nothing there.
    """
    path = Path(path)
    if path.is_file():
        return path
    for folder in (path, path / "checkpoints"):
        epochs = {int(m[1]): f for f in folder.glob("epoch_*.pt") if (m := re.fullmatch(r"epoch_(\d+)\.pt", f.name))}
        found = [latest] if (latest := folder / "epoch_latest.pt").is_file() else []
        found += [epochs[max(epochs)]] if epochs else []
        if found:
            return max(found, key=lambda file: file.stat().st_mtime_ns)
    if (path / WEIGHTS_NAME).is_file():
        return path / WEIGHTS_NAME
    raise ValueError(f"{path}: no such checkpoint file, nor a training run's folder with checkpoints/epoch_*.pt in it")


def load_clip(checkpoint: str | Path, model_name: str | None = None, device: str = "cpu") -> tuple[nn.Module, Callable]:
    """An open_clip model with a checkpoint's weights, in eval mode, and its evaluation transform (PIL → [3, h, w]).

    The image size, mean, std, resizing and context length are those of the run where its open_clip_config.json lies
    beside the checkpoint or one folder up, else those of the named model.

    Args:
        checkpoint: a file the trainer wrote (read with weights_only=True), or a run's folder.
        model_name: e.g. "DRIP-B-16-4x". None: the model that the run's open_clip_config.json describes.
    Raises:
        ValueError: no such model or checkpoint, or one that does not fit the other.
    """
    register()
    path = find_checkpoint(checkpoint)
    source, overrides = _architecture(path, model_name)
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it would warn of random weights, which are about to be replaced
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            source, load_weights=False, device=device, pretrained_text=False, **overrides
        )
    finally:
        logging.disable(disabled)
    try:
        open_clip.load_checkpoint(model, str(path), weights_only=True)
    except Exception as error:  # torch and open_clip raise as many kinds as there are files that are something else
        raise ValueError(f"{path}: not a checkpoint of {model_name or source}: {one_line(error, 300)}") from error
    return model.eval(), transform


def load_tokenizer(checkpoint: str | Path, model: nn.Module, model_name: str | None = None) -> Callable:
    """The tokenizer (list of texts → [n, context] token ids) for what load_clip returned for the same arguments."""
    source, _ = _architecture(find_checkpoint(checkpoint), model_name)
    return open_clip.get_tokenizer(source, context_length=model.context_length)


def _architecture(checkpoint: Path, model_name: str | None) -> tuple[str, dict]:
    """What open_clip.create_model_and_transforms is called with: the model's name, and the settings of the run."""
    folder, run = _run_config(checkpoint)
    if model_name is None:
        if folder is None:
            raise ValueError(f"{checkpoint}: no {CONFIG_NAME} beside it or one folder up; name the model")
        if "model_cfg" not in run:
            raise ValueError(f"{folder / CONFIG_NAME}: describes no model (model_cfg); name the model")
        size = run["model_cfg"].get("vision_cfg", {}).get("image_size")
        return f"{LOCAL_DIR_PREFIX}{folder}", {"force_image_size": size}  # open_clip tells it to no timm tower
    config = open_clip.get_model_config(model_name)
    if config is None:
        raise ValueError(f"no model {model_name!r}; open_clip.list_models() names all")
    preprocessing = run.get("preprocess_cfg", {})
    overrides = {flag: preprocessing[key] for key, flag in PREPROCESSING.items() if key in preprocessing}
    for (room, key), flag in SIZES.items():
        value = run.get("model_cfg", {}).get(room, {}).get(key)
        if value is not None and value != config[room].get(key):
            overrides[flag] = value
    return model_name, overrides


def load_clip_tower(checkpoint: str | Path, model_name: str | None = None) -> tuple[nn.Module, dict]:
    """The bare timm tower of a CLIP checkpoint, without the projection into the CLIP space.

    Returns:
        The tower in eval mode on the CPU, and the pixels it was trained on: {"image_size": (height, width),
        "mean": [3 floats], "std": [3 floats]}.
    Raises:
        ValueError: as load_clip; or the model's image tower makes no TokenBatch.
    """
    model, _ = load_clip(checkpoint, model_name)
    tower = tower_of(model)
    if tower is None:
        raise ValueError(
            f"{model_name or checkpoint}: its image tower makes no TokenBatch; use one of the DRIP-* models"
        )
    preprocessing = model.visual.preprocess_cfg
    return tower, {
        "image_size": tuple(model.visual.image_size),
        "mean": list(preprocessing["mean"]),
        "std": list(preprocessing["std"]),
    }


def _run_config(checkpoint: Path) -> tuple[Path | None, dict]:
    """The folder with the run's open_clip_config.json, and what it holds."""
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        path = folder / CONFIG_NAME
        if path.is_file():
            try:
                config = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: not valid JSON ({error})") from error
            if not isinstance(config, dict):
                raise ValueError(f"{path}: not a JSON object")
            return folder, config
    return None, {}
