"""Multiply-accumulates of products: of a ViT and of DRIP in closed form, attention and boundary predictor included; of others as
counting.py counts them.

One MAC is one multiply and one add. Norms, softmax, GELU, biases, rotary turns and pooling are left out, as is usual; they are
under 1 %.
"""

from __future__ import annotations

from timm.layers import Attention, Mlp, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from llava_drip.measure import counting
from llava_drip.towers.drip import Drip
from llava_drip.towers.io import budget_of
from llava_drip.towers.rules import BoundaryRule, EntropyBoundaries, GumbelBoundaries, SimilarityBoundaries
from llava_drip.towers.vit import PackedVisionTransformer


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
    """MACs of one image through a timm ViT of plain blocks (has_plain_blocks) or a Drip of such, in closed form.

    Args:
        tower: gives the sizes.
        tokens: segments of the image in a Drip, default patches / compression, or what set_compression asked for. Of two poolings
            it is what the last one leaves; the first leaves its part of that.
    """
    dim, depth, prefix = tower.embed_dim, len(tower.blocks), tower.num_prefix_tokens
    patches, projection = tower.patch_embed.num_patches, tower.patch_embed.proj.weight
    mlp_ratio = tower.blocks[0].mlp.fc1.out_features / dim
    attention_dim = dim
    total, count, begin = patches * projection.numel() + tower.num_classes * dim, float(patches), 0

    def blocks(number: int) -> float:
        return number * block_macs(count + prefix, dim, mlp_ratio, attention_dim)

    if isinstance(tower, Drip) and (tokens is not None or not tower.is_dense):
        asked = budget_of(tower) or tower.compression if tokens is None else patches / tokens
        for stage, (rule, until) in enumerate(zip(tower.boundary_predictors, tower.pool_depths)):
            total += blocks(until - begin) + rule_macs(rule, count)
            if tower.size_bias:  # of pooled tokens
                attention_dim = dim + 8 * tower.blocks[0].attn.num_heads
            count, begin = patches / asked ** tower.share_of_compression(stage + 1), until
    return total + blocks(depth - begin)


def has_plain_blocks(model: nn.Module) -> bool:
    """Whether the closed form holds: of a Drip, a plain tower or timm's VisionTransformer itself, whose blocks are one attention
    (qkv) and one MLP of two layers (fc1, fc2). Not of gated MLPs (SwiGLU), parallel blocks, attention pooling, hybrid patch
    embeddings."""
    if not (type(model) in (VisionTransformer, PackedVisionTransformer) or isinstance(model, Drip)):
        return False
    return (
        isinstance(model.patch_embed, PatchEmbed)
        and model.attn_pool is None
        and all(
            isinstance(block, Block) and isinstance(block.attn, Attention) and type(block.mlp) is Mlp
            for block in model.blocks
        )
    )


def count_macs(model: nn.Module, tokens: float | None = None) -> float:
    """MACs of one image through any timm model: in closed form where it holds (has_plain_blocks), else as counting.count counts
    the products of one forward in eval mode.

    Args:
        model: left as it was, in the mode in which it was; may be on the meta device.
        tokens: of an image in the blocks after pooling, for a Drip that pools; others ignore it.
    """
    if has_plain_blocks(model):
        pools = isinstance(model, Drip) and not model.is_dense
        return tower_macs(model, tokens if pools else None)
    return counting.count(model).products
