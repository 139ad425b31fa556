"""Models by name, with their weights: directories in the formats of timm, open_clip and Hugging Face, timm names, open_clip
tags, and repositories of the Hugging Face Hub. Each is loaded by its own library.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import nn

from llava_drip.cli import one_line
from llava_drip.towers.directories import RUN_TOWERS

SOURCES = (
    "a directory (in timm's, open_clip's or Hugging Face's format, or a run's folder), a timm name, open_clip:MODEL/TAG, "
    "or hf-hub:ID"
)
SCHEMES = ("open_clip:", "hf-hub:")  # MODEL/TAG and ID are known without them too
HUB_ID = r"[\w.-]+/[\w.-]+"
PREPROCESSING = ("preprocessor_config.json", "processor_config.json")
CLIP_TYPES = ("clip", "clip_vision_model")


def open_model(source: str) -> nn.Module:
    """The model that a name of `convert` means, with its weights."""
    path = Path(source).expanduser()
    library, _, rest = source.partition(":")
    if path.is_dir():
        return _open_directory(path)
    if library == "open_clip" and rest:
        return _open_clip(rest)
    if library == "hf-hub" and rest:
        return _open_hub(rest)
    if timm.is_model(source.partition(".")[0]):
        return _timm(source)
    if open_clip_tag(source):
        return _open_clip(source)
    if re.fullmatch(HUB_ID, source):
        try:
            return _open_hub(source)
        except ValueError as error:
            raise ValueError(f"{source}: neither {SOURCES}: {error}") from error
    raise ValueError(f"{source}: neither {SOURCES}")


def open_clip_tag(name: str) -> bool:
    """Whether a name is MODEL/TAG with a model that open_clip knows."""
    import open_clip

    model, slash, _ = name.partition("/")
    return bool(slash) and model in open_clip.list_models()


def _open_directory(path: Path) -> nn.Module:
    places = [path, *(path / name for name in RUN_TOWERS)]
    for place in places:
        if (place / "open_clip_config.json").is_file():
            return _open_clip(f"local-dir:{place}")
        if (place / "config.json").is_file():
            return _by_config(place / "config.json", str(place), f"local-dir:{place}")
    raise ValueError(f"{path}: no model: config.json (timm, Hugging Face) or open_clip_config.json is missing")


def _open_hub(repository: str) -> nn.Module:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    # Where a repository has both, open_clip's has the CLIP's projection, and timm's has not.
    reachable = True
    for file in ("open_clip_config.json", "config.json"):
        try:
            config = Path(hf_hub_download(repository, file, local_files_only=not reachable))
        except LocalEntryNotFoundError:  # not in the cache, and the Hub cannot be asked
            reachable = False
        except EntryNotFoundError:
            pass
        except Exception as error:  # no such repository, no permission: each has its own
            raise ValueError(f"hf-hub:{repository}: {one_line(error, 200)}") from error
        else:
            if file == "open_clip_config.json":
                return _open_clip(f"hf-hub:{repository}")
            return _by_config(config, repository, f"hf-hub:{repository}")
    if not reachable:
        raise ValueError(f"hf-hub:{repository}: not in the cache, and the Hub cannot be reached")
    raise ValueError(f"hf-hub:{repository}: no config.json or open_clip_config.json in it")


def _by_config(config: Path, identifier: str, timm_name: str) -> nn.Module:
    """config.json: timm's names an architecture, Hugging Face's a model_type."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{config}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{config}: must be a JSON object")
    if "architecture" in content:
        return _timm(timm_name)
    if content.get("model_type") in CLIP_TYPES:
        return _hugging_face(identifier, content["model_type"])
    raise ValueError(
        f"{config}: is of model_type {content.get('model_type')!r}; of Hugging Face's models {' and '.join(CLIP_TYPES)} are taken"
    )


def _timm(name: str) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True)
    except Exception as error:  # timm, torch and the hub each raise their own
        place = name.removeprefix("local-dir:")
        raise ValueError(f"{place}: cannot be loaded by timm: {one_line(error, 300)}") from error


def _open_clip(name: str) -> nn.Module:
    import open_clip

    if re.match(r"(local-dir|hf-hub):", name):
        model, tag = name, None
    else:
        model, _, tag = name.partition("/")
        name = f"open_clip:{name}"
        if not tag:
            tags = open_clip.list_pretrained_tags_by_model(model)
            some = f"one of {', '.join(tags)}" if tags else "a file (no tag of this model is known)"
            raise ValueError(f"{name}: name the weights too, {name}/TAG; TAG is {some}")
    try:
        return open_clip.create_model(model, pretrained=tag, require_pretrained=True)
    except Exception as error:  # as timm's
        place = name.removeprefix("local-dir:")
        raise ValueError(f"{place}: cannot be loaded by open_clip: {one_line(error, 300)}") from error


def _hugging_face(identifier: str, model_type: str) -> nn.Module:
    from transformers import CLIPConfig, CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

    try:
        if model_type == "clip":
            both = CLIPConfig.from_pretrained(identifier)
            config = copy.deepcopy(both.vision_config)
            config.projection_dim = both.projection_dim  # the one that counts in a CLIPModel
        else:
            config = CLIPVisionConfig.from_pretrained(identifier)
        options = {"config": config, "dtype": torch.float32, "output_loading_info": True}
        model, info = CLIPVisionModelWithProjection.from_pretrained(identifier, **options)
        missing = set(info["missing_keys"])
        if missing == {"visual_projection.weight"}:  # a CLIPVisionModel
            model, info = CLIPVisionModel.from_pretrained(identifier, **options)
            missing = set(info["missing_keys"])
    except Exception as error:
        raise ValueError(f"{identifier}: cannot be loaded by transformers: {one_line(error, 300)}") from error
    wrong = missing | {key for key, *_ in info.get("mismatched_keys", ())}
    if wrong:
        raise ValueError(f"{identifier}: weights missing, or of another shape: {', '.join(sorted(wrong)[:5])}")
    model.image_preprocessing = _hf_preprocessing(identifier)
    return model


def _hf_preprocessing(identifier: str) -> dict:
    """timm's names for what preprocessor_config.json (or processor_config.json) says; nothing where there is neither.

    Raises:
        ValueError: it cannot be read, or does not say what pictures are normalised with.
    """
    from transformers import CLIPImageProcessor

    try:
        processor = CLIPImageProcessor.from_pretrained(identifier)
        crop, side = (processor.crop_size or {}).get("height"), (processor.size or {}).get("shortest_edge")
        return {
            "mean": tuple(map(float, processor.image_mean)),
            "std": tuple(map(float, processor.image_std)),
            "crop_pct": crop / side if crop and side else 1.0,
            "interpolation": Image.Resampling(processor.resample).name.lower(),
        }
    except Exception as error:  # transformers' own, and what a damaged file leads to
        files = [file for name in PREPROCESSING if (file := _hf_file(identifier, name)) is not None]
        if not files:
            return {}
        raise ValueError(f"{files[0]}: cannot be read ({one_line(error, 200)})") from error


def _hf_file(identifier: str, name: str) -> Path | None:
    """A file of a directory, or of a repository of the Hub that is in the cache, as all are that were asked for; or None."""
    from huggingface_hub import try_to_load_from_cache

    if Path(identifier).is_dir():
        path = Path(identifier) / name
        return path if path.is_file() else None
    path = try_to_load_from_cache(identifier, name)
    return Path(path) if isinstance(path, str) else None
