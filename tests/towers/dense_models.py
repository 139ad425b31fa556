"""Dense models of three libraries, small and with random weights, as tests make DRIPs of them."""

from __future__ import annotations

import open_clip
from torch import nn
from tower_helpers import shake
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

TEXT = {"width": 32, "heads": 2, "layers": 1, "vocab_size": 100, "context_length": 8}
VISION = {"image_size": 64, "patch_size": 16, "width": 96, "layers": 3, "head_width": 32}
HF_VISION = {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 3, "num_attention_heads": 4}
HF_VISION |= {"image_size": 64, "patch_size": 16, "projection_dim": 24}
HF_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 100,
}


def small_clip(vision: dict | None = None, **options) -> nn.Module:
    return shake(open_clip.model.CLIP(embed_dim=24, vision_cfg={**VISION, **(vision or {})}, text_cfg=TEXT, **options))


def hf_model(kind: type, **changes) -> nn.Module:
    vision = CLIPVisionConfig(**{**HF_VISION, **changes})
    if kind is CLIPModel:
        # The two projection_dim differ, as in published configurations: a CLIPModel goes by its own.
        return shake(CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config=HF_TEXT, projection_dim=40)))
    return shake(kind(vision))
