"""The plain ViT as a tower: plain_vit_{tiny,small,base,large}_patch{32,16,14}_224, and plain_vit_mini_patch8_64 for CPUs.

timm's own ViT, parameter by parameter, class token and all, so that timm's weights load strictly; it answers with a TokenBatch,
one token for each patch. Pretrained ones: pretrained.py.
"""

from __future__ import annotations

from timm.data.constants import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models.vision_transformer import checkpoint_filter_fn

from llava_drip.towers.entry import MINI, SIZES, register
from llava_drip.towers.vit import PackedVisionTransformer

_CLASS_TOKEN = {"class_token": True, "global_pool": "token"}
PLAIN_PRESETS = {
    f"plain_vit_{size}_patch{patch}_224": {**_CLASS_TOKEN, **arguments, "patch_size": patch, "img_size": 224}
    for size, arguments in SIZES.items()
    for patch in (32, 16, 14)
} | {"plain_vit_mini_patch8_64": {**_CLASS_TOKEN, **MINI}}

register(
    __name__,
    PackedVisionTransformer,
    PLAIN_PRESETS,
    mean=IMAGENET_INCEPTION_MEAN,  # of timm's vit_*
    std=IMAGENET_INCEPTION_STD,
    filter_fn=checkpoint_filter_fn,
    crop_pct=0.9,
    fixed=PackedVisionTransformer.budget_hint,
)
