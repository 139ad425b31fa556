"""A dense ViT, pretrained anywhere, as a DRIP that is exactly the original at compression 1.

from llava_drip.towers.convert import convert
tower = convert("hf-hub:openai/clip-vit-large-patch14", compression=4.0)     # tower(x): the image embedding of the CLIP

Boundaries start untrained: scripts/distill_tower.py trains them, and the blocks after pooling, against the dense original.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from llava_drip.towers.dense import Dense, read_timm
from llava_drip.towers.dense_clip import read_hf, read_open_clip
from llava_drip.towers.drip import Drip
from llava_drip.towers.open_models import open_model
from llava_drip.towers.presets import PRESETS
from llava_drip.towers.rebuild import check_free, nearest, rebuild


def convert(
    source: str | Path | nn.Module, /, *, compression: float = 4.0, pool_after: int | None = None, **drip_arguments: Any
) -> Drip:
    """A DRIP with the weights of a dense ViT; the boundary predictor is new.

    Args:
        source: one of
            a directory: of timm's format (a tower of this package trained at compression 1 too), open_clip's
                (open_clip_config.json) or Hugging Face's (config.json of a CLIPModel or CLIPVisionModel), or the folder of a run
                of train_imagenet.py or train_clip.py;
            a timm name, whose pretrained weights timm downloads: "vit_base_patch16_clip_224.openai";
            "open_clip:ViT-B-32/laion2b_s34b_b79k": open_clip's model and pretrained tag, or file of weights;
            "hf-hub:openai/clip-vit-large-patch14": a repository of the Hugging Face Hub in any of these formats;
            either of the last two without its "open_clip:" or "hf-hub:";
            a model in memory (see read_dense).
        compression, pool_after: of the DRIP; pool_after by default what the entry point has.
        drip_arguments: further ones of Drip (boundary, scan, elastic, ...), timm's drop_path_rate and the like, or img_size, to
            which positions are interpolated. Not what the source decides: width, depth, class token, pooling, ...
    Returns:
        The tower in eval mode. A CLIP's projection is its classifier: tower(x) is the image embedding, before it is normalised.
        Saved by io.save_tower it is rebuilt by io.load_tower; its pretrained_cfg has the original's pixel mean and std.
    Raises:
        ValueError: no such source, files that are missing or damaged, a model that is no plain ViT, or an argument that it
            decides.
    """
    name = str(source) if isinstance(source, (str, Path)) else type(source).__name__
    try:
        dense = read_dense(source if isinstance(source, nn.Module) else open_model(name))
        return to_drip(dense, compression=compression, pool_after=pool_after, **drip_arguments)
    except ValueError as error:
        raise error if str(error).startswith(name) else ValueError(f"{name}: {error}") from error


def read_dense(model: nn.Module) -> Dense:
    """The dense ViT in a model of timm, open_clip (CLIP, or its image tower alone) or transformers (CLIPModel, CLIPVisionModel,
    CLIPVisionModelWithProjection), or in a tower of this package at compression 1.

    A model of transformers may have an attribute `image_preprocessing`: of `Dense.preprocessing` what differs from CLIP's own.

    Raises:
        ValueError: another kind of model, or a ViT that differs from the plain one in a way that is named.
    """
    model = model.eval()
    if isinstance(model, VisionTransformer):
        return read_timm(model)
    if type(model).__module__.startswith("transformers."):
        return read_hf(model)
    if type(model).__module__.startswith("open_clip.") or hasattr(model, "visual"):
        return read_open_clip(model)
    raise ValueError(
        f"{type(model).__name__}: no plain ViT; a timm VisionTransformer, an open_clip CLIP or a Hugging Face CLIP is"
    )


# Dense → DRIP


def is_projection(head: nn.Module) -> bool:
    """Whether a tower's head is the projection of a CLIP, without bias, and no classifier, whose bias is learned."""
    return isinstance(head, nn.Linear) and not bool(head.bias.any())


def to_drip(dense: Dense, /, *, compression: float = 4.0, pool_after: int | None = None, **drip_arguments: Any) -> Drip:
    """`convert`, of a model that is read already."""
    check_free(drip_arguments)
    asked = {"compression": compression, **({} if pool_after is None else {"pool_after": pool_after}), **drip_arguments}
    name, arguments = _entry_point(dense, compression)
    return rebuild(dense, name, arguments, asked)


def _entry_point(dense: Dense, compression: float) -> tuple[str, dict]:
    """The entry point that is most like it, and the arguments in which it differs."""
    if dense.architecture is not None:
        return _at_rate(dense.architecture, compression), dense.arguments
    # Not those that are another ViT (rotary), nor drip_mini_*, which pools and starts otherwise.
    unnamed = {
        name: preset
        for name, preset in PRESETS.items()
        if not {"compression", "relative", "weight_init"} & preset.keys()
    }
    return nearest(dense, unnamed, {"class_token": False, "global_pool": "avg"})


def _at_rate(name: str, compression: float) -> str:
    """drip_base_patch16_224_1x → the entry point that differs in nothing but its rate: the one of that rate, else the one without
    a rate in its name; the same, where there is neither."""
    preset = {**PRESETS[name], "compression": None}
    same = [other for other in PRESETS if {**PRESETS[other], "compression": None} == preset]
    named = [other for other in same if PRESETS[other].get("compression") == compression]
    unnamed = [other for other in same if "compression" not in PRESETS[other]]
    if name in unnamed:
        return name
    return next(iter([*named, *unnamed]), name)
