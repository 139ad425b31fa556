"""The plain ViT as a tower: plain_vit_{tiny,small,base,large}_patch{32,16,14}_224, and plain_vit_mini_patch8_64 for CPUs.

timm's own ViT, parameter by parameter, class token and all, so that timm's weights load strictly; it answers with a TokenBatch,
one token for each patch. Pretrained ones: pretrained.py.
"""

from __future__ import annotations

from timm.data.constants import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import checkpoint_filter_fn

from llava_drip.towers.presets import recorded
from llava_drip.towers.vit import PackedVisionTransformer

_SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
# Narrow: see presets.py, whose mini it is without boundaries.
_MINI = {"patch_size": 8, "img_size": 64, "embed_dim": 96, "depth": 4, "num_heads": 3, "weight_init": "jax"}

PLAIN_PRESETS = {
    f"plain_vit_{size}_patch{patch}_224": {**arguments, "patch_size": patch, "img_size": 224}
    for size, arguments in _SIZES.items()
    for patch in (32, 16, 14)
} | {"plain_vit_mini_patch8_64": _MINI}

default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, preset["img_size"], preset["img_size"]),
            "pool_size": None,
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": IMAGENET_INCEPTION_MEAN,  # of timm's vit_*
            "std": IMAGENET_INCEPTION_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        for name, preset in PLAIN_PRESETS.items()
    }
)


def _entry_point(name: str, preset: dict):
    def create(pretrained: bool = False, **kwargs) -> PackedVisionTransformer:
        arguments = {"class_token": True, "global_pool": "token", **preset, **kwargs}
        model = build_model_with_cfg(
            PackedVisionTransformer, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **arguments
        )
        model.model_args = recorded(kwargs)
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"timm's ViT as a tower, with {preset}."
    return create


for _name, _preset in PLAIN_PRESETS.items():
    globals()[_name] = register_model(_entry_point(_name, _preset))
