"""DRIP's sizes, as timm entry points: drip_{tiny,small,base,large}_patch{32,16,14}_{224,336} and a few more.

A rate in a name (drip_base_patch16_224_4x) serves programs that can pass nothing but a name.
"""

from __future__ import annotations

from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models.vision_transformer import checkpoint_filter_fn

from llava_drip.towers.drip import Drip
from llava_drip.towers.entry import MINI, SIZES, register

ELASTIC = {"compression": 4.0, "elastic": (1.0, 10.0)}


def _presets() -> dict[str, dict]:
    """Entry-point names → default arguments. A rate in the name serves programs that can pass nothing but a name."""
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
    mini = {**MINI, "pool_after": 1, "position_scale": 1.0}
    presets["drip_mini_patch8_64_elastic"] = {**mini, **ELASTIC}
    for rate in (1, 2, 4, 10):
        presets[f"drip_mini_patch8_64_{rate}x"] = {
            **mini,
            "compression": rate,
        }
    return presets


PRESETS = _presets()
register(__name__, Drip, PRESETS, mean=OPENAI_CLIP_MEAN, std=OPENAI_CLIP_STD, filter_fn=checkpoint_filter_fn)
