"""DynamicViT: a ViT that drops patches for good at a few depths, those that its prediction modules find least worth keeping.

import timm, llava_drip
tower = timm.create_model("dynamicvit_small_patch16_224", pruning_loc=(3, 6, 9), token_ratio=(0.7, 0.49, 0.343))
tokens = tower.eval().forward_features(images)     # TokenBatch: 67 of 196 patches of each image, and the class token as prefix

Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS 2021. Parameter names are those
of the official code (github.com/raoyongming/DynamicViT), whose checkpoints of DeiT models load strictly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from llava_drip.tokens import Packing, TokenBatch
from llava_drip.towers.arguments import asked_compression
from llava_drip.towers.boundaries import tokens_for_budget
from llava_drip.towers.checks import numbers
from llava_drip.towers.entry import MINI, SIZES, register
from llava_drip.towers.policy import PolicyBlock, ScorePredictor, draw_policy, rows_of_highest, segments_of_kept
from llava_drip.towers.vit import PackedVisionTransformer, join_prefix, split_prefix

TOKEN_RATIO = 0.7  # of one stage to the one before it, the paper's


class DynamicViT(PackedVisionTransformer):
    """timm's VisionTransformer with a prediction module before some blocks (`score_predictor.*`).

    In eval each takes out patches: int(token_ratio * N) stay, in every image equally many, those with the highest scores. In
    training each draws who stays, in each image as many as come; dropped ones remain in the sequence, but nobody attends to them
    (policy.py). So the task's gradient reaches the predictors, and rate_loss holds the numbers to token_ratio.
    """

    block = PolicyBlock
    rate_loss_weight = 2.0  # the paper's: what a trainer multiplies rate_loss with, where nothing else is asked for

    def __init__(
        self,
        *,
        pruning_loc: Sequence[int] = (3, 6, 9),
        token_ratio: Sequence[float] | None = None,
        compression: float | None = None,
        budget: float | Tensor | None = None,
        over: str = "image",
        class_token: bool = True,
        global_pool: str = "token",
        **vit,
    ):
        """
        Args:
            pruning_loc: blocks before which patches are dropped, counted from 0, rising.
            token_ratio: share of all patches that is left after each, falling; default 0.7, 0.7^2, 0.7^3, ...
            compression: patches per token that are left in the end, instead of what token_ratio says: its ratios are all raised
                to the power that makes the last one 1 / compression, and eval keeps as many as set_compression would.
            budget, over: what set_compression is called with first, so that a saved tower keeps its budget.
            **vit: timm's VisionTransformer arguments (img_size, patch_size, embed_dim, depth, num_heads, drop_path_rate, ...).
        Raises:
            ValueError: an argument out of range, named.
        """
        super().__init__(class_token=class_token, global_pool=global_pool, **vit)
        depth, given = len(self.blocks), isinstance(pruning_loc, (tuple, list)) and len(pruning_loc) > 0
        if not given or not all(type(at) is int and 0 <= at < depth for at in pruning_loc):
            raise ValueError(f"pruning_loc must be a list of blocks, in 0 .. {depth - 1}, got {pruning_loc!r}")
        if list(pruning_loc) != sorted(set(pruning_loc)):
            raise ValueError(f"pruning_loc must rise, got {pruning_loc}")
        self.pruning_loc = tuple(pruning_loc)
        self.token_ratio = self._checked_ratios(token_ratio)
        self.made_for_compression = compression is not None
        if compression is not None:
            numbers("compression", (compression,), least=1)
            self.token_ratio = tuple(compression**-share for share in self._shares())
        self.compression = 1 / self.token_ratio[-1]
        self.score_predictor = nn.ModuleList(ScorePredictor(self.embed_dim) for _ in self.pruning_loc)
        # Where uniform numbers in 0 .. 1 of a tensor's shape come from, as in Drip.
        self.noise: Callable[[Tensor], Tensor] = torch.rand_like
        self.set_compression(budget, over)

    def _checked_ratios(self, ratios: Sequence[float] | None) -> tuple[float, ...]:
        stages = len(self.pruning_loc)
        if ratios is None:
            return tuple(TOKEN_RATIO**stage for stage in range(1, stages + 1))
        if not isinstance(ratios, (tuple, list)) or len(ratios) != stages:
            raise ValueError(f"token_ratio must be {stages} numbers, one for each of pruning_loc, got {ratios}")
        numbers("token_ratio", ratios, least=0)
        if not all(0 < ratio <= 1 for ratio in ratios) or list(ratios) != sorted(ratios, reverse=True):
            raise ValueError(f"token_ratio must be shares of all patches, falling within 0 .. 1, got {ratios}")
        return tuple(float(ratio) for ratio in ratios)

    def _shares(self) -> list[float]:
        """What each stage and those before it contribute to compressing, 0 .. 1, in its logarithm."""
        last = math.log(self.token_ratio[-1])
        stages = len(self.token_ratio)
        return [
            math.log(ratio) / last if last else (stage + 1) / stages for stage, ratio in enumerate(self.token_ratio)
        ]

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        super().init_weights(mode, needs_reset=needs_reset)
        for predictor in getattr(self, "score_predictor", ()):  # timm calls this first from within its own constructor
            predictor.init_weights()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's, for layer-wise learning rates: a predictor counts with the block that it follows."""
        matcher = super().group_matcher(coarse)
        predictors = [(rf"^score_predictor\.{i}\.", (max(at - 1, 0),)) for i, at in enumerate(self.pruning_loc)]
        return {**matcher, "blocks": [*matcher["blocks"], *predictors]}

    @property
    def pool_depths(self) -> tuple[int, ...]:
        """After how many blocks tokens become fewer, as in Drip."""
        return self.pruning_loc

    @property
    def has_boundary_loss(self) -> bool:
        """Whether training gives a rate_loss to add to the task's."""
        return not self.is_dense

    def freeze_boundaries(self) -> None:
        """No gradient for the predictors: at compression 1 they do not run, and DistributedDataParallel would wait for theirs."""
        self.score_predictor.requires_grad_(False)

    def set_compression(self, compression: float | Tensor | None, over: str = "image") -> None:
        """Choose the number of tokens without retraining.

        Args:
            compression: patches per token that are left in the end. A number, or a [B] tensor with one value an image, is met
                exactly in eval, and its ratios are the target of the rate loss in training; stages before the last keep what
                falls to them in the logarithm of token_ratio. None: token_ratio.
            over: "image" only.
        """
        if over != "image":
            raise ValueError(f'over must be "image": the scores of patches compare within an image only, got {over!r}')
        asked = asked_compression(compression, self.compression)
        self.budget, self.over = None if compression is None else asked, over
        self.is_dense = bool((asked == 1).all())  # every patch stays

    def token_counts(self, images: int, patches: int) -> list[tuple[int, ...]]:
        """How many patches eval keeps of each image, stage after stage."""
        if self.budget is None and not self.made_for_compression:  # as the official code rounds
            return [(max(1, int(ratio * patches)),) * images for ratio in self.token_ratio]
        final, counts = tokens_for_budget(self._asked(images), patches), []
        for share in self._shares()[:-1]:
            counts.append(torch.maximum((patches * self._asked(images) ** -share).long(), final))
        return [tuple(count.tolist()) for count in [*counts, final]]

    def _asked(self, images: int) -> Tensor:
        """[B] patches per token asked for by set_compression, or else by the constructor's compression."""
        if self.budget is None:
            return torch.tensor(self.compression).expand(images)
        if self.budget.ndim and self.budget.shape != (images,):
            raise ValueError(f"set_compression got {tuple(self.budget.shape)} values for a batch of {images} images")
        return self.budget.expand(images)

    def target_ratios(self, images: int) -> Tensor:
        """[B, stages] shares of the patches that training is to keep."""
        if self.budget is None:
            return torch.tensor(self.token_ratio).expand(images, -1)
        return self._asked(images)[:, None] ** -torch.tensor(self._shares())

    def forward_features(self, x: Tensor, *, layer: int | None = None) -> TokenBatch:
        """Images [B, 3, height, width] → TokenBatch of the patches that are left, in raster order; segments are -1 for others.

        Args:
            x: normalised pixels.
            layer: as in PackedVisionTransformer; not a layer before the last dropping.
        """
        stop = self.blocks_until(layer)
        if self.is_dense:
            return super().forward_features(x, layer=layer)
        if stop < self.pruning_loc[-1]:
            raise ValueError(
                f"layer {layer} lies before the last dropping, before block {self.pruning_loc[-1]} (from 0)"
            )
        x = self.embed(x)
        x, packing, segments, loss = self._mask(x, stop) if self.training else self._remove(x, stop)
        return self.to_tokens(x, packing, layer, segments, rate_loss=loss)

    def _remove(self, x: Tensor, stop: int) -> tuple[Tensor, Packing, Tensor, None]:
        """Eval. x: [B, P + N, D] → tokens [T + B·P, D] after `stop` blocks, their packing, segments."""
        B, P = len(x), self.num_prefix_tokens
        N, begin = x.shape[1] - P, 0
        x, packing = x.flatten(0, 1), Packing.equal(B, P + N, x.device)
        patches = torch.arange(N, device=x.device).repeat(B)
        for at, predictor, counts in zip(self.pruning_loc, self.score_predictor, self.token_counts(B, N), strict=True):
            x, begin = self.run_blocks(x, packing, begin, at), at
            prefix, x, inner = split_prefix(x, packing, P)
            counts = tuple(map(min, counts, inner.lengths))
            if counts != inner.lengths:
                rows = rows_of_highest(predictor(x, inner), inner, counts)
                x, patches, inner = x[rows], patches[rows], Packing(counts, x.device)
            x, packing = join_prefix(prefix, x, inner)
        return self.run_blocks(x, packing, begin, stop), packing, segments_of_kept(patches, inner, N), None

    def _mask(self, x: Tensor, stop: int) -> tuple[Tensor, Packing, Tensor, Tensor]:
        """Training: the same, as the predictors draw; and the ratio loss [B], the mean over stages of (share kept - ratio)^2."""
        B, P, device = len(x), self.num_prefix_tokens, x.device
        N, begin = x.shape[1] - P, 0
        x, packing = x.flatten(0, 1), Packing.equal(B, P + N, device)
        uniform = self.noise(torch.empty(B, len(self.pruning_loc) * N, device=device)).unflatten(1, (-1, N))
        targets = self.target_ratios(B).to(device)
        kept = policy = None
        loss = torch.zeros(B, device=device)
        for stage, (at, predictor) in enumerate(zip(self.pruning_loc, self.score_predictor, strict=True)):
            x, begin = self.run_blocks(x, packing, begin, at, policy), at
            _, patches, inner = split_prefix(x, packing, P)
            scores = predictor(patches, inner, kept).unflatten(0, (B, N))
            kept = draw_policy(scores, uniform[:, stage], kept)
            loss = loss + (kept.mean(1) - targets[:, stage]).square() / len(self.pruning_loc)
            policy = torch.cat([kept.new_ones(B, P), kept], 1)
        x = self.run_blocks(x, packing, begin, stop, policy)
        there = policy.detach() > 0.5
        packing = Packing.of(there.sum(1))
        kept = there[:, P:]
        segments = (kept.cumsum(1) - 1).masked_fill(~kept, -1)
        return x[there.flatten()], packing, segments, loss


def filter_checkpoint(state_dict: dict[str, Tensor], model: DynamicViT) -> dict[str, Tensor]:
    """timm's filter for weights of other names and sizes. A dense ViT's have no predictors, which then start as they are:
    training begins with a DeiT."""
    state = checkpoint_filter_fn(state_dict, model)
    if not any(name.startswith("score_predictor.") for name in state):
        state |= {name: value for name, value in model.state_dict().items() if name.startswith("score_predictor.")}
    return state


# Entry points

PRESETS = {f"dynamicvit_{size}_patch16_224": SIZES[size] for size in ("tiny", "small", "base")}
PRESETS["dynamicvit_256_patch16_224"] = {"embed_dim": 256, "num_heads": 4}
PRESETS["dynamicvit_mini_patch8_64"] = {**MINI, "pruning_loc": (1, 2)}
register(
    __name__,
    DynamicViT,
    PRESETS,
    mean=IMAGENET_DEFAULT_MEAN,  # DeiT's
    std=IMAGENET_DEFAULT_STD,
    filter_fn=filter_checkpoint,
    crop_pct=0.875,
)
