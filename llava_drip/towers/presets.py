"""DRIP's sizes, as timm entry points: drip_{tiny,small,base,large}_patch{32,16,14}_{224,336} and a few more.

A rate in a name (drip_base_patch16_224_4x) serves programs that can pass nothing but a name.
"""

from __future__ import annotations

from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import checkpoint_filter_fn

from llava_drip.towers.drip import Drip

SIZES = {
    # Narrow: timm's std of 0.02 would be too faint to learn fast, its "jax" initialization grows with 1 / width.
    "mini": {
        "embed_dim": 96,
        "depth": 4,
        "num_heads": 3,
        "pool_after": 1,
        "weight_init": "jax",
        "position_scale": 1.0,
    },
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}

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
    mini = {**SIZES["mini"], "patch_size": 8, "img_size": 64}  # for CPUs
    presets["drip_mini_patch8_64_elastic"] = {**mini, **ELASTIC}
    for rate in (1, 2, 4, 10):
        presets[f"drip_mini_patch8_64_{rate}x"] = {
            **mini,
            "compression": rate,
        }
    return presets


PRESETS = _presets()
default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, preset["img_size"], preset["img_size"]),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": OPENAI_CLIP_MEAN,
            "std": OPENAI_CLIP_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        for name, preset in PRESETS.items()
    }
)


def recorded(arguments: dict) -> dict:
    """What rebuilds the same tower, for those who save it: the caller's plain arguments, not timm's bookkeeping."""
    return {
        key: value
        for key, value in arguments.items()
        if isinstance(value, (bool, int, float, str, tuple, list)) and key not in ("num_classes", "cache_dir")
    }


def _entry_point(name: str, preset: dict):
    def create(pretrained: bool = False, **kwargs) -> Drip:
        arguments = {**preset, **kwargs}
        model = build_model_with_cfg(Drip, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **arguments)
        model.model_args = recorded(kwargs)
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"DRIP with {preset}."
    return create


for _name, _preset in PRESETS.items():
    globals()[_name] = register_model(_entry_point(_name, _preset))
