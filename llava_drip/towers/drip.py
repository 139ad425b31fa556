"""DRIP: a ViT that finds segments, pools each into one token, and runs its remaining blocks on those.

import timm, llava_drip
tower = timm.create_model("drip_base_patch16_224", compression=4.0, pool_after=4)
tokens = tower.forward_features(images)     # TokenBatch, a different number of tokens for each image
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_drip.tokens import Packing, TokenBatch
from llava_drip.towers.arguments import asked_compression, check_arguments, check_sampling
from llava_drip.towers.boundaries import tokens_for_budget
from llava_drip.towers.checks import numbers, whole
from llava_drip.towers.cutting import Cut, Question
from llava_drip.towers.places import Places, Relative, rotary_angles, sincos_positions
from llava_drip.towers.pooling import (
    detail_lost,
    mix_across_doubtful,
    part_of_the_way,
    pool_segments,
    pool_sizes,
    segments_from_ends,
)
from llava_drip.towers.rate import RATE_LOSSES, RateOptions
from llava_drip.towers.rules import RULES
from llava_drip.towers.scan import in_raster_order, scan_order
from llava_drip.towers.vit import PackedVisionTransformer, join_prefix, split_prefix


class Drip(PackedVisionTransformer):
    """N dense blocks, boundaries, one token a segment, the other blocks; or the same twice, at two depths.

    Parameters beyond timm's VisionTransformer lie under `boundary_predictor.` and, of further poolings, `deeper_predictors.`;
    without boundaries (compression=1) DRIP is the dense ViT exactly. The class token, where there is one, is never pooled.
    """

    def __init__(
        self,
        *,
        compression: float | Sequence[float] = 4.0,
        pool_after: int | Sequence[int] = 2,
        boundary: str = "gumbel",
        rate_loss: str | None = None,
        rate_spread: float | None = None,
        rate_interval: Sequence[float] | None = None,
        sampling: str | None = None,
        detail_weight: float | None = None,
        blend: float | None = None,
        scan: str = "raster",
        relative: str = "none",
        size_bias: bool = True,
        mean_over: str = "patches",
        elastic: Sequence[float] | None = None,
        predictor_dim: int | None = None,
        position_scale: float = 0.2,
        budget: float | None = None,
        over: str = "image",
        **vit,
    ):
        """
        Args:
            compression: patches per token to train for, >= 1; 4.0 means one token for 4 patches on average. Where pool_after
                names several depths, one number for each: (2.0, 2.0) keeps half and then half of that, 4.0 in all.
            pool_after: dense blocks before pooling, 0 .. depth; or several, rising, as (2, 6).
            boundary: a rule of rules.py: "gumbel", "similarity", "entropy"; "uniform" is simulated.
            rate_loss: of rate.py: "binomial" (the default), "lower_bound", "interval"; of rules that are sampled only.
            rate_spread: lambda of "lower_bound", default 1.
            rate_interval: (low, high) of "interval" as multiples of the target rate, default (0.5, 1).
            sampling: how training draws the boundaries of such rules: "topk" (default), in each image as many as its
                probabilities add up to, by the highest logits plus noise; "gumbel", each place by itself.
            detail_weight: of what pooling loses of the patches' contents, beside the rate loss; of sampled rules. It draws
                boundaries to where contents change, and to pictures where they change more often.
            blend: how far the tokens of doubtful boundaries run into each other in training, 0 (default) .. 1. The task's
                gradient reaches the predictor either way; what a boundary does to the task shows in it best where tokens do
                blend, which costs accuracy (docs/results/accuracy.md).
            scan: order in which patches follow one another: "raster", "serpentine", "hilbert". Segments are runs along it, and
                tokens come in its order.
            relative: "rotary" turns queries and keys by each token's centroid, in all blocks; "none" leaves attention as it is in
                pretrained ViTs. Learned absolute positions are timm's pos_embed="learn" | "none", beside either.
            size_bias: attention logits get the log of the patches that a token stands for.
            mean_over: what global_pool="avg" counts once: "patches", so that a token counts as often as it has patches, or
                "tokens".
            elastic: (low, high): training draws the compression of each image between these, evenly in its logarithm, so that one
                tower serves every budget; not while set_compression asks for one. `compression` remains what the rate loss
                trains for, in which the image decides.
            predictor_dim: hidden width of the boundary predictor, at least 1; default a quarter of the width.
            position_scale: how strong positions start: as waves of this amplitude (timm's start near zero, std 0.02). A pooled
                token keeps only the mean of its patches' positions, and a language model can look up by place only what stands
                out. 0.2 is a quarter of the patches' content under timm's initialization.
            budget, over: what set_compression is called with first, so that a saved tower keeps its budget.
            **vit: norm_eps, and timm's VisionTransformer arguments (img_size, patch_size, embed_dim, depth, num_heads,
                class_token, ...).
        Raises:
            ValueError: an argument out of range, named.
        """
        depths = tuple(pool_after) if isinstance(pool_after, (tuple, list)) else (pool_after,)
        rates = tuple(compression) if isinstance(compression, (tuple, list)) else (compression,)
        numbers("compression", rates, least=1)
        for depth in depths:
            whole("pool_after", depth, least=0)
        check_arguments(
            boundary,
            rate_loss,
            rate_spread,
            rate_interval,
            predictor_dim,
            scan,
            relative,
            elastic,
            size_bias,
            position_scale,
        )
        check_sampling(boundary, sampling, detail_weight, blend)
        if len(rates) != len(depths) or not depths:
            raise ValueError(
                f"compression {compression} and pool_after {pool_after}: give one compression for each pooling"
            )
        if elastic is not None and math.prod(rates) == 1:
            raise ValueError("elastic has no meaning with compression=1, the dense tower; leave one of them out")
        self.position_scale = position_scale  # before timm's constructor, which initializes
        super().__init__(mean_over=mean_over, **vit)
        if max(depths) > len(self.blocks):
            raise ValueError(f"pool_after must be between 0 and depth {len(self.blocks)}, got {pool_after}")
        if list(depths) != sorted(set(depths)):
            raise ValueError(f"pool_after must rise from pooling to pooling, got {pool_after}")
        head_dim = self.embed_dim // vit.get("num_heads", 12)  # timm's default
        if relative == "rotary" and head_dim % 4:
            raise ValueError(f'relative="rotary" needs a head width that 4 divides, got {head_dim}')
        self.compression, self.rates = float(math.prod(rates)), tuple(float(rate) for rate in rates)
        self.pool_after, self.pool_depths = pool_after, depths
        self.scan, self.relative, self.size_bias, self.head_dim = scan, relative, size_bias, head_dim
        self.sampling, self.detail_weight = sampling or "topk", 0.3 if detail_weight is None else detail_weight
        self.blend = blend or 0.0
        self.elastic = None if elastic is None else tuple(float(bound) for bound in elastic)
        self.rate_loss_fn = RATE_LOSSES[rate_loss or "binomial"]
        self.rate_options = RateOptions(
            **({} if rate_spread is None else {"spread_weight": rate_spread}),
            **({} if rate_interval is None else {"low": rate_interval[0], "high": rate_interval[1]}),
        )
        rules = [RULES[boundary](self.embed_dim, rate, predictor_dim) for rate in self.rates]
        self.boundary_predictor, self.deeper_predictors = rules[0], nn.ModuleList(rules[1:])
        # Where uniform numbers in 0 .. 1 of a tensor's shape come from; a trainer may give ranks a common source
        # (training/seeds.py).
        self.noise: Callable[[Tensor], Tensor] = torch.rand_like
        self.set_compression(budget, over)

    counts_vary = True  # from image to image, where no budget is set

    @property
    def boundary_predictors(self) -> list[nn.Module]:
        """One rule for each pooling, in order."""
        return [self.boundary_predictor, *self.deeper_predictors]

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        if any(parameter.numel() == 0 for parameter in self.parameters()):
            return  # built by from_pretrained under ZeRO-3: divided among the ranks already, and about to be loaded
        super().init_weights(mode, needs_reset=needs_reset)
        if self.pos_embed is not None:
            prefix = 0 if self.no_embed_class else self.num_prefix_tokens
            positions = sincos_positions(*self.patch_embed.grid_size, self.embed_dim)
            with torch.no_grad():
                self.pos_embed[0, prefix:].copy_(self.position_scale * positions)
        if hasattr(self, "boundary_predictor"):  # timm calls this first from within its own constructor
            for rule in self.boundary_predictors:
                rule.init_weights()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        rules = ["boundary_predictor", *(f"deeper_predictors.{i}" for i in range(len(self.deeper_predictors)))]
        return super().no_weight_decay() | {f"{rule}.size_scale" for rule in rules}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's, for layer-wise learning rates: a boundary predictor counts with the block that it follows."""
        matcher = super().group_matcher(coarse)
        names = ["^boundary_predictor", *(rf"^deeper_predictors\.{i}" for i in range(len(self.deeper_predictors)))]
        predictors = [(name, (max(depth - 1, 0),)) for name, depth in zip(names, self.pool_depths)]
        return {**matcher, "blocks": [*matcher["blocks"], *predictors]}

    @property
    def rate_loss_weight(self) -> float:
        """What a trainer multiplies the rate_loss with, where nothing else is asked for. 5 holds the rate against the task; a
        loss of the rule's own is for its own weights alone."""
        return 5.0 if self.boundary_predictor.samples else 1.0

    @property
    def has_boundary_loss(self) -> bool:
        """Whether training gives a rate_loss to add to the task's."""
        return not self.is_dense and self.boundary_predictor.has_loss

    def freeze_boundaries(self) -> None:
        """No gradient for the predictors: at compression 1 they do not run, and DistributedDataParallel would wait for theirs."""
        for rule in self.boundary_predictors:
            rule.requires_grad_(False)

    def set_compression(self, compression: float | Tensor | None, over: str = "image") -> None:
        """Set the token budget without retraining.

        Args:
            compression: patches per token. A number, or a [B] tensor with one value an image, is met exactly in eval by the most
                probable boundaries, and is the target of the rate loss in training. None: each image decides (the default).
            over: "image": each image gets its number. "batch": the images of a batch share the sum of theirs, the most probable
                boundaries wherever they lie; then an image's tokens depend on its batch-mates. Eval only.
        """
        if over not in ("image", "batch"):
            raise ValueError(f'over must be "image" or "batch", got {over!r}')
        asked = asked_compression(compression, self.compression)
        if compression is None and over == "batch":
            raise ValueError('over="batch" shares a budget; give one')
        self.budget = None if compression is None else asked
        self.over = over
        self.is_dense = bool((asked == 1).all())  # every patch its own segment

    def forward_features(self, x: Tensor, *, layer: int | None = None, ends: Tensor | None = None) -> TokenBatch:
        """Images [B, 3, height, width] → TokenBatch of the pooled tokens, in the order of the scan.

        Args:
            x: normalised pixels.
            layer: as in PackedVisionTransformer; not a layer before (the last) pooling, where there is pooling.
            ends: [B, N] bool in the order of the scan, forces the segments (True on each one's last patch): known objects, or
                measurements.
        """
        stop, pools = self.blocks_until(layer), not (self.is_dense and ends is None)
        if pools and stop < self.pool_depths[-1]:
            raise ValueError(f"layer {layer} lies before pooling, which follows block {self.pool_depths[-1]}")
        grid, B, P = self.patch_embed.dynamic_feat_size(x.shape[-2:]), len(x), self.num_prefix_tokens
        content = self.patch_embed(x)
        x = self.norm_pre(self._pos_embed(content))
        content, N = content.reshape(B, -1, self.embed_dim), grid[0] * grid[1]
        order = None
        if self.scan != "raster":
            order = scan_order(self.scan, *grid).to(x.device)
            x, content = torch.cat([x[:, :P], x[:, P:][:, order]], 1), content[:, order]
        places = self._patch_places(grid, B, order, x.device)
        packing, x, content = Packing.equal(B, P + N, x.device), x.flatten(0, 1), content.flatten(0, 1)
        relative = self._relative(places, packing)
        probs = loss = None
        begin = 0
        if pools:
            uniform = self._random_numbers(B, N, x.device)
            asked = self._asked(B, x.device, uniform)
            loss = x.new_zeros(B, dtype=torch.float32)
            for stage, depth in enumerate(self.pool_depths):
                x = self.run_blocks(x, packing, begin, depth, relative)
                prefix, x, inner = split_prefix(x, packing, P)
                cut = self._cut(stage, x, content, inner, places, asked, uniform, ends)
                probs = cut.probabilities if probs is None else probs * cut.probabilities[places.owner]
                loss = loss + cut.loss
                x, content, inner, places, lost = self._pool(stage, x, content, inner, places, cut)
                loss = loss if lost is None else loss + self.detail_weight * lost / N
                x, packing = join_prefix(prefix, x, inner)
                relative, begin = self._relative(places, packing, pooled=True), depth
        x = self.run_blocks(x, packing, begin, stop, relative)
        segments = places.owner.unflatten(0, (B, N))
        segments = in_raster_order(segments - segments[:, :1], order)
        if not self.boundary_predictor.has_loss:
            probs = None  # even cuts know of none
        probs = None if probs is None else in_raster_order(probs.unflatten(0, (B, N)), order)
        return self.to_tokens(x, packing, layer, segments, rate_loss=loss, boundary_probs=probs)

    def _patch_places(self, grid: tuple[int, int], B: int, order: Tensor | None, device: torch.device) -> Places:
        """Every patch a token. In pictures of another size than the tower's own, coordinates are scaled, as positions are
        interpolated."""
        rows, columns = (
            (torch.arange(n, dtype=torch.float32, device=device) + 0.5) * (own / n) - 0.5
            for n, own in zip(grid, self.patch_embed.grid_size)
        )
        centroids = torch.cartesian_prod(rows, columns)
        centroids = (centroids if order is None else centroids[order]).repeat(B, 1)
        return Places(centroids, centroids.new_ones(len(centroids)), torch.arange(len(centroids), device=device))

    def _relative(self, places: Places, packing: Packing, pooled: bool = False) -> Relative | None:
        """What attention over these tokens knows of their places and, once pooled, sizes; packing: prefix tokens included."""
        sized = self.size_bias and pooled  # log 1 is nothing
        if self.relative == "none" and not sized:
            return None
        P = self.num_prefix_tokens
        inner = packing.grown_by(-P) if P else packing

        def with_prefix(t: Tensor) -> Tensor:  # [T, ...]; zeros for prefix tokens: not turned, one patch
            prefix = t.new_zeros(len(inner.lengths), P, *t.shape[1:]) if P else None
            return join_prefix(prefix, t, inner)[0]

        cos = sin = None
        if self.relative == "rotary":
            angles = with_prefix(rotary_angles(places.centroids, self.head_dim))
            cos, sin = angles.cos(), angles.sin()
        return Relative(cos, sin, with_prefix(places.sizes.log()) if sized else None)

    @property
    def _draws_budgets(self) -> bool:
        return self.training and self.elastic is not None and self.budget is None

    def _random_numbers(self, B: int, N: int, device: torch.device) -> Tensor | None:
        """[B, 1 + poolings x N] in 0 .. 1, for the budget and for each pooling's places; None where nothing is left to chance.
        One call of `noise` a step, however many poolings."""
        sampled = self.training and self.boundary_predictor.samples
        if not (sampled or self._draws_budgets):
            return None
        return self.noise(torch.empty(B, 1 + len(self.pool_depths) * N, device=device))

    def _asked(self, B: int, device: torch.device, uniform: Tensor | None) -> Tensor:
        """[B] compression asked of each image, on the device."""
        if self._draws_budgets:
            low, high = (math.log(bound) for bound in self.elastic)
            return torch.exp(low + (high - low) * uniform[:, 0])
        asked = self.compression if self.budget is None else self.budget
        asked = torch.as_tensor(asked, dtype=torch.float32).to(device)
        if asked.ndim and asked.shape != (B,):
            raise ValueError(f"set_compression got {tuple(asked.shape)} values for a batch of {B} images")
        return asked.expand(B)

    def share_of_compression(self, upto: int) -> float:
        """What the first `upto` poolings contribute to compressing, 0 .. 1, in its logarithm."""
        if self.compression == 1:
            return upto / len(self.rates)
        return math.log(math.prod(self.rates[:upto])) / math.log(self.compression)

    def _cut(
        self,
        stage: int,
        x: Tensor,
        content: Tensor,
        packing: Packing,
        places: Places,
        asked: Tensor,
        uniform: Tensor | None,
        ends: Tensor | None,
    ) -> Cut:
        """Decides where segments of x [T, D] end, at pooling number `stage`."""
        rule, B, N = self.boundary_predictors[stage], len(packing.lengths), len(places.owner) // len(packing.lengths)
        last_stage = stage == len(self.pool_depths) - 1
        question = Question.ask(rule, x, content, packing)
        if ends is not None:
            if ends.shape != (B, N) or ends.dtype != torch.bool:
                raise ValueError(f"ends must be bool [{B}, {N}], got {ends.dtype} {tuple(ends.shape)}")
            # All of it by the last pooling; the tokens that reach it are still the patches.
            return question.forced(ends.flatten() if last_stage else torch.ones_like(question.last))

        boundaries = None
        if self._draws_budgets or self.budget is not None:
            final = tokens_for_budget(asked, N)
            # On the way there: a part of the whole compression, and never fewer than in the end.
            count = (N / asked ** self.share_of_compression(stage + 1)).round().long()
            boundaries = (final if last_stage else torch.maximum(count, final)) - 1
        if not (self.training and rule.samples):
            return question.decided(boundaries, "image" if self.training else self.over)
        target = self.rates[stage]
        if not self._draws_budgets:  # what set_compression asks for, or else the same
            target = asked ** (self.share_of_compression(stage + 1) - self.share_of_compression(stage))
        # Where compression 1 is asked for, the rate would be 1, whose log-odds are infinite.
        rate = (1 / torch.as_tensor(target, device=x.device)).clamp(max=1 - 1 / (2 * N)).expand(B)
        # Of a pooled token, that of its last patch: the same however long the others of the batch are.
        uniform = uniform[:, 1 + stage * N : 1 + (stage + 1) * N].flatten()[places.sizes.cumsum(0).long() - 1]
        loss = partial(self.rate_loss_fn, options=self.rate_options)
        return question.drawn(uniform, self.sampling, loss, rate, boundaries if self._draws_budgets else None)

    def _pool(
        self, stage: int, x: Tensor, content: Tensor, packing: Packing, places: Places, cut: Cut
    ) -> tuple[Tensor, Tensor, Packing, Places, Tensor | None]:
        """One token for each segment of x [T, D], and the same of the content and of the places; and how many patches' worth of
        content this loses in each image, [B] fp32, where training wants it known.

        Content is what patches hold before any block: what attention has spread over the image cannot be lost.
        """
        rule, segments, image = self.boundary_predictors[stage], segments_from_ends(cut.ends), packing.image_of_token
        nothing = torch.zeros(len(packing.lengths), device=x.device)
        packing = Packing.of(nothing.long().index_add(0, image, cut.ends.long()))
        pool = partial(pool_segments, segments=segments, total=packing.total, sizes=places.sizes)
        values, sizes, lost = pool(x), pool_sizes(segments, packing.total, places.sizes), None
        if cut.confidence is not None:
            confidence = cut.confidence[cut.ends]
            values = part_of_the_way(values, mix_across_doubtful(values, sizes, confidence), self.blend)
            if self.detail_weight:
                normal = F.layer_norm(content.detach().float(), content.shape[-1:])
                kept = mix_across_doubtful(pool(normal), sizes, confidence)
                lost = nothing.index_add(0, image, detail_lost(normal, segments, places.sizes, kept))
        values = values + (sizes.log()[:, None] * rule.size_scale).to(values.dtype)
        deeper = stage + 1 < len(self.pool_depths)
        places = Places(pool(places.centroids), sizes, segments[places.owner])
        return values, pool(content) if deeper else content, packing, places, lost
