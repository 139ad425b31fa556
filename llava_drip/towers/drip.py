"""DRIP: a ViT that finds segments, pools each into one token, and runs its remaining blocks on those.

import timm, llava_drip
tower = timm.create_model("drip_base_patch16_224", compression=4.0, pool_after=4)
tokens = tower.forward_features(images)     # TokenBatch, a different number of tokens for each image
"""

from __future__ import annotations

import math

import torch
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor

from llava_drip.tokens import Packing, TokenBatch
from llava_drip.towers.boundaries import BOUNDARIES
from llava_drip.towers.pooling import mix_across_doubtful, pool_segments, segments_from_ends
from llava_drip.towers.rate import RATE_LOSSES, straight_through_loss
from llava_drip.towers.vit import PackedVisionTransformer


def sincos_positions(rows: int, columns: int, dim: int) -> Tensor:
    """[rows * columns, dim] sines and cosines of both coordinates, half a wave to a whole one across the image."""
    y, x = torch.meshgrid(torch.linspace(0, 1, rows), torch.linspace(0, 1, columns), indexing="ij")
    quarter = dim // 4
    frequencies = math.pi * 2 ** torch.linspace(0, 1, quarter)
    phases = torch.cat([c.flatten()[:, None] * frequencies for c in (y, x)], 1)
    waves = torch.cat([phases.sin(), phases.cos()], 1)
    return torch.nn.functional.pad(waves, (0, dim - waves.shape[1]))


class Drip(PackedVisionTransformer):
    """N dense blocks, boundaries, one token a segment, the other blocks.

    Parameters beyond timm's VisionTransformer lie under `boundary_predictor.`; without boundaries (compression=1) DRIP is the
    dense ViT exactly. The class token, where there is one, is never pooled.
    """

    def __init__(
        self,
        *,
        compression: float = 4.0,
        pool_after: int = 2,
        boundary: str = "gumbel",
        rate_loss: str | None = None,
        predictor_dim: int | None = None,
        position_scale: float = 0.2,
        budget: float | None = None,
        **vit,
    ):
        """
        Args:
            compression: patches per token to train for, >= 1; 4.0 means one token for 4 patches on average.
            pool_after: dense blocks before pooling, 0 .. depth.
            boundary: "gumbel" (learned) or "uniform" (simulated).
            rate_loss: "binomial" (the default); of learned boundaries only.
            predictor_dim: hidden width of the boundary predictor, default a quarter of the width.
            position_scale: how strong positions start: as waves of this amplitude (timm's start near zero, std 0.02). A pooled
                token keeps only the mean of its patches' positions, and a language model can look up by place only what stands
                out. 0.2 is a quarter of the patches' content under timm's initialization.
            budget: what set_compression is called with first, so that a saved tower keeps its budget.
            **vit: timm's VisionTransformer arguments (img_size, patch_size, embed_dim, depth, num_heads, class_token, ...).
        Raises:
            ValueError: an argument out of range, named.
        """
        if boundary == "uniform":
            for name, value in (("predictor_dim", predictor_dim), ("rate_loss", rate_loss)):
                if value is not None:
                    raise ValueError(
                        f'{name} has no meaning with boundary="uniform", which learns nothing; leave it out'
                    )
        rate_loss = rate_loss or "binomial"
        for name, value, known in (("boundary", boundary, BOUNDARIES), ("rate_loss", rate_loss, RATE_LOSSES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {sorted(known)}, got {value!r}")
        if not compression >= 1:
            raise ValueError(f"compression must be at least 1 (patches per token), got {compression}")
        self.position_scale = position_scale  # before timm's constructor, which initializes
        super().__init__(**vit)
        if not 0 <= pool_after <= len(self.blocks):
            raise ValueError(f"pool_after must be between 0 and depth {len(self.blocks)}, got {pool_after}")
        self.compression = float(compression)
        self.pool_after = pool_after
        self.boundary_predictor = BOUNDARIES[boundary](self.embed_dim, self.compression, predictor_dim)
        self.rate_loss_fn = RATE_LOSSES[rate_loss]
        self.set_compression(budget)

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
            self.boundary_predictor.init_weights()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"boundary_predictor.size_scale"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's, for layer-wise learning rates: the boundary predictor counts with the block that it follows."""
        matcher = super().group_matcher(coarse)
        predictor = (r"^boundary_predictor", (max(self.pool_after - 1, 0),))
        return {**matcher, "blocks": [*matcher["blocks"], predictor]}

    def set_compression(self, compression: float | Tensor | None) -> None:
        """Set the token budget without retraining.

        Args:
            compression: patches per token. A number, or a [B] tensor with one value an image, is met exactly in eval by the most
                probable boundaries, and is the target of the rate loss in training. None: each image decides (the default).
        """
        # On the CPU even where the model is being built on another device: the answer decides which path runs.
        asked = torch.as_tensor(
            self.compression if compression is None else compression, dtype=torch.float32, device="cpu"
        )
        if not bool((asked >= 1).all()):
            raise ValueError(f"compression must be at least 1 (patches per token), got {compression}")
        self.budget = None if compression is None else asked
        self.is_dense = bool((asked == 1).all())  # every patch its own segment

    def forward_features(self, x: Tensor, *, layer: int | None = None, ends: Tensor | None = None) -> TokenBatch:
        """Images [B, 3, height, width] → TokenBatch of the pooled tokens.

        Args:
            x: normalised pixels.
            layer: as in PackedVisionTransformer; not a layer before pooling.
            ends: [B, N] bool, forces the segments (True on each one's last patch): known objects, or measurements.
        """
        stop = self.blocks_until(layer)
        if stop < self.pool_after:
            raise ValueError(f"layer {layer} lies before pooling, which follows block {self.pool_after}")
        x = self.embed(x)
        B, L, P = len(x), x.shape[1], self.num_prefix_tokens
        packing = Packing((L,) * B, x.device)
        x = self.run_blocks(x.flatten(0, 1), packing, 0, self.pool_after).unflatten(0, (B, L))
        budget = self._budget(B, x.device)
        if ends is None and self.is_dense:
            x = self.run_blocks(x.flatten(0, 1), packing, self.pool_after, stop)
            return self.to_tokens(x, packing, layer, segments=None)

        ends, confidence, rate_loss = self._find_segments(x[:, P:], budget, ends)
        segments, lengths = segments_from_ends(ends)
        packing = Packing.of(lengths + P)
        values = self._pool(x, ends, confidence, segments, packing)
        values = self.run_blocks(values, packing, self.pool_after, stop)
        return self.to_tokens(values, packing, layer, segments, rate_loss=rate_loss)

    def _budget(self, B: int, device: torch.device) -> Tensor:
        """[B] compression asked of each image, on the device."""
        asked = self.compression if self.budget is None else self.budget
        asked = torch.as_tensor(asked, dtype=torch.float32).to(device)
        if asked.ndim and asked.shape != (B,):
            raise ValueError(f"set_compression got {tuple(asked.shape)} values for a batch of {B} images")
        return asked.expand(B)

    def _find_segments(self, x: Tensor, budget: Tensor, ends: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Patches [B, N, D] → ends [B, N] bool, confidence [B, N] of the ends (None: all certain), rate_loss [B]."""
        B, N, _ = x.shape
        predictor, last = self.boundary_predictor, torch.ones(B, 1, dtype=torch.bool, device=x.device)
        logits = predictor(x)
        nothing = logits.new_zeros(B)
        if ends is not None:
            if ends.shape != (B, N) or ends.dtype != torch.bool:
                raise ValueError(f"ends must be bool [{B}, {N}], got {ends.dtype} {tuple(ends.shape)}")
            return torch.cat([ends[:, :-1], last], 1), None, nothing
        if not (self.training and hasattr(predictor, "sample")):
            exact = None if self.budget is None else budget
            return torch.cat([predictor.decide(logits, exact), last], 1), None, nothing
        drawn, soft = predictor.sample(logits)
        # An image asked for compression 1 in a mixed batch: its rate would be 1, whose log-odds are infinite.
        rate = (1 / budget).clamp(max=1 - 1 / (2 * N))
        expected = 1 + torch.sigmoid(logits).sum(1)
        rate_loss = straight_through_loss(self.rate_loss_fn, 1 + drawn.sum(1), expected, N, rate)
        return torch.cat([drawn, last], 1), torch.cat([soft, last.float()], 1), rate_loss

    def _pool(self, x: Tensor, ends: Tensor, confidence: Tensor | None, segments: Tensor, packing: Packing) -> Tensor:
        """[B, P + N, D] → packed [T + B·P, D]; prefix tokens are segments of their own, with certain ends."""
        B, P = len(x), self.num_prefix_tokens
        if P:
            prefix = torch.arange(P, device=x.device).expand(B, P)
            segments = torch.cat([prefix, segments + P], 1)
        lengths = torch.tensor(packing.lengths, device=x.device)
        values, sizes = pool_segments(x, segments, lengths, packing.total)
        if confidence is not None:
            certain = confidence.new_ones(B, P)
            confidence = torch.cat([certain, confidence], 1)[torch.cat([certain.bool(), ends], 1)]
            values = mix_across_doubtful(values, sizes, confidence)
        return values + (sizes.log()[:, None] * self.boundary_predictor.size_scale).to(values.dtype)


SIZES = {
    # Narrow: timm's std of 0.02 would be too faint to learn fast, its "jax" initialization grows with 1 / width.
    "mini": {
        "embed_dim": 96,
        "depth": 4,
        "num_heads": 3,
        "pool_after": 1,
        "weight_init": "jax",
        "position_scale": 1.0,
    },
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}


def _presets() -> dict[str, dict]:
    """Entry-point names → default arguments. A rate in the name serves programs that can pass nothing but a name."""
    presets = {
        f"drip_{size}_patch{patch}_{image}": {**SIZES[size], "patch_size": patch, "img_size": image}
        for size in ("tiny", "small", "base", "large")
        for patch in (32, 16, 14)
        for image in (224, 336)
    }
    for patch in (32, 16):
        for rate in (1, 2, 4, 10):  # 1: the plain ViT
            base = presets[f"drip_base_patch{patch}_224"]
            presets[f"drip_base_patch{patch}_224_{rate}x"] = {**base, "compression": rate}
            if rate > 1:  # 4 dense blocks and 8 on the pooled tokens, instead of 2 and 10
                presets[f"drip_base_patch{patch}_224_{rate}x_pool4"] = {**base, "compression": rate, "pool_after": 4}
    for rate in (1, 2, 4, 10):  # for CPUs
        presets[f"drip_mini_patch8_64_{rate}x"] = {
            **SIZES["mini"],
            "patch_size": 8,
            "img_size": 64,
            "compression": rate,
        }
    return presets


PRESETS = _presets()
default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, preset["img_size"], preset["img_size"]),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": OPENAI_CLIP_MEAN,
            "std": OPENAI_CLIP_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        for name, preset in PRESETS.items()
    }
)


def _entry_point(name: str, preset: dict):
    def create(pretrained: bool = False, **kwargs) -> Drip:
        arguments = {**preset, **kwargs}
        model = build_model_with_cfg(Drip, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **arguments)
        # What rebuilds the same tower, for those who save it: the caller's plain arguments, not timm's bookkeeping.
        model.model_args = {
            key: value
            for key, value in kwargs.items()
            if isinstance(value, (bool, int, float, str, tuple, list)) and key not in ("num_classes", "cache_dir")
        }
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"DRIP with {preset}."
    return create


for _name, _preset in PRESETS.items():
    globals()[_name] = register_model(_entry_point(_name, _preset))
