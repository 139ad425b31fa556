"""Which patches a DynamicViT keeps: the predictor, the draw in training, attention under a policy, and the ranking in eval.

Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS 2021. A policy is one number
for each token, 1 where it is kept and 0 where it is dropped, with a gradient. In training no token is taken out: those that a
policy drops are attended to by themselves alone, so that the kept ones see what they would see without them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from llava_drip.tokens import Packing
from llava_drip.towers.attention import PackedAttention
from llava_drip.towers.block import PackedBlock

EPSILON = 1e-6  # the official code's: a row of which nothing is left attends evenly


class ScorePredictor(nn.Module):
    """How much likelier it is that a patch is kept than dropped, from its own features and the mean of all that are still there.

    Parameters are those of the official PredictorLG, which ends in log-probabilities of both. Here it is their difference, which
    ranks patches alike, and also where the probabilities are too close to tell apart in half precision.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4),
            nn.GELU(),
            nn.Linear(dim // 4, 2),  # kept, dropped
        )
        self.init_weights()

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, packing: Packing, policy: Tensor | None = None) -> Tensor:
        """x: [T, D] patches → [T] fp32 log-odds. policy: [B, N] of equally many patches in each image, or None: all of them are
        there."""
        local, shared = self.in_conv(x).chunk(2, dim=-1)
        B = len(packing.lengths)
        if packing.uniform:
            every = shared.unflatten(0, (B, packing.longest))
            if policy is None:
                mean = every.mean(1, keepdim=True)
            else:
                weights = policy.to(every.dtype)[..., None]
                mean = (every * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
            mean = mean.expand_as(every).flatten(0, 1)
        else:
            assert policy is None
            sums = torch.zeros(B, shared.shape[-1], device=x.device).index_add(
                0, packing.image_of_token, shared.float()
            )
            mean = (sums / packing.lengths_tensor[:, None]).to(shared.dtype)[packing.image_of_token]
        kept, dropped = self.out_conv(torch.cat([local, mean], dim=-1)).float().unbind(-1)
        return kept - dropped


def draw_policy(log_odds: Tensor, uniform: Tensor, before: Tensor | None) -> Tensor:
    """A sample of what is kept, straight through: its value is hard, its gradient that of the Gumbel-softmax at temperature 1.

    Of two classes the difference of their Gumbel variables is all that counts, one logistic variable.

    Args:
        log_odds: [B, N] fp32.
        uniform: [B, N] fp32 random numbers in 0 .. 1.
        before: [B, N] policy of the stage before: what was dropped there stays dropped. None: all are there.
    Returns:
        [B, N] fp32, at least one patch kept in each image: the likeliest, where all would go.
    """
    noisy = log_odds + torch.logit(uniform.float(), eps=1e-6)
    before = torch.ones_like(noisy) if before is None else before
    with torch.no_grad():
        there = before > 0.5
        kept = (noisy > 0) & there
        likeliest = noisy.masked_fill(~there, -torch.inf).argmax(1, keepdim=True)
        kept = kept | torch.zeros_like(kept).scatter(1, likeliest, ~kept.any(1, keepdim=True))
    soft = torch.sigmoid(noisy)
    return (kept.float() + (soft - soft.detach())) * before


def policy_softmax(scores: Tensor, policy: Tensor) -> Tensor:
    """Attention weights [B, H, N, N] from logits: each token attends to itself and to the kept ones (eq. 10 and 11 of the paper).

    policy: [B, N]. The weights of a row add up to 1.
    """
    N = scores.shape[-1]
    own = torch.eye(N, device=scores.device)
    allowed = policy.float()[:, None, None, :]
    allowed = allowed + (1 - allowed) * own
    scores = scores.float()
    weights = (scores - scores.detach().amax(-1, keepdim=True)).exp() * allowed
    return (weights + EPSILON / N) / (weights.sum(-1, keepdim=True) + EPSILON)


class PolicyAttention(PackedAttention):
    """Packed attention, or under a policy that of equally long images."""

    def forward(self, x: Tensor, packing: Packing, policy: Tensor | None = None) -> Tensor:
        """x: [T, D] → [T, D]. policy: [B, n] over all tokens of the images, class token included, or None."""
        if policy is None:
            return super().forward(x, packing)
        qkv = self.qkv(x).view(len(packing.lengths), packing.longest, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, n, d] each
        q, k = self.q_norm(q), self.k_norm(k)
        weights = policy_softmax((q * self.scale) @ k.transpose(-2, -1), policy).to(v.dtype)
        out = (self.attn_drop(weights) @ v).transpose(1, 2).reshape(x.shape)
        return self.proj_drop(self.proj(self.norm(out)))


class PolicyBlock(PackedBlock):
    """A block whose third argument is a policy, for PolicyAttention."""

    attention = PolicyAttention


def rows_of_highest(scores: Tensor, packing: Packing, counts: Sequence[int]) -> Tensor:
    """Rows of the packed tokens with the highest scores of their image, in the order in which they lie; earlier ones first among
    equals.

    Args:
        scores: [T].
        counts: how many to keep of each image, at most as many as it has.
    Returns:
        [sum(counts)] int64.
    """
    padded = packing.pad(scores, -torch.inf)
    order = padded.argsort(dim=1, descending=True, stable=True)
    if packing.uniform and len(set(counts)) == 1:  # nothing is read back from the device
        places = order[:, : counts[0]].sort(dim=1).values
        return (places + packing.cu_seqlens[:-1, None].long()).flatten()
    wanted = torch.tensor(counts, device=scores.device)[:, None]
    kept = packing.unpad(order.argsort(dim=1) < wanted)
    return kept.nonzero()[:, 0]


def segments_of_kept(patches: Tensor, packing: Packing, number: int) -> Tensor:
    """[B, N] int64 as in TokenBatch, of `number` patches: the token that each became, -1 where it was dropped.

    patches: [T] int64, the patch within its image that each token is.
    """
    segments = torch.full((len(packing.lengths), number), -1, dtype=torch.int64, device=patches.device)
    segments[packing.image_of_token, patches] = packing.place_of_token
    return segments
