"""A plain ViT over packed tokens: timm's VisionTransformer with timm's parameters, whose features are a TokenBatch."""

from __future__ import annotations

from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llava_drip.tokens import Packing, TokenBatch
from llava_drip.towers.block import PackedBlock
from llava_drip.towers.checks import numbers, switches
from llava_drip.towers.contract import NO_FEATURE_MAPS
from llava_drip.towers.places import Relative

POOLINGS = ("avg", "token")


def split_prefix(x: Tensor, packing: Packing, count: int) -> tuple[Tensor | None, Tensor, Packing]:
    """Packed [T + B·P, D], each image's P = `count` prefix tokens first → prefix [B, P, D] (None: P is 0), [T, D], packing of
    these."""
    if count == 0:
        return None, x, packing
    inner = packing.grown_by(-count)
    if packing.uniform:
        x = x.unflatten(0, (len(packing.lengths), packing.longest))
        return x[:, :count], x[:, count:].flatten(0, 1), inner
    return *_split_ragged(x, packing, count), inner


@torch.compiler.disable  # of another shape for each batch
def _split_ragged(x: Tensor, packing: Packing, count: int) -> tuple[Tensor, Tensor]:
    first = packing.place_of_token < count
    return x[first].unflatten(0, (-1, count)), x[~first]


def join_prefix(prefix: Tensor | None, x: Tensor, packing: Packing) -> tuple[Tensor, Packing]:
    """The inverse of split_prefix: packing is that of x; prefix: [B, P, ...] or None."""
    if prefix is None:
        return x, packing
    B, P = prefix.shape[:2]
    joined = packing.grown_by(P)
    if packing.uniform:
        return torch.cat([prefix, x.unflatten(0, (B, packing.longest))], 1).flatten(0, 1), joined
    return _join_ragged(prefix, x, joined), joined


@torch.compiler.disable
def _join_ragged(prefix: Tensor, x: Tensor, joined: Packing) -> Tensor:
    B, P = prefix.shape[:2]
    # Rows of [all prefixes, all tokens], in packed order.
    rows = torch.empty(joined.total, dtype=torch.int64, device=x.device)
    first = joined.place_of_token < P
    rows[first], rows[~first] = torch.arange(B * P, device=x.device), torch.arange(B * P, joined.total, device=x.device)
    return torch.cat([prefix.flatten(0, 1), x])[rows]


class PackedVisionTransformer(VisionTransformer):
    """timm's VisionTransformer (all its arguments and parameter names) over packed tokens.

    The default is no class token and the mean over tokens. With class_token=True, global_pool="token" the layout is that of
    timm's own default, so dense weights load by `load_state_dict`.
    """

    block: type[PackedBlock] = PackedBlock
    budget_hint = "every patch stays a token; take a drip_* tower, or make one of it (scripts/convert_tower.py)"

    def __init__(
        self,
        *,
        class_token: bool = False,
        global_pool: str = "avg",
        mean_over: str = "tokens",
        norm_eps: float | None = None,
        **kwargs,
    ):
        """
        Args:
            mean_over: what global_pool="avg" counts once, "tokens" or "patches" (as many of a token as it was pooled from).
            norm_eps: of all layer norms, default timm's 1e-6; CLIP's own weights want 1e-5.
        """
        self._check_pooling(global_pool)
        switches(class_token=class_token, qk_norm=kwargs.get("qk_norm", False))
        if mean_over not in ("tokens", "patches"):
            raise ValueError(f'mean_over must be "tokens" or "patches", got {mean_over!r}')
        if kwargs.get("patch_drop_rate", 0):
            raise ValueError("patch_drop_rate: dropping patches would tear segments apart; leave it at 0")
        if norm_eps is not None:
            numbers("norm_eps", (norm_eps,), least=0)
            if kwargs.get("norm_layer") is not None:
                raise ValueError("norm_eps and norm_layer: give one of them")
            kwargs["norm_layer"] = partial(nn.LayerNorm, eps=norm_eps)
        kwargs["block_fn"] = self.block
        super().__init__(class_token=class_token, global_pool=global_pool, **kwargs)
        self.mean_over = mean_over

    @staticmethod
    def _check_pooling(global_pool: str | None) -> None:
        if global_pool is not None and global_pool not in POOLINGS:
            raise ValueError(f"global_pool must be one of {POOLINGS}, got {global_pool!r}")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self._check_pooling(global_pool)
        super().reset_classifier(num_classes, global_pool)

    def forward_features(self, x: Tensor, *, layer: int | None = None) -> TokenBatch:
        """Images [B, 3, height, width] → TokenBatch.

        Args:
            x: normalised pixels.
            layer: None for all blocks and the final norm (which a tower that pools by the mean has in forward_head, as in timm);
                -1, -2, ... for the un-normed output of the last, the penultimate block and so on (LLaVA reads -2).
        """
        x = self.embed(x)
        packing = Packing.equal(len(x), x.shape[1], x.device)
        x = self.run_blocks(x.flatten(0, 1), packing, 0, self.blocks_until(layer))
        return self.to_tokens(x, packing, layer, segments=None)

    def embed(self, x: Tensor) -> Tensor:
        """Images → [B, P + N, D]: patches with positions, behind the class and register tokens."""
        return self.norm_pre(self._pos_embed(self.patch_embed(x)))

    def blocks_until(self, layer: int | None) -> int:
        """How many blocks to run for `layer` of forward_features."""
        depth = len(self.blocks)
        if layer is None:
            return depth
        if not -depth <= layer <= -1:
            raise ValueError(f"layer must be None or in -{depth} .. -1, got {layer}")
        return depth + layer + 1

    def run_blocks(
        self, x: Tensor, packing: Packing, start: int, stop: int, relative: Relative | None = None
    ) -> Tensor:
        """Blocks start .. stop - 1 over [T, D]."""
        for block in self.blocks[start:stop]:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, packing, relative, use_reentrant=False)
            else:
                x = block(x, packing, relative)
        return x

    def to_tokens(self, x: Tensor, packing: Packing, layer: int | None, segments: Tensor | None, **extra) -> TokenBatch:
        """The end of forward_features: final norm, and the prefix tokens taken out of the packed [T + B·P, D]."""
        if layer is None:
            x = self.norm(x)
        prefix, values, packing = split_prefix(x, packing, self.num_prefix_tokens)
        lengths = packing.lengths_tensor
        if segments is None:
            segments = torch.arange(packing.longest, device=x.device).expand(len(lengths), -1)
        return TokenBatch(values, lengths, segments, prefix=prefix, _packing=packing, **extra)

    def forward_head(self, t: TokenBatch, pre_logits: bool = False) -> Tensor:
        """TokenBatch → logits [B, num_classes] (or the pooled [B, D] before the classifier)."""
        x = t.prefix[:, 0] if self.global_pool == "token" else t.mean(self.mean_over)
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(self, *args, **kwargs):
        raise ValueError(NO_FEATURE_MAPS)

    def prune_intermediate_layers(self, *args, **kwargs):
        raise ValueError(NO_FEATURE_MAPS)
