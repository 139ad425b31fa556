"""Self-attention over packed tokens: every token attends to the tokens of its own image, and no slot is padding.

Four ways, chosen by what the tokens are:
    equal lengths       one batched scaled_dot_product_attention on a view
    CUDA, half floats   torch.nn.attention.varlen (FlashAttention over cumulative lengths)
    CPU                 one call an image on views, unless the images are so small that the calls cost more than the work
    otherwise           padded and masked: many small kernels starve a GPU
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from llava_drip.tokens import Packing

# Values of q per image below which padding beats a call for each image on a CPU: measured 2x faster at 16 tokens of width 96
# (1,536 values), 1.8x slower at 20 tokens of width 768 (15,360).
SMALL_IMAGE = 4096


def packed_attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v within each image.

    Args:
        q, k, v: [T, H, d], same dtype and device.
        packing: lengths of the images, sum T.
        dropout: probability on the attention weights (0 in eval).
    Returns:
        [T, H, d]
    """
    if packing.uniform:
        return _attend_equal_lengths(q, k, v, packing, dropout)
    if not q.is_cuda and q.numel() >= SMALL_IMAGE * len(packing.lengths):
        return _attend_image_by_image(q, k, v, packing, dropout)
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and dropout == 0:
        cu_seqlens, longest = packing.cu_seqlens, packing.longest
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest)
    return _attend_padded(q, k, v, packing, dropout)


def _attend_equal_lengths(q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float) -> Tensor:
    B, N = len(packing.lengths), packing.longest
    q, k, v = (t.unflatten(0, (B, N)).transpose(1, 2) for t in (q, k, v))  # [B, H, N, d]
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(0, 1)


def _attend_image_by_image(q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float) -> Tensor:
    # split, not slices: its backward is one concatenation instead of a zero-filled [T, H, d] an image.
    rows = zip(*(t.transpose(0, 1).split(packing.lengths, dim=1) for t in (q, k, v)))  # [H, n_i, d] views
    out = [F.scaled_dot_product_attention(*(t[None] for t in row), dropout_p=dropout)[0] for row in rows]
    return torch.cat([o.transpose(0, 1) for o in out])


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float) -> Tensor:
    mask = packing.mask  # [B, L]
    padded = [t.new_zeros(*mask.shape, *t.shape[1:]).masked_scatter(mask[:, :, None, None], t) for t in (q, k, v)]
    q, k, v = (t.transpose(1, 2) for t in padded)  # [B, H, L, d]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None], dropout_p=dropout)
    return out.transpose(1, 2)[mask]


class PackedAttention(Attention):
    """timm's Attention (same parameters, same names) for packed tokens."""

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """x: [T, D] → [T, D]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(1)  # [T, H, d]
        q, k = self.q_norm(q), self.k_norm(k)
        out = packed_attention(q, k, v, packing, self.attn_drop.p if self.training else 0.0).flatten(1)
        return self.proj_drop(self.proj(self.norm(out)))
