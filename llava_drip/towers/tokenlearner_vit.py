"""A ViT with TokenLearner inside, as timm entry points: tokenlearner_{tiny,small,base,large}_patch{32,16}_224, and a mini one.

import timm, llava_drip
tower = timm.create_model("tokenlearner_base_patch16_224", num_tokens=8, insert_at=6)
tokens = tower.forward_features(images)     # TokenBatch, 8 tokens of every image; tokens.token_maps: where each one looks
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from llava_drip.tokens import Packing, TokenBatch
from llava_drip.towers.entry import MINI, SIZES, register
from llava_drip.towers.tokenlearner import (
    Names,
    TokenFuser,
    TokenLearner,
    as_it_is,
    conv_kernel,
    linear_names,
    load_scenic_params,
    norm_names,
)
from llava_drip.towers.vit import PackedVisionTransformer


class TokenLearnerViT(PackedVisionTransformer):
    """The first insert_at blocks see all patches, the others the tokens learned from them (Ryoo et al., NeurIPS 2021, as in the
    authors' code). With use_fuser each of the other blocks has a TokenLearner before it and a TokenFuser behind it, which gives
    its result back to all patches.

    Parameters beyond timm's VisionTransformer lie under `token_learners.` and `token_fusers.`. A class token, where there is one,
    passes by both.
    """

    def __init__(
        self,
        *,
        num_tokens: int = 8,
        insert_at: int | None = None,
        version: str = "1.1",
        bottleneck_dim: int = 64,
        use_fuser: bool = False,
        fc_norm: bool | None = False,
        act_layer: str = "gelu_tanh",
        **vit,
    ):
        """
        Args:
            num_tokens: S, of every image.
            insert_at: blocks that see all patches, 0 .. depth - 1; default half of them.
            version, bottleneck_dim: of TokenLearner; bottleneck_dim of TokenFuser too.
            use_fuser: all patches come out, and no fewer tokens are left for what follows the tower.
            fc_norm, act_layer: timm's. The authors' ViT takes the norm before the mean over tokens (in timm's default layout it
                comes after), and flax's GELU is the tanh approximation.
            **vit: timm's VisionTransformer arguments; proj_drop_rate is the dropout of TokenLearner and TokenFuser too.
        Raises:
            ValueError: an argument out of range, named.
        """
        if vit.get("mean_over", "tokens") != "tokens":
            raise ValueError(f"mean_over={vit['mean_over']!r}: learned tokens stand for no patches; leave it out")
        super().__init__(fc_norm=fc_norm, act_layer=act_layer, **vit)
        self.use_fuser = use_fuser
        self._check_fused_pooling(self.global_pool)
        depth = len(self.blocks)
        insert_at = depth // 2 if insert_at is None else insert_at
        if isinstance(insert_at, bool) or not isinstance(insert_at, int) or not 0 <= insert_at < depth:
            raise ValueError(f"insert_at must be between 0 and depth - 1 = {depth - 1}, got {insert_at!r}")
        self.num_tokens, self.insert_at, self.version = num_tokens, insert_at, str(version)
        dropout = vit.get("proj_drop_rate", 0.0)
        self.token_learners = nn.ModuleList(
            TokenLearner(self.embed_dim, num_tokens, version, bottleneck_dim, dropout if self.version == "1.1" else 0.0)
            for _ in range(depth - insert_at if use_fuser else 1)
        )
        self.token_fusers = nn.ModuleList(
            TokenFuser(self.embed_dim, num_tokens, bottleneck_dim, dropout)
            for _ in range(depth - insert_at if use_fuser else 0)
        )

    @property
    def pool_depths(self) -> tuple[int, ...]:
        """Blocks before there are fewer tokens, as of a Drip: layers before them are none of this tower."""
        return (0,) if self.use_fuser else (self.insert_at,)

    @property
    def budget_hint(self) -> str:
        """Why the number of tokens cannot be chosen, and what to do (towers/contract.py)."""
        if self.use_fuser:
            return "with use_fuser it gives all patches back; num_tokens without use_fuser makes fewer tokens"
        return f"it makes {self.num_tokens} tokens of every image; choose num_tokens when the tower is made"

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self._check_fused_pooling(global_pool)
        super().reset_classifier(num_classes, global_pool)

    def _check_fused_pooling(self, global_pool: str | None) -> None:
        if self.use_fuser and global_pool == "token":
            raise ValueError(
                'global_pool="token" would not use the last TokenFuser: with use_fuser take global_pool="avg"'
            )

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's, for layer-wise learning rates: TokenLearner and TokenFuser count with the block between them."""
        matcher = super().group_matcher(coarse)
        added = [
            (rf"^{part}\.{i}\.", (self.insert_at + i,))
            for part in ("token_learners", "token_fusers")
            for i in range(len(getattr(self, part)))
        ]
        return {**matcher, "blocks": [*matcher["blocks"], *added]}

    @property
    def most_tokens(self) -> int:
        """Tokens of a picture of the tower's size."""
        return self.patch_embed.num_patches if self.use_fuser else self.num_tokens

    def forward_features(self, x: Tensor, *, layer: int | None = None) -> TokenBatch:
        """Images [B, 3, height, width] → TokenBatch of num_tokens tokens of every image (with use_fuser, of its patches), with
        `token_maps` of the last TokenLearner that ran.

        layer: as in PackedVisionTransformer; without use_fuser not a layer before block insert_at.
        """
        stop = self.blocks_until(layer)
        if stop < self.pool_depths[-1]:
            raise ValueError(f"layer {layer} lies before TokenLearner, which follows block {self.insert_at}")
        grid, B, P = self.patch_embed.dynamic_feat_size(x.shape[-2:]), len(x), self.num_prefix_tokens
        x = self._blocks(self.embed(x), 0, min(stop, self.insert_at))
        maps = None
        if not self.use_fuser:
            tokens, maps = self.token_learners[0](x[:, P:].unflatten(1, grid), return_maps=True)
            x = self._blocks(torch.cat([x[:, :P], tokens], 1), self.insert_at, stop)
        else:
            fused = zip(range(self.insert_at, stop), self.token_learners, self.token_fusers)
            for block, token_learner, token_fuser in fused:
                patches = x[:, P:]
                tokens, maps = token_learner(patches.unflatten(1, grid), return_maps=True)
                x = self._blocks(torch.cat([x[:, :P], tokens], 1), block, block + 1)
                x = torch.cat([x[:, :P], patches + token_fuser(x[:, P:], patches)], 1)
        t = self.to_tokens(x.flatten(0, 1), Packing.equal(B, x.shape[1], x.device), layer, segments=None)
        maps = None if maps is None else maps.detach().float()
        return replace(t, segments=t.segments if self.use_fuser else None, token_maps=maps)

    def _blocks(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Blocks start .. stop - 1 over [B, L, D]."""
        packing = Packing.equal(len(x), x.shape[1], x.device)
        return self.run_blocks(x.flatten(0, 1), packing, start, stop).unflatten(0, (len(x), -1))

    @torch.jit.ignore
    def load_pretrained(self, checkpoint_path: str, prefix: str = "") -> None:
        """An .npz of a Scenic checkpoint's flat parameters, each under prefix and its flax path; see load_scenic_params. timm
        calls this for .npz files."""
        with np.load(checkpoint_path, allow_pickle=False) as file:
            load_scenic_params(self, {key.removeprefix(prefix): file[key] for key in file.files})

    @property
    def scenic_unread(self) -> tuple[str, ...]:
        """What begins the paths that a tower without a classifier leaves out."""
        return () if self.num_classes else ("output_projection/",)

    def scenic_names(self) -> Names:
        """See load_scenic_params: the layout of Scenic's TokenLearnerViT."""
        names: Names = {
            "pos_embed": (("Transformer/posembed_input/pos_embedding",), as_it_is),
            "patch_embed.proj.weight": (("embedding/kernel",), conv_kernel),
            "patch_embed.proj.bias": (("embedding/bias",), as_it_is),
            **norm_names("norm", "Transformer/encoder_norm"),
        }
        for i in range(len(self.blocks)):
            names |= _block_names(f"blocks.{i}", f"Transformer/encoderblock_{i}", self.blocks[i].attn.num_heads)
        kinds = {
            "token_learners": "TokenLearnerModuleV11" if self.version == "1.1" else "TokenLearnerModule",
            "token_fusers": "TokenFuser",
        }
        for part, kind in kinds.items():
            for i, module in enumerate(getattr(self, part)):
                for name, (paths, convert) in module.scenic_names().items():
                    placed = tuple(f"Transformer/{kind}_{i}/{path}" for path in paths)
                    names[f"{part}.{i}.{name}"] = (placed, convert)
        return names if self.num_classes == 0 else names | linear_names("head", "output_projection")


def _block_names(name: str, path: str, heads: int) -> Names:
    """Of a transformer block: flax keeps queries, keys and values, and their heads, apart."""
    attention = f"{path}/MultiHeadDotProductAttention_0"
    three = ("query", "key", "value")
    return {
        **norm_names(f"{name}.norm1", f"{path}/LayerNorm_0"),
        f"{name}.attn.qkv.weight": (
            tuple(f"{attention}/{part}/kernel" for part in three),
            partial(_from_heads, heads=heads),
        ),
        f"{name}.attn.qkv.bias": (tuple(f"{attention}/{part}/bias" for part in three), torch.flatten),
        f"{name}.attn.proj.weight": ((f"{attention}/out/kernel",), _to_heads),
        f"{name}.attn.proj.bias": ((f"{attention}/out/bias",), as_it_is),
        **norm_names(f"{name}.norm2", f"{path}/LayerNorm_1"),
        **linear_names(f"{name}.mlp.fc1", f"{path}/MlpBlock_0/Dense_0"),
        **linear_names(f"{name}.mlp.fc2", f"{path}/MlpBlock_0/Dense_1"),
    }


def _from_heads(array: Tensor, heads: int) -> Tensor:
    """[D, H, d] → [H·d, D]. ValueError for another number of heads, which the result would not show."""
    if array.shape[1] != heads:
        raise ValueError(f"{array.shape[1]} heads instead of {heads}")
    return array.flatten(1, 2).t()


def _to_heads(array: Tensor) -> Tensor:
    """[H, d, D] → [D, H·d]."""
    return array.flatten(0, 1).t()


PRESETS = {
    **{
        f"tokenlearner_{size}_patch{patch}_224": {**SIZES[size], "patch_size": patch, "img_size": 224}
        for size in ("tiny", "small", "base", "large")
        for patch in (32, 16)
    },
    "tokenlearner_mini_patch8_64": MINI,
}
register(
    __name__,
    TokenLearnerViT,
    PRESETS,
    mean=OPENAI_CLIP_MEAN,
    std=OPENAI_CLIP_STD,
    filter_fn=checkpoint_filter_fn,
    fixed="it makes num_tokens tokens of every image; choose num_tokens",
)
