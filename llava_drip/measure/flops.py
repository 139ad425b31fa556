"""Multiply-accumulates of a ViT and of DRIP in closed form, attention and boundary predictor counted.

One MAC is one multiply and one add. Norms, softmax, GELU, biases and pooling are left out, as is usual; they are under 1 %.
"""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer

from llava_drip.towers.drip import Drip


def block_macs(tokens: float, dim: int, mlp_ratio: float = 4.0) -> float:
    """A transformer block over one image's tokens: qkv and output projections, attention, MLP."""
    return (4 + 2 * mlp_ratio) * tokens * dim**2 + 2 * tokens**2 * dim


def tower_macs(tower: VisionTransformer, tokens: float | None = None) -> float:
    """MACs of one image through a timm ViT or a Drip.

    Args:
        tower: gives the sizes.
        tokens: segments of the image in a Drip, default patches / compression.
    """
    dim, depth, prefix = tower.embed_dim, len(tower.blocks), tower.num_prefix_tokens
    patches, projection = tower.patch_embed.num_patches, tower.patch_embed.proj.weight
    mlp_ratio = tower.blocks[0].mlp.fc1.out_features / dim
    total = patches * projection.numel() + tower.num_classes * dim
    if not isinstance(tower, Drip) or (tokens is None and tower.compression == 1):
        return total + depth * block_macs(patches + prefix, dim, mlp_ratio)
    tokens = patches / tower.compression if tokens is None else tokens
    dense = tower.pool_after
    total += dense * block_macs(patches + prefix, dim, mlp_ratio)
    total += (depth - dense) * block_macs(tokens + prefix, dim, mlp_ratio)
    predictor = sum(p.numel() for name, p in tower.boundary_predictor.named_parameters() if name.startswith("fc"))
    return total + (patches - 1) * predictor
