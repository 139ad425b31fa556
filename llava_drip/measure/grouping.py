"""What SeNaTra's grouping layers cost: multiply-accumulates in closed form, seconds, and the largest tensor that they make.

One MAC is one multiply and one add; norms, softmax, biases and activations are left out. Neighborhood attention can be counted
in two ways: the pairs of a token and a token of its window, as papers count and a kernel of its own would compute them, or all
pairs that are multiplied here, those that the tiles' mask then drops included.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava_drip.measure.speed import interleave
from llava_drip.towers.senatra.assignment import halved
from llava_drip.towers.senatra.attention import Neighborhood
from llava_drip.towers.senatra.grouping import SpatialGrouping
from llava_drip.towers.senatra.model import Senatra


@dataclass(frozen=True)
class LayerCost:
    """One grouping layer for pictures of one size.

    Attributes:
        size: pixels of a side.
        layer: 1 leads into the second stage.
        window: None: dense.
        tokens_in, tokens_out: of one picture.
        macs: of one picture.
        pair_macs: those of them that pairs of an input and an output token cost: k qᵀ and A_downᵀ v, all iterations.
        seconds, low, high: inference of the batch: median, smallest and largest of the rounds.
        largest_mib: the largest tensor that is made on the way, of one picture.
    """

    size: int
    layer: int
    window: int | None
    tokens_in: int
    tokens_out: int
    macs: int
    pair_macs: int
    seconds: float
    low: float
    high: float
    largest_mib: float


def _tokens(grid: tuple[int, int]) -> int:
    return grid[0] * grid[1]


def grouping_macs(layer: SpatialGrouping, grid: tuple[int, int]) -> dict[str, int]:
    """MACs of a grouping layer over one picture's grid of input tokens, by part:

    init: the strided convolution; key_value: k and v; update: q and the MLP, all iterations; pairs: k qᵀ and A_downᵀ v, all
    iterations.
    """
    n, m = _tokens(grid), _tokens(halved(grid))
    weights = layer.query.weight.numel() + layer.mlp.fc1.weight.numel() + layer.mlp.fc2.weight.numel()
    return {
        "init": m * layer.init.weight.numel(),
        "key_value": n * (layer.key.weight.numel() + layer.value.weight.numel()),
        "update": layer.iterations * m * weights,
        "pairs": layer.iterations * 2 * _pairs(layer, grid) * layer.query.out_features,
    }


def _pairs(layer: SpatialGrouping, grid: tuple[int, int]) -> int:
    """Entries of A_up that are kept."""
    n, m = _tokens(grid), _tokens(halved(grid))
    return 4 * m * layer.window**2 if layer.window else n * m  # locally an odd side is filled up


def senatra_macs(tower: Senatra, *, masked: bool = False) -> dict[str, int]:
    """MACs of one picture of the tower's size, by part:

    patch_embed, blocks (without attention itself), attention (q kᵀ and its product with v), init (the grouping layers' strided
    convolutions, where NAT has its down-sampling), grouping (the rest of these layers), segments (the product of A_up), head.
    Their sum is the tower's.

    masked: count the pairs of attention that tiles multiply and their mask drops, too.
    """
    rows, columns = tower.patch_embed.grid_size
    parts = dict.fromkeys(("patch_embed", "blocks", "attention", "init", "grouping", "segments", "head"), 0)
    parts["patch_embed"] = rows * columns * tower.patch_embed.proj.weight.numel()
    parts["head"] = tower.num_features * tower.num_classes
    grid = (rows, columns)
    final = grid
    for _ in tower.stages[1:]:
        final = halved(final)
    for stage in tower.stages:
        if stage.grouping is not None:
            parts["segments"] += _pairs(stage.grouping, grid) * _tokens(final)
            costs = grouping_macs(stage.grouping, grid)
            parts["init"] += costs.pop("init")
            parts["grouping"] += sum(costs.values())
            grid = halved(grid)
        for block in stage.blocks:
            near = Neighborhood.of(grid, stage.kernel_size, 4, torch.device("cpu"))
            linear = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
            parts["blocks"] += _tokens(grid) * sum(layer.weight.numel() for layer in linear)
            parts["attention"] += 2 * (near.pairs if masked else near.window_pairs) * block.attn.proj.in_features
    return parts


def measure_layers(
    name: str, sizes: Sequence[int], rounds: int, batch: int = 1, device: torch.device | str = "cpu"
) -> list[LayerCost]:
    """Each grouping layer of a SeNaTra, random weights and inputs, for pictures of each size; interleaved, after a warm-up round.

    Raises:
        ValueError: a tower of another kind, or a size that it does not take.
    """
    torch.manual_seed(0)
    cases: list[tuple[int, int, nn.Module, Tensor]] = []
    for size in sizes:
        tower = timm.create_model(name, img_size=size, num_classes=0).to(device).eval()
        if not isinstance(tower, Senatra):
            raise ValueError(f"{name}: a {type(tower).__name__} has no grouping layers; give one of senatra_*")
        grid = tower.patch_embed.grid_size
        for i, stage in enumerate(tower.stages[1:], 1):
            x = torch.randn(batch, *grid, stage.grouping.init.in_channels, device=device)
            cases.append((size, i, stage.grouping, x))
            grid = halved(grid)
    passes = {(size, i): partial(_infer, layer, x) for size, i, layer, x in cases}
    seconds = interleave(passes, rounds, 1, device, "grouping layers")
    costs = []
    for size, i, layer, x in cases:
        grid, took = tuple(x.shape[1:3]), seconds[size, i]
        macs = grouping_macs(layer, grid)
        costs.append(
            LayerCost(
                size=size,
                layer=i,
                window=layer.window,
                tokens_in=_tokens(grid),
                tokens_out=_tokens(halved(grid)),
                macs=sum(macs.values()),
                pair_macs=macs["pairs"],
                seconds=statistics.median(took),
                low=min(took),
                high=max(took),
                largest_mib=largest_tensor(layer, x[:1]) / 2**20,
            )
        )
    return costs


@torch.inference_mode()
def _infer(layer: nn.Module, x: Tensor) -> None:
    layer(x)


@torch.no_grad()
def largest_tensor(module: nn.Module, *inputs: Tensor) -> int:
    """Bytes of the largest tensor that a module makes in one forward; its weights and inputs are not made, views hold nothing."""
    with _Largest([*module.parameters(), *inputs]) as seen:
        module(*inputs)
    return seen.bytes


class _Largest(TorchDispatchMode):
    def __init__(self, there: list[Tensor]):
        super().__init__()
        self.bytes, self.there = 0, {tensor.untyped_storage().data_ptr() for tensor in there}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.there:
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return out
