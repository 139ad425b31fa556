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
from llava_drip.towers.places import Relative, rotate

# Values of q per image below which padding beats a call for each image on a CPU: measured 2x faster at 16 tokens of width 96
# (1,536 values), 1.8x slower at 20 tokens of width 768 (15,360).
SMALL_IMAGE = 4096


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float = 0.0, causal: bool = False
) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v within each image.

    Args:
        q, k, v: [T, H, d], same dtype and device.
        packing: lengths of the images, sum T.
        dropout: probability on the attention weights (0 in eval).
        causal: each token attends to itself and those before it.
    Returns:
        [T, H, d]
    """
    if packing.uniform:
        return _attend_equal_lengths(q, k, v, packing, dropout, causal)
    return _attend_ragged(q, k, v, packing, dropout, causal)


IMAGE_BY_IMAGE, VARLEN, PADDED = "a call for each image", "variable-length kernel", "padded and masked"


def ragged_way(q: Tensor, packing: Packing, dropout: float) -> str:
    """Which of the ways above images of unequal lengths take. Arguments as packed_attention's."""
    if not q.is_cuda and q.numel() >= SMALL_IMAGE * len(packing.lengths):
        return IMAGE_BY_IMAGE
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and dropout == 0:
        return VARLEN
    return PADDED


@torch.compiler.disable  # a compiled frame would be compiled anew for other lengths
def _attend_ragged(q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float, causal: bool) -> Tensor:
    way = ragged_way(q, packing, dropout)
    if way == IMAGE_BY_IMAGE:
        return _attend_image_by_image(q, k, v, packing, dropout, causal)
    if way == VARLEN:
        cu_seqlens, longest = packing.cu_seqlens, packing.longest
        window = (-1, 0) if causal else (-1, -1)
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=window)
    return _attend_padded(q, k, v, packing, dropout, causal)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool) -> Tensor:
    """[B, H, N, d] each → [B, H, N, d]. mask: [B, 1, 1, N] bool, the keys that are there."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # torch's fused kernel multiplies these slowly there: with 64 tokens of width 128 a training step spent 40 % in its
        # backward, which takes 161 ms against 20 ms of this (batch 128; 111 against 34 with 196 tokens of width 768, batch 8).
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        hidden = None if mask is None else ~mask
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            hidden = later if hidden is None else hidden | later
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        return F.dropout(scores.softmax(-1), dropout, training=dropout > 0) @ v
    if mask is not None and causal:
        mask, causal = mask & torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril(), False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)


def _attend_equal_lengths(q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float, causal: bool) -> Tensor:
    B, N = len(packing.lengths), packing.longest
    q, k, v = (t.unflatten(0, (B, N)).transpose(1, 2) for t in (q, k, v))  # [B, H, N, d]
    out = attend(q, k, v, None, dropout, causal)
    return out.transpose(1, 2).flatten(0, 1)


def _attend_image_by_image(q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float, causal: bool) -> Tensor:
    # split, not slices: its backward is one concatenation instead of a zero-filled [T, H, d] an image.
    rows = zip(*(t.transpose(0, 1).split(packing.lengths, dim=1) for t in (q, k, v)))  # [H, n_i, d] views
    out = [attend(*(t[None] for t in row), None, dropout, causal)[0] for row in rows]
    return torch.cat([o.transpose(0, 1) for o in out])


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float, causal: bool) -> Tensor:
    mask = packing.mask  # [B, L]
    padded = [t.new_zeros(*mask.shape, *t.shape[1:]).masked_scatter(mask[:, :, None, None], t) for t in (q, k, v)]
    q, k, v = (t.transpose(1, 2) for t in padded)  # [B, H, L, d]
    out = attend(q, k, v, mask[:, None, None], dropout, causal)
    return out.transpose(1, 2)[mask]


def with_size_bias(q: Tensor, k: Tensor, v: Tensor, log_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of one more dimension, which adds log(size of the key) to every attention logit: q there is 1 (in units of the
    softmax's scale), k is log_sizes. So any kernel takes it, those that take no bias too. Widened by 8, as half-precision
    kernels want it.

    q, k, v: [T, H, d] → [T, H, d + 8]; the last 8 of the result of attention are zero.
    """
    d, wide = q.shape[-1], q.shape[-1] + 8
    q, k, v = (F.pad(t, (0, 8)) for t in (q * (wide / d) ** 0.5, k, v))
    q[..., d] = wide**0.5
    k[..., d] = log_sizes[:, None].to(k.dtype)
    return q, k, v


class PackedAttention(Attention):
    """timm's Attention (same parameters, same names) for packed tokens."""

    def forward(self, x: Tensor, packing: Packing, relative: Relative | None = None) -> Tensor:
        """x: [T, D] → [T, D]. relative: positions and sizes of the tokens, where attention is to know them."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(1)  # [T, H, d]
        q, k = self.q_norm(q), self.k_norm(k)
        if relative is not None and relative.cos is not None:
            q, k = rotate(q, relative), rotate(k, relative)
        if relative is not None and relative.log_sizes is not None:
            q, k, v = with_size_bias(q, k, v, relative.log_sizes)
        out = packed_attention(q, k, v, packing, self.attn_drop.p if self.training else 0.0)
        out = out[..., : self.head_dim].flatten(1)
        return self.proj_drop(self.proj(self.norm(out)))
