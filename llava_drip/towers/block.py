"""Pre-norm transformer block over packed tokens, with the parameter names of timm's Block."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from llava_drip.tokens import Packing
from llava_drip.towers.attention import PackedAttention
from llava_drip.towers.places import Relative


class PackedBlock(Block):
    """timm's Block for [T, D] tokens. Stochastic depth drops a residual branch for whole images, as timm does."""

    attention: type[PackedAttention] = PackedAttention

    def __init__(self, dim: int, num_heads: int, **kwargs):
        super().__init__(dim, num_heads, **{**kwargs, "attn_layer": self.attention})

    def forward(self, x: Tensor, packing: Packing, relative: Relative | None = None) -> Tensor:
        """x: [T, D] → [T, D]. relative: see PackedAttention."""
        x = x + self._drop_path(self.drop_path1, self.ls1(self.attn(self.norm1(x), packing, relative)), packing)
        return x + self._drop_path(self.drop_path2, self.ls2(self.mlp(self.norm2(x))), packing)

    def _drop_path(self, drop_path: nn.Module, x: Tensor, packing: Packing) -> Tensor:
        drop = getattr(drop_path, "drop_prob", 0.0)
        if not self.training or not drop:
            return x
        keep = torch.empty(len(packing.lengths), 1, device=x.device, dtype=x.dtype).bernoulli_(1 - drop)
        if drop_path.scale_by_keep:
            keep = keep / (1 - drop)
        return x * keep[packing.image_of_token]
