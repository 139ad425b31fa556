"""DRIP's sizes, as timm entry points: drip_{tiny,small,base,large}_patch{32,16,14}_{224,336} and a few more.

A rate in a name (drip_base_patch16_224_4x) serves programs that can pass nothing but a name. Names with _rope are for training
from scratch; the others have the layout of pretrained dense ViTs, whose weights they take.
"""

from __future__ import annotations

from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models.vision_transformer import checkpoint_filter_fn

from llava_drip.towers.drip import Drip
from llava_drip.towers.entry import MINI, SIZES, register

ELASTIC = {"compression": 4.0, "elastic": (1.0, 10.0)}
ROPE = {"relative": "rotary", "qk_norm": True}  # 2.7 and 4.6 points from scratch: docs/results/accuracy.md


def _presets() -> dict[str, dict]:
    """Entry-point names → default arguments."""
    presets = {
        f"drip_{size}_patch{patch}_{image}": {**SIZES[size], "patch_size": patch, "img_size": image}
        for size in ("tiny", "small", "base", "large")
        for patch in (32, 16, 14)
        for image in (224, 336)
    }
    for patch in (32, 16):
        for rate in (1, 2, 4, 10):  # 1: the plain ViT
            base = presets[f"drip_base_patch{patch}_224"]
            presets[f"drip_base_patch{patch}_224_{rate}x"] = {**base, "compression": rate}
            if rate > 1:  # 4 dense blocks and 8 on the pooled tokens, instead of 2 and 10
                presets[f"drip_base_patch{patch}_224_{rate}x_pool4"] = {**base, "compression": rate, "pool_after": 4}
        # any budget from one checkpoint: training draws the rate of each image
        presets[f"drip_base_patch{patch}_224_elastic"] = {**presets[f"drip_base_patch{patch}_224"], **ELASTIC}
        for kind in ("", "_1x", "_2x", "_4x", "_10x", "_elastic"):
            name = f"drip_base_patch{patch}_224{kind}"
            presets[f"{name}_rope"] = {**presets[name], **ROPE}
    mini = {**MINI, "pool_after": 1, "position_scale": 1.0}
    presets |= {"drip_mini_patch8_64": mini, "drip_mini_patch8_64_elastic": {**mini, **ELASTIC}}
    for rate in (1, 2, 4, 10):
        presets[f"drip_mini_patch8_64_{rate}x"] = {**mini, "compression": rate}
    return presets


PRESETS = _presets()
register(__name__, Drip, PRESETS, mean=OPENAI_CLIP_MEAN, std=OPENAI_CLIP_STD, filter_fn=checkpoint_filter_fn)
