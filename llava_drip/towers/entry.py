"""timm entry points of towers: one for each preset, and what all of them share."""

from __future__ import annotations

import sys
from collections.abc import Callable

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from llava_drip.towers.contract import NO_FEATURE_MAPS, refuse_budget

SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
# For CPUs. Narrow: timm's std of 0.02 would be too faint to learn fast, its "jax" initialization grows with 1 / width.
MINI = {"patch_size": 8, "img_size": 64, "embed_dim": 96, "depth": 4, "num_heads": 3, "weight_init": "jax"}


def recorded(arguments: dict) -> dict:
    """What rebuilds the same tower, for those who save it: the caller's plain arguments, not timm's bookkeeping."""
    return {
        key: value
        for key, value in arguments.items()
        if isinstance(value, (bool, int, float, str, tuple, list)) and key not in ("num_classes", "cache_dir")
    }


def register(
    module: str,
    tower: type[nn.Module],
    presets: dict[str, dict],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    filter_fn: Callable,
    crop_pct: float = 1.0,
    fixed: str | None = None,
) -> None:
    """Registers a function for each preset with timm, as a function of `module`, whose `default_cfgs` this makes.

    Args:
        module: __name__ of the module that calls this.
        presets: name → default arguments of `tower`.
        mean, std: pixel normalisation that the family is published with.
        filter_fn: (state dict, model) → state dict, of weights that come from elsewhere.
        crop_pct: of evaluation, but of presets for less than 224 pixels, which take the whole picture.
        fixed: of towers without set_compression: why arguments about a budget are refused, and what to do.
    """
    namespace = vars(sys.modules[module])
    sides = {name: preset.get("img_size", 224) for name, preset in presets.items()}
    namespace["default_cfgs"] = generate_default_cfgs(
        {
            name: {
                "num_classes": 1000,
                "input_size": (3, side, side),
                "pool_size": None,
                "crop_pct": crop_pct if side >= 224 else 1.0,
                "interpolation": "bicubic",
                "mean": mean,
                "std": std,
                "first_conv": "patch_embed.proj",
                "classifier": "head",
            }
            for name, side in sides.items()
        }
    )

    def entry_point(name: str, preset: dict) -> Callable:
        def create(pretrained: bool = False, **kwargs) -> nn.Module:
            if kwargs.get("features_only"):
                raise ValueError(NO_FEATURE_MAPS)
            if fixed is not None:
                refuse_budget(kwargs, name, fixed)
            model = build_model_with_cfg(
                tower, name, pretrained, pretrained_filter_fn=filter_fn, **{**preset, **kwargs}
            )
            model.model_args = recorded(kwargs)
            return model

        create.__name__ = create.__qualname__ = name
        create.__module__ = module
        create.__doc__ = f"{tower.__name__} with {preset}."
        return create

    for name, preset in presets.items():
        namespace[name] = register_model(entry_point(name, preset))
