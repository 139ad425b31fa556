"""Multiply-accumulates of a ViT and of DRIP in closed form, attention and boundary predictor counted.

One MAC is one multiply and one add. Norms, softmax, GELU, biases, rotary turns and pooling are left out, as is usual; they are
under 1 %.
"""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer

from llava_drip.towers.drip import Drip
from llava_drip.towers.rules import BoundaryRule, EntropyBoundaries, GumbelBoundaries, SimilarityBoundaries


def block_macs(tokens: float, dim: int, mlp_ratio: float = 4.0, attention_dim: int | None = None) -> float:
    """A transformer block over one image's tokens: qkv and output projections, attention, MLP.

    attention_dim: width of queries, keys and values in attention itself, where it is not dim.
    """
    return (4 + 2 * mlp_ratio) * tokens * dim**2 + 2 * tokens**2 * (attention_dim or dim)


def rule_macs(rule: BoundaryRule, tokens: float) -> float:
    """A boundary rule in inference, over the tokens of one image."""
    if isinstance(rule, GumbelBoundaries):
        return tokens * (rule.fc1.weight.numel() + rule.fc2.weight.numel())
    if isinstance(rule, SimilarityBoundaries):
        return tokens * (rule.query.weight.numel() + rule.key.weight.numel() + rule.query.out_features)
    if isinstance(rule, EntropyBoundaries):
        layers = sum(layer.weight.numel() for layer in (rule.project, rule.qkv, rule.out))
        return tokens * layers + 2 * tokens**2 * rule.project.out_features
    return 0.0


def tower_macs(tower: VisionTransformer, tokens: float | None = None) -> float:
    """MACs of one image through a timm ViT or a Drip.

    Args:
        tower: gives the sizes.
        tokens: segments of the image in a Drip, default patches / compression. Of two poolings it is what the last one leaves;
            the first leaves its part of that.
    """
    dim, depth, prefix = tower.embed_dim, len(tower.blocks), tower.num_prefix_tokens
    patches, projection = tower.patch_embed.num_patches, tower.patch_embed.proj.weight
    mlp_ratio = tower.blocks[0].mlp.fc1.out_features / dim
    attention_dim = dim + 8 * tower.blocks[0].attn.num_heads if getattr(tower, "size_bias", False) else dim
    total, count, begin = patches * projection.numel() + tower.num_classes * dim, float(patches), 0

    def blocks(number: int) -> float:
        return number * block_macs(count + prefix, dim, mlp_ratio, attention_dim)

    if isinstance(tower, Drip) and (tokens is not None or tower.compression > 1):
        asked = tower.compression if tokens is None else patches / tokens
        for stage, (rule, until) in enumerate(zip(tower.boundary_predictors, tower.pool_depths)):
            total += blocks(until - begin) + rule_macs(rule, count)
            count, begin = patches / asked ** tower.share_of_compression(stage + 1), until
    return total + blocks(depth - begin)
