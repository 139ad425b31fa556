"""A Dense (dense.py) as a tower of this package: the entry point most like it, its weights, the check that it is the original."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping

import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from llava_drip.cli import one_line
from llava_drip.towers.contract import budget_kept
from llava_drip.towers.dense import PREDICTORS, Dense

log = logging.getLogger(__name__)

TOLERANCE = 1e-4  # of the largest output: between the original and the tower at compression 1, in fp32
SIZE = ("embed_dim", "patch_size", "img_size", "depth", "num_heads")

# timm's arguments that make another ViT, and Drip's own; what only training feels, and the size of pictures, may be asked for.
_DECIDED = {*inspect.signature(VisionTransformer.__init__).parameters, "norm_eps", "relative"}
_DECIDED |= {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"}  # of timm.create_model
_DECIDED -= {"img_size", "dynamic_img_size", "patch_drop_rate", "drop_path_rate"}
_DECIDED -= {"drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate"}

# What no preset changes, and need not be said.
_DEFAULTS = {"mlp_ratio": 4.0, "qkv_bias": True, "qk_norm": False, "proj_bias": True, "pos_embed": "learn"}
_DEFAULTS |= {"no_embed_class": False, "reg_tokens": 0, "pre_norm": False, "final_norm": True, "act_layer": "gelu"}
_DEFAULTS |= {"norm_eps": 1e-6}


def check_free(asked: Mapping[str, object]) -> None:
    """ValueError naming an argument that the original decides."""
    for key, value in asked.items():
        if key in _DECIDED:
            raise ValueError(f"{key}={value!r}: the dense original decides it; leave it out")


def nearest(dense: Dense, presets: Mapping[str, dict], defaults: dict) -> tuple[str, dict]:
    """The entry point that is most like it, and the arguments in which it differs.

    presets: name → default arguments, sizes among them. defaults: what its entry points set beside timm's own.
    """
    wanted = dense.arguments
    name = max(presets, key=lambda name: tuple(presets[name].get(key) == wanted[key] for key in SIZE))
    arguments = {key: value for key, value in wanted.items() if key not in SIZE or presets[name].get(key) != value}
    usual = {**_DEFAULTS, **defaults, "fc_norm": wanted["global_pool"] == "avg"}
    return name, {key: value for key, value in arguments.items() if key not in usual or usual[key] != value}


def rebuild(dense: Dense, name: str, arguments: dict, asked: dict) -> nn.Module:
    """The tower of an entry point with the weights of the original, in eval mode; compared with it on one picture.

    Args:
        arguments: what makes it the original's ViT. asked: further ones; img_size interpolates positions.
    Raises:
        ValueError: an argument that it does not take, weights that do not fit, or outputs that are not the original's.
    """
    asked = dict(asked)
    size = asked.pop("img_size", None)
    tower = _build(dense, name, {**arguments, **asked})
    _check_equal(tower, dense)
    if size is not None and size != dense.arguments.get("img_size"):
        tower = _build(dense, name, {**arguments, **asked, "img_size": size})
    return tower


def _build(dense: Dense, name: str, arguments: dict) -> nn.Module:
    try:
        tower = timm.create_model(name, num_classes=dense.num_classes, **arguments)
    except TypeError as error:  # an argument that nobody takes
        raise ValueError(f"cannot be made a {name}: {one_line(error, 200)}") from error
    input_size = (3, *tower.patch_embed.img_size)
    tower.pretrained_cfg = {**tower.pretrained_cfg, **dense.preprocessing, "input_size": input_size}
    _load(tower, checkpoint_filter_fn(dict(dense.state), tower))
    return tower.eval()


def _load(tower: nn.Module, state: dict[str, Tensor]) -> None:
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
def _check_equal(tower: nn.Module, dense: Dense) -> None:
    """ValueError where the original and the tower (at compression 1, where it has one) differ on a picture of noise: the original
    has something that dense.py does not know."""
    height, width = tower.patch_embed.img_size
    x = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    if hasattr(tower, "set_compression"):
        with budget_kept(tower):
            tower.set_compression(1.0)
            ours, kind = tower(x), "DRIP at compression 1"
    else:
        ours, kind = tower(x), "tower"
    theirs = dense.output(x).float()
    difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))
    if not difference <= TOLERANCE:
        raise ValueError(f"is no plain ViT: as a {kind} its outputs differ by {difference:.1e} of the largest")
    log.info(f"{kind}: the outputs differ from the original's by {difference:.1e} of the largest")
