"""SeNaTra's sizes, as timm entry points: senatra_{tiny,small,base}_224, and senatra_mini_64 for CPUs.

The paper has Tiny, Base and Large, whose last stages are 512, 1024 and 1536 wide; depths, heads and MLP ratios are NAT's of the
same widths. It has no Small: that is NAT-S's trunk. Large is senatra_base_224 with embed_dim=192, num_heads=(6, 12, 24, 48).
"""

from __future__ import annotations

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from llava_drip.towers.senatra.model import Senatra, checkpoint_filter_fn

PRESETS = {
    "senatra_tiny_224": {"embed_dim": 64, "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0},
    "senatra_small_224": {"embed_dim": 96, "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0, "init_values": 1e-5},
    "senatra_base_224": {"embed_dim": 128, "num_heads": (4, 8, 16, 32), "mlp_ratio": 2.0, "init_values": 1e-5},
    # 64 pixels become 16 tokens: patches of 2.
    "senatra_mini_64": {
        "img_size": 64,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": (1, 1, 2, 2),
        "num_heads": (1, 2, 4, 8),
        "mlp_ratio": 2.0,
        "kernel_size": 5,
        "weight_init": "lecun",
    },
}
BUDGETS = ("compression", "budget", "pool_after", "elastic")  # of towers whose number of tokens can be chosen

default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, preset.get("img_size", 224), preset.get("img_size", 224)),
            "pool_size": None,
            "crop_pct": 1.0 if "mini" in name else 0.875,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        for name, preset in PRESETS.items()
    }
)


def _entry_point(name: str, preset: dict):
    def create(pretrained: bool = False, **kwargs) -> Senatra:
        side = 8 * preset.get("patch_size", 4)
        for key in BUDGETS:
            if kwargs.get(key) is not None:
                raise ValueError(
                    f"{key}={kwargs[key]}: {name} has a fixed number of tokens, one for {side} x {side} pixels; leave {key} out"
                )
        arguments = {**preset, **kwargs}
        model = build_model_with_cfg(Senatra, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **arguments)
        # What rebuilds the same tower, for those who save it: the caller's plain arguments, not timm's bookkeeping.
        model.model_args = {
            key: value
            for key, value in kwargs.items()
            if isinstance(value, (bool, int, float, str, tuple, list)) and key not in ("num_classes", "cache_dir")
        }
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"SeNaTra with {preset}."
    return create


for _name, _preset in PRESETS.items():
    globals()[_name] = register_model(_entry_point(_name, _preset))
