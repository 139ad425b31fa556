"""Pretrained plain ViTs of timm, open_clip and Hugging Face as towers, by name or directory; load_tower comes here for them.

from llava_drip.towers.io import load_tower
tower = load_tower("ViT-B-32/laion2b_s34b_b79k")       # plain_vit_base_patch32_224 with open_clip's weights
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from llava_drip.towers.convert import read_dense
from llava_drip.towers.directories import is_foreign_directory
from llava_drip.towers.open_models import HUB_ID, SCHEMES, open_clip_tag, open_model
from llava_drip.towers.plain import PLAIN_PRESETS
from llava_drip.towers.rebuild import check_free, nearest, rebuild
from llava_drip.towers.vit import PackedVisionTransformer


def is_pretrained_name(name: str) -> bool:
    """Whether a name means weights that are not in timm's format: open_clip:MODEL/TAG, MODEL/TAG, hf-hub:ID, ORGANISATION/NAME
    of the Hub, or a directory in open_clip's or Hugging Face's format. What is there need not exist."""
    path = Path(name).expanduser()
    if path.is_dir():
        return is_foreign_directory(path)
    if name.startswith(SCHEMES):
        return True
    if (
        "/" not in name or Path(name).expanduser().parent.is_dir()
    ):  # a folder's name mistyped, not to be sought on the Hub
        return False
    return open_clip_tag(name) or bool(re.fullmatch(HUB_ID, name))


def is_timm_vit(name: str) -> bool:
    """Whether a name is timm's own for a plain ViT, of which pretrained weights make a tower."""
    with torch.device("meta"):
        return type(timm.create_model(name.partition(".")[0])) is VisionTransformer


def load_pretrained(source: str, *, num_classes: int = 0, **arguments: Any) -> PackedVisionTransformer:
    """A plain tower with the weights of a dense ViT, in eval mode; compared with the original on one picture.

    Args:
        source: as convert.convert takes it, but no model in memory.
        num_classes: 0 for a tower without classifier (or CLIP's projection, which is one here); the original's is kept where it
            has as many outputs, else it starts anew.
        arguments: img_size, to which positions are interpolated; timm's drop_path_rate and the like.
    Raises:
        ValueError: no such source, files that are missing or damaged, a model that is no plain ViT, or an argument that it
            decides.
    """
    try:
        check_free(arguments)
        dense = read_dense(open_model(source))
        if dense.architecture is not None:
            raise ValueError("a tower of this package: download it and name its directory")
        name, own = nearest(dense, PLAIN_PRESETS, {"class_token": True, "global_pool": "token"})
        tower = rebuild(dense, name, own, arguments)
    except ValueError as error:
        raise error if str(error).startswith(source) else ValueError(f"{source}: {error}") from error
    if num_classes != tower.num_classes:
        tower.reset_classifier(num_classes)
    return tower
