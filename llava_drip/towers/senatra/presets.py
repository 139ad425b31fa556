"""SeNaTra's sizes, as timm entry points: senatra_{tiny,small,base}_224, and senatra_mini_64 for CPUs.

The paper has Tiny, Base and Large, whose last stages are 512, 1024 and 1536 wide; depths, heads and MLP ratios are NAT's of the
same widths. It has no Small: that is NAT-S's trunk. Large is senatra_base_224 with embed_dim=192, num_heads=(6, 12, 24, 48).
"""

from __future__ import annotations

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from llava_drip.towers.entry import register
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
register(
    __name__,
    Senatra,
    PRESETS,
    mean=IMAGENET_DEFAULT_MEAN,
    std=IMAGENET_DEFAULT_STD,
    filter_fn=checkpoint_filter_fn,
    crop_pct=0.875,
    fixed=Senatra.budget_hint,
)
