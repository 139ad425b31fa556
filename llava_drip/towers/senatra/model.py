"""SeNaTra: a four-stage backbone, stride 4 to 32, whose down-sampling is spatial grouping, so that its final tokens are segments.

The transformer trunk is NAT's, with rotary positions in place of biases (section 4 of the paper); a stage is the grouping layer
that leads into it, and blocks. Grouping is local except into the last stage. There each token stands for a region anywhere in
the picture, so attention among them is global (at 224 pixels NAT's window of 7 is that as well).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.layers import PatchEmbed, to_2tuple
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llava_drip.tokens import Packing, TokenBatch
from llava_drip.towers.senatra.assignment import Assignment, halved, hard_segments, soft_maps, upsample
from llava_drip.towers.senatra.attention import GridBlock, Neighborhood
from llava_drip.towers.senatra.grouping import SpatialGrouping, bias_sides, resize_bias

WEIGHT_INITS = ("normal", "lecun")


@dataclass(frozen=True)
class Segmentation:
    """What the tower made of B images, and of which parts of them.

    Attributes:
        tokens: K final tokens of each image.
        maps: [B, K, h, w] fp32 over the grid of patches (a quarter of the picture's size): how much of each patch went into
            each token; they sum to 1 at every patch.
        assignments: of the grouping layers, in order.
    """

    tokens: TokenBatch
    maps: Tensor
    assignments: tuple[Assignment, ...]


class Stage(nn.Module):
    """The grouping layer that leads into a stage (the first has none), and the stage's blocks."""

    def __init__(self, grouping: SpatialGrouping | None, blocks: Sequence[GridBlock], kernel_size: int | None):
        super().__init__()
        self.grouping, self.blocks, self.kernel_size = grouping, nn.ModuleList(blocks), kernel_size
        self.grad_checkpointing = False

    def forward(self, x: Tensor, blocks: int | None = None) -> tuple[Tensor, Assignment | None]:
        """[B, h, w, C] of the stage before → [B, h', w', C'] after the first `blocks` blocks (None: all), and the assignment."""
        assignment = None
        if self.grouping is not None:
            x, assignment = self._run(self.grouping, x)
        attention = self.blocks[0].attn
        head_dim = x.shape[-1] // attention.num_heads
        near = Neighborhood.of(tuple(x.shape[1:3]), self.kernel_size, head_dim, x.device)
        for block in self.blocks[:blocks]:
            x = self._run(block, x, near)
        return x, assignment

    def _run(self, module: nn.Module, *inputs):
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)


class Senatra(nn.Module):
    """The tower. Its tokens are as many for every picture of a size; there is no budget to set.

    Attributes:
        patch_embed: timm's, whose grid (stride 4) TokenBatch.segments refers to.
        stages: four, of which the last one's blocks count for `layer`.
    """

    num_prefix_tokens = 0
    budget_hint = "its number of tokens is fixed, one for 8 x 8 patches"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 18, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 3.0,
        kernel_size: int = 7,
        group_window: int = 3,
        iterations: int = 3,
        init_values: float | None = None,
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "normal",
    ):
        """
        Args:
            img_size: pixels, a multiple of patch_size.
            embed_dim: width of the first stage; each stage doubles it.
            depths, num_heads: blocks of each stage, and heads of their attention.
            mlp_ratio: of the blocks and of the grouping layers.
            kernel_size: side of the window of neighborhood attention, odd.
            group_window: side of the square of output tokens that an input token may go to in local grouping, odd.
            iterations: of a grouping layer (L).
            init_values: start of the layer scales; None: none.
            dynamic_img_size: take pictures of any size that is a multiple of patch_size.
            drop_rate: dropout before the classifier; proj_drop_rate, attn_drop_rate, drop_path_rate: in the blocks, as timm's.
            weight_init: of linear layers: "normal", std 0.02, or "lecun", 1 / sqrt(inputs), for narrow towers.
        Raises:
            ValueError: an argument that does not fit, by name.
        """
        super().__init__()
        _check(img_size, patch_size, embed_dim, depths, num_heads, kernel_size, group_window, iterations, weight_init)
        self._check_pooling(global_pool)
        self.num_classes, self.global_pool = num_classes, global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim * 2 ** (len(depths) - 1)
        self.patch_embed = PatchEmbed(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            norm_layer=nn.LayerNorm,
            output_fmt="NHWC",
            strict_img_size=not dynamic_img_size,
        )
        drop_paths = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        grid, stages, last = self.patch_embed.grid_size, [], len(depths) - 1
        for i, (depth, heads) in enumerate(zip(depths, num_heads)):
            dim, grouping = embed_dim * 2**i, None
            if i:
                window = None if i == last else group_window
                grouping = SpatialGrouping(dim // 2, dim, grid, window, iterations, mlp_ratio)
                grid = halved(grid)
            drops = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate, "init_values": init_values}
            blocks = [GridBlock(dim, heads, mlp_ratio, drop_path=next(drop_paths), **drops) for _ in range(depth)]
            stages.append(Stage(grouping, blocks, None if i == last else kernel_size))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(self.num_features)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.weight_init = weight_init
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            std = 0.02 if self.weight_init == "normal" else module.in_features**-0.5
            nn.init.trunc_normal_(module.weight, std=std)
            nn.init.zeros_(module.bias)

    @staticmethod
    def _check_pooling(global_pool: str | None) -> None:
        if global_pool not in (None, "avg"):
            raise ValueError(f'global_pool must be "avg", got {global_pool!r}')

    @property
    def blocks(self) -> nn.ModuleList:
        """Blocks of the last stage, those on the final tokens."""
        return self.stages[-1].blocks

    @property
    def most_tokens(self) -> int:
        """Tokens of a picture of the tower's size: fewer than patches."""
        grid = self.patch_embed.grid_size
        for _ in self.stages[1:]:
            grid = halved(grid)
        return grid[0] * grid[1]

    def forward_features(self, x: Tensor, *, layer: int | None = None) -> TokenBatch:
        """Images [B, 3, height, width] → TokenBatch: the last stage's tokens, in raster order of its grid.

        Args:
            x: normalised pixels.
            layer: None for all blocks and the final norm; -1, -2, ... for the un-normed output of the last, the penultimate
                block and so on, of the last stage.
        """
        tokens, _ = self._encode(x, layer)
        return tokens

    def forward_segmentation(self, x: Tensor, *, layer: int | None = None) -> Segmentation:
        """forward_features with the soft maps and assignments. Gradients run through both."""
        tokens, assignments = self._encode(x, layer)
        return Segmentation(tokens, soft_maps(assignments), assignments)

    def forward_semantic(self, x: Tensor) -> Tensor:
        """Images → [B, num_classes, h, w] fp32 logits over the grid of patches: the classifier's of each final token, spread
        over the picture by the maps."""
        tokens, assignments = self._encode(x, None)
        logits = self.head(tokens.values).float().unflatten(0, (len(tokens), -1))
        return upsample(assignments, logits).transpose(1, 2).unflatten(2, assignments[0].grid)

    def _encode(self, x: Tensor, layer: int | None) -> tuple[TokenBatch, tuple[Assignment, ...]]:
        depth, assignments = len(self.blocks), []
        if layer is not None and not -depth <= layer <= -1:
            raise ValueError(
                f"layer must be None or in -{depth} .. -1, the blocks of the last stage, whose tokens these are; got {layer}"
            )
        x = self.patch_embed(x)
        for stage in self.stages[:-1]:
            x, assignment = stage(x)
            assignments.append(assignment)
        x, assignment = self.stages[-1](x, None if layer is None else depth + layer + 1)
        assignments = (*assignments[1:], assignment)  # the first stage has none
        if layer is None:
            x = self.norm(x)
        packing = Packing.equal(len(x), x.shape[1] * x.shape[2], x.device)
        segments = hard_segments(assignments)
        return TokenBatch(x.flatten(0, 2), packing.lengths_tensor, segments, _packing=packing), assignments

    def forward_head(self, t: TokenBatch, pre_logits: bool = False) -> Tensor:
        """TokenBatch → logits [B, num_classes] (or the pooled [B, D] before the classifier)."""
        x = self.head_drop(t.mean())
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self._check_pooling(global_pool)
        self.num_classes = num_classes
        weight = self.norm.weight
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
            self._init_weights(self.head)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make the tower one for pictures of another size: the dense layer's table of biases is stretched."""
        _check_size(img_size, self.patch_embed.patch_size[0])
        self.patch_embed.set_input_size(to_2tuple(img_size))
        grid = self.patch_embed.grid_size
        for stage in self.stages[1:]:
            stage.grouping.set_input_size(grid)
            grid = halved(grid)

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's groups of parameters, for layer-wise learning rates."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))]}
        blocks = [(r"^stages\.(\d+)\.grouping", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": blocks}

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(("position_bias", "log_scale"))}


def checkpoint_filter_fn(state_dict: dict, model: Senatra) -> dict:
    """Weights of a tower for another picture size: the dense layer's biases are stretched."""
    state_dict, grid = dict(state_dict), model.patch_embed.grid_size
    for i, stage in enumerate(model.stages[1:], 1):
        name = f"stages.{i}.grouping.position_bias"
        if stage.grouping.window is None and name in state_dict:
            table = state_dict[name]
            state_dict[name] = resize_bias(table.float(), bias_sides(grid)).to(table.dtype)
        grid = halved(grid)
    return state_dict


def _check_size(img_size: int | tuple[int, int], patch_size: int) -> None:
    if any(side < patch_size or side % patch_size for side in to_2tuple(img_size)):
        raise ValueError(f"img_size {img_size}: each side must be a multiple of the patch size, {patch_size} pixels")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(
    img_size, patch_size, embed_dim, depths, num_heads, kernel_size, group_window, iterations, weight_init
) -> None:
    """ValueError naming an argument of Senatra that does not fit."""
    numbers = (
        ("embed_dim", embed_dim),
        ("kernel_size", kernel_size),
        ("group_window", group_window),
        ("iterations", iterations),
    )
    for name, value in numbers:
        if not _is_whole(value):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
    for name, values in (("depths", depths), ("num_heads", num_heads)):
        if not isinstance(values, (tuple, list)) or not all(map(_is_whole, values)):
            raise ValueError(f"{name} must be whole numbers, one a stage, got {values!r}")
    _check_size(img_size, patch_size)
    if len(depths) < 2 or len(depths) != len(num_heads):
        raise ValueError(f"depths {depths} and num_heads {num_heads}: one number a stage, of at least two stages")
    if min(depths) < 1:
        raise ValueError(f"depths {depths}: a stage has at least one block")
    for i, heads in enumerate(num_heads):
        if embed_dim * 2**i % (4 * heads):
            raise ValueError(
                f"num_heads {num_heads}: stage {i + 1} is {embed_dim * 2**i} wide, whose heads must be as wide as a multiple "
                "of 4 (rotary positions in two directions)"
            )
    for name, value in (("kernel_size", kernel_size), ("group_window", group_window)):
        if value < 1 or value % 2 == 0:
            raise ValueError(f"{name} must be odd and positive, got {value}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if weight_init not in WEIGHT_INITS:
        raise ValueError(f"weight_init must be one of {WEIGHT_INITS}, got {weight_init!r}")
