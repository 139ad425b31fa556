"""A dense ViT, pretrained anywhere, as a DRIP that is exactly the original at compression 1.

from llava_drip.towers.convert import convert
tower = convert("hf-hub:openai/clip-vit-large-patch14", compression=4.0)     # tower(x): the image embedding of the CLIP

Boundaries start untrained: scripts/distill_tower.py trains them, and the blocks after pooling, against the dense original.
"""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from llava_drip.cli import one_line
from llava_drip.towers.dense import PREDICTORS, Dense, read_timm
from llava_drip.towers.dense_clip import read_hf, read_open_clip
from llava_drip.towers.drip import Drip
from llava_drip.towers.open_models import open_model
from llava_drip.towers.presets import PRESETS

log = logging.getLogger(__name__)

TOLERANCE = 1e-4  # of the largest output: between the original and the tower at compression 1, in fp32


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
    for key in drip_arguments:
        if key in _DECIDED:
            raise ValueError(f"{key}={drip_arguments[key]!r}: the dense original decides it; leave it out")
    asked = {"compression": compression, **({} if pool_after is None else {"pool_after": pool_after}), **drip_arguments}
    size = asked.pop("img_size", None)
    tower = _build(dense, asked)
    _check_equal(tower, dense)
    if size is not None and size != dense.arguments.get("img_size"):
        tower = _build(dense, {**asked, "img_size": size})
    return tower


def _build(dense: Dense, asked: dict) -> Drip:
    name, arguments = _entry_point(dense, asked["compression"])
    try:
        tower = timm.create_model(name, num_classes=dense.num_classes, **{**arguments, **asked})
    except TypeError as error:  # an argument that nobody takes
        raise ValueError(f"cannot be made a {name}: {one_line(error, 200)}") from error
    input_size = (3, *tower.patch_embed.img_size)
    tower.pretrained_cfg = {**tower.pretrained_cfg, **dense.preprocessing, "input_size": input_size}
    _load(tower, checkpoint_filter_fn(dict(dense.state), tower))
    return tower.eval()


def _entry_point(dense: Dense, compression: float) -> tuple[str, dict]:
    """The entry point that is most like it, and the arguments in which it differs."""
    if dense.architecture is not None:
        return _at_rate(dense.architecture, compression), dense.arguments
    wanted = dense.arguments
    size = ("embed_dim", "patch_size", "img_size", "depth", "num_heads")

    def likeness(name: str) -> tuple:
        preset = PRESETS[name]
        named_rate = "compression" in preset
        return not named_rate, *(preset.get(key) == wanted[key] for key in size)

    name = max(PRESETS, key=likeness)
    arguments = {key: value for key, value in wanted.items() if key not in size or PRESETS[name].get(key) != value}
    defaults = {**_DEFAULTS, "fc_norm": wanted["global_pool"] == "avg"}
    return name, {key: value for key, value in arguments.items() if key not in defaults or defaults[key] != value}


# timm's arguments that make another ViT, and Drip's own; what only training feels, and the size of pictures, may be asked for.
_DECIDED = {*inspect.signature(VisionTransformer.__init__).parameters, "norm_eps", "relative"}
_DECIDED |= {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"}  # of timm.create_model
_DECIDED -= {"img_size", "dynamic_img_size", "patch_drop_rate", "drop_path_rate"}
_DECIDED -= {"drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate"}

# What no preset changes, and need not be said.
_DEFAULTS = {"class_token": False, "global_pool": "avg", "mlp_ratio": 4.0, "qkv_bias": True, "qk_norm": False}
_DEFAULTS |= {"proj_bias": True, "pos_embed": "learn", "no_embed_class": False, "reg_tokens": 0, "pre_norm": False}
_DEFAULTS |= {"final_norm": True, "act_layer": "gelu", "norm_eps": 1e-6}


def _at_rate(name: str, compression: float) -> str:
    """drip_base_patch16_224_1x → the entry point that differs in nothing but its rate, if there is one; else the same."""
    preset = {**PRESETS[name], "compression": None}
    same = [other for other in PRESETS if {**PRESETS[other], "compression": None} == preset]
    return min(same, key=lambda other: (PRESETS[other].get("compression", compression) != compression, other != name))


def _load(tower: Drip, state: dict[str, torch.Tensor]) -> None:
    """ValueError naming what is missing or left over; what a dense ViT does not have keeps its initialization."""
    own = {key: value.shape for key, value in tower.state_dict().items()}
    missing = sorted(key for key in own.keys() - state.keys() if not key.startswith(PREDICTORS))
    unexpected = sorted(state.keys() - own.keys())
    other = sorted(key for key in own.keys() & state.keys() if own[key] != state[key].shape)
    for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", other)):
        if keys:
            shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise ValueError(f"its weights do not fit a ViT: {what}: {shown}")
    tower.load_state_dict(state, strict=False)


@torch.no_grad()
def _check_equal(tower: Drip, dense: Dense) -> None:
    """ValueError where the original and the tower at compression 1 differ on a picture of noise: the original has something that
    dense.py does not know."""
    height, width = tower.patch_embed.img_size
    x = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    budget = tower.budget
    tower.set_compression(1.0)
    ours, theirs = tower(x), dense.output(x).float()
    tower.set_compression(budget)
    difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))
    if not difference <= TOLERANCE:
        raise ValueError(
            f"is no plain ViT: as a DRIP at compression 1 its outputs differ by {difference:.1e} of the largest"
        )
    log.info(f"at compression 1 the outputs differ from the original's by {difference:.1e} of the largest")
