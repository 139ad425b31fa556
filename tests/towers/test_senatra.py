"""SeNaTra: the grouping layer against its definition written out densely, neighborhood attention against its window by window,
maps that are a partition, costs that are linear, and segments that learn to follow a picture.
"""

from __future__ import annotations

import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava_drip.assistant.projector import segment_places
from llava_drip.measure.grouping import grouping_macs, largest_tensor, senatra_macs
from llava_drip.towers.io import load_tower, save_tower
from llava_drip.towers.senatra import Assignment, Senatra, SpatialGrouping
from llava_drip.towers.senatra.assignment import (
    from_children,
    halved,
    hard_segments,
    neighbours,
    to_children,
    to_neighbours,
    upsample,
)
from llava_drip.towers.senatra.attention import Neighborhood, Tiling, neighborhood_attention

GRIDS = [(8, 8), (6, 10), (7, 5), (2, 2), (1, 3)]  # even, oblong, odd, as small as the window, smaller


def layer(grid: tuple[int, int], window: int | None, **arguments) -> SpatialGrouping:
    """Weights far from their start, so that assignments are decided."""
    torch.manual_seed(0)
    made = SpatialGrouping(8, 16, grid, window, mlp_ratio=2.0, **arguments)
    for name, p in made.named_parameters():
        if name.endswith("weight") and p.ndim > 1 or name == "position_bias":
            nn.init.normal_(p, std=0.4)
    return made


def tower(name: str = "senatra_mini_64", **arguments) -> Senatra:
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 7, **arguments}).eval()


def pictures(n: int, size: int = 64) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


# The grouping layer


def written_out(made: SpatialGrouping, x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer with every matrix whole, M_local and B entry by entry: output tokens, and A_up [B, h·w, ho·wo]."""
    h, w = x.shape[1:3]
    ho, wo = halved((h, w))
    bias = torch.full((h, w, ho, wo), -math.inf)
    for r in range(h):
        for c in range(w):
            for ro in range(ho):
                for co in range(wo):
                    down, across = r - 2 * ro, c - 2 * co
                    if made.window is None:
                        bias[r, c, ro, co] = made.position_bias[down + 2 * (ho - 1), across + 2 * (wo - 1)]
                    elif abs(r // 2 - ro) <= made.window // 2 and abs(c // 2 - co) <= made.window // 2:
                        bias[r, c, ro, co] = made.position_bias[down + made.window - 1, across + made.window - 1]
    bias = bias.view(h * w, ho * wo)
    x = made.norm_in(x)
    out = made.norm_init(made.init(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)).flatten(1, 2)
    k, v = made.key(x).flatten(1, 2), made.value(x).flatten(1, 2)
    for _ in range(made.iterations):
        q = made.query(made.norm_out(out))
        up = (made.log_scale.exp() * k @ q.transpose(1, 2) + bias).softmax(-1)
        down = up / up.sum(1, keepdim=True)
        out = out + down.transpose(1, 2) @ v
        out = out + made.mlp(made.norm_mlp(out))
    return out.view(-1, ho, wo, out.shape[-1]), up


@pytest.mark.parametrize("window", [3, 5, None])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_layer_is_what_it_is_written_out(grid, window):
    made, x = layer(grid, window), torch.randn(2, *grid, 8)
    x.requires_grad_()
    (out, assignment), (expected, up) = made(x), written_out(made, x)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(assignment.matrix(), up, atol=1e-5, rtol=1e-4)
    weight = torch.randn_like(out)
    inputs = [x, *made.parameters()]
    gradients = [torch.autograd.grad((y * weight).sum() / 10, inputs, retain_graph=True) for y in (out, expected)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("window", [3, None])
@pytest.mark.parametrize("grid", GRIDS)
def test_rows_and_columns_are_normalised(grid, window):
    n, m = math.prod(grid), math.prod(halved(grid))
    _, assignment = layer(grid, window)(torch.randn(2, *grid, 8))
    up = assignment.matrix()
    assert up.shape == (2, n, m) and (up >= 0).all()
    torch.testing.assert_close(up.sum(-1), torch.ones(2, n))
    # A_down's columns: the mean of ones is one, the mean of the inputs is theirs by the written-out matrix.
    x = torch.randn(2, *grid, 4)
    inputs = to_children(x) if window else x.flatten(1, 2)
    down = up / up.sum(1, keepdim=True)
    torch.testing.assert_close(assignment.gather(torch.ones_like(inputs)), torch.ones(2, *halved(grid), 4))
    torch.testing.assert_close(assignment.gather(inputs).flatten(1, 2), down.transpose(1, 2) @ x.flatten(1, 2))


@pytest.mark.parametrize("window", [3, None])
def test_an_output_token_that_nobody_chose_is_updated_by_nothing(window):
    """Weights may underflow to 0; the column then has nothing to divide by."""
    _, found = layer((4, 4), window)(torch.randn(1, 4, 4, 8))
    up = found.up.detach().clone()
    # The last output token: the centre of its own children's windows, a neighbour of the others'.
    if window:
        for r in range(2):
            for c in range(2):
                up[:, r, c, :, 4 + 3 * (1 - r) + (1 - c)] = 0
    else:
        up[..., -1] = 0
    up.requires_grad_()
    assignment = Assignment(up, (4, 4), window)
    assert (assignment.matrix()[..., -1] == 0).all()
    x = torch.randn(1, 2, 2, 4, 5) if window else torch.randn(1, 16, 5)
    out = assignment.gather(x)
    out.sum().backward()
    assert (out[:, -1, -1] == 0).all() and (out[:, 0] != 0).all() and torch.isfinite(up.grad).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_sparse_helpers_are_inverse_and_adjoint(grid):
    x = torch.randn(2, *grid, 3, dtype=torch.float64)
    assert torch.equal(from_children(to_children(x), grid), x)
    y = torch.randn(2, *grid, 3, 9, dtype=torch.float64)
    torch.testing.assert_close((neighbours(x, 3) * y).sum(), (x * to_neighbours(y, 3)).sum())
    assert torch.equal(neighbours(x, 3)[..., 4], x)


def test_the_bias_of_the_dense_layer_follows_the_picture_size():
    made, x = layer((8, 8), None), torch.randn(1, 12, 6, 8)
    free, _ = made(x)
    before = made.position_bias.clone()
    made.set_input_size((12, 6))
    assert made.position_bias.shape == (22, 10)
    torch.testing.assert_close(made(x)[0], free)
    made.set_input_size((12, 6))
    torch.testing.assert_close(before[[0, -1]][:, [0, -1]], made.position_bias[[0, -1]][:, [0, -1]])  # ends stay ends


# Neighborhood attention


def window_by_window(q: Tensor, k: Tensor, v: Tensor, kernel: int) -> Tensor:
    h, w = q.shape[1:3]
    out = torch.empty_like(q)
    for r in range(h):
        for c in range(w):
            top, left = (min(max(i - kernel // 2, 0), max(n - kernel, 0)) for i, n in ((r, h), (c, w)))
            keys, values = (
                t[:, top : top + kernel, left : left + kernel].flatten(1, 2) for t in (k, v)
            )  # [B, k², H, d]
            scores = torch.einsum("bhd,bkhd->bhk", q[:, r, c], keys) * q.shape[-1] ** -0.5
            out[:, r, c] = torch.einsum("bhk,bkhd->bhd", scores.softmax(-1), values)
    return out


@pytest.mark.parametrize(
    "grid, kernel",
    [((14, 14), 7), ((15, 9), 7), ((8, 22), 7), ((5, 19), 7), ((9, 16), 5), ((11, 4), 3), ((61, 6), 3), ((3, 2), 7)],
)
def test_neighborhood_attention_is_each_window_by_itself(grid, kernel):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, *grid, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    near = Neighborhood.of(grid, kernel, 4, q.device)
    got, expected = neighborhood_attention(q, k, v, near), window_by_window(q, k, v, kernel)
    torch.testing.assert_close(got, expected)
    weight = torch.randn_like(got)
    gradients = [torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (got, expected)]
    torch.testing.assert_close(*gradients)


def test_every_tiling_holds_its_windows():
    for kernel in (1, 3, 5, 7, 9):
        for size in range(1, 70):
            tiling = Tiling.of(size, kernel)
            seen = tiling.mask(torch.device("cpu")).sum(-1).flatten()[:size]
            assert (seen == min(kernel, size)).all(), (size, kernel)
            assert tiling.tile <= 2 * kernel and tiling.keys <= 4 * kernel, (size, kernel)  # linear


# The tower


def test_layout_of_the_stages():
    made = tower("senatra_tiny_224", num_classes=0)
    tokens, maps, assignments = (
        (found := made.forward_segmentation(pictures(1, 224))).tokens,
        found.maps,
        found.assignments,
    )
    assert [a.grid for a in assignments] == [(56, 56), (28, 28), (14, 14)]
    assert [a.window for a in assignments] == [3, 3, None]
    assert made.patch_embed.grid_size == (56, 56) and made.num_prefix_tokens == 0
    assert tokens.lengths.tolist() == [49] and tokens.segments.shape == (1, 3136) and maps.shape == (1, 49, 56, 56)
    assert [len(stage.blocks) for stage in made.stages] == [3, 4, 18, 5] and made.num_features == 512


@pytest.mark.parametrize("size", [64, 96, 56])  # 56: grids 28, 14, 7, 4
def test_maps_are_the_product_and_a_partition(size):
    made = tower(img_size=size)
    found = made.forward_segmentation(pictures(2, size))
    assert found.maps.dtype == torch.float32
    torch.testing.assert_close(found.maps.sum(1), torch.ones(2, size // 2, size // 2))
    product = found.assignments[0].matrix() @ found.assignments[1].matrix() @ found.assignments[2].matrix()
    torch.testing.assert_close(found.maps.flatten(2).transpose(1, 2), product)
    values, segments = product.max(-1)
    assert (product.gather(-1, found.tokens.segments[..., None])[..., 0] >= values - 1e-6).all()
    assert (segments == found.tokens.segments).float().mean() > 0.999
    assert torch.equal(made.forward_features(pictures(2, size)).values, found.tokens.values)


def test_hard_segments_do_not_depend_on_chunks(monkeypatch):
    assignments = tower().forward_segmentation(pictures(2)).assignments
    expected = hard_segments(assignments)
    monkeypatch.setattr("llava_drip.towers.senatra.assignment._CHUNK", 3)
    assert torch.equal(hard_segments(assignments), expected)


def test_semantic_maps_are_the_tokens_classes_spread_by_the_maps():
    made = tower()
    found, logits = made.forward_segmentation(pictures(2)), made.forward_semantic(pictures(2))
    assert logits.shape == (2, 7, 32, 32)
    per_token = made.head(found.tokens.values).view(2, 16, 7)
    torch.testing.assert_close(logits, torch.einsum("bkc,bkhw->bchw", per_token, found.maps))
    torch.testing.assert_close(upsample(found.assignments, per_token), logits.flatten(2).transpose(1, 2))


def test_a_picture_does_not_depend_on_its_batch():
    made, x = tower(), pictures(3)
    together, alone = made.forward_segmentation(x), made.forward_segmentation(x[1:2])
    torch.testing.assert_close(together.tokens.split()[1], alone.tokens.values, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.maps[1:2], alone.maps, atol=1e-5, rtol=1e-4)
    assert torch.equal(made.train().forward_features(x).values, together.tokens.values)  # nothing is drawn by chance


def test_layer_counts_blocks_of_the_last_stage():
    made, seen = tower(), []
    for block in made.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.flatten(0, 2)))
    made(pictures(2))
    assert len(seen) == 2
    for layer_, expected in ((-2, seen[0]), (-1, seen[1])):
        assert torch.equal(made.forward_features(pictures(2), layer=layer_).values, expected)
    with pytest.raises(ValueError, match=r"-2 \.\. -1, the blocks of the last stage"):
        made.forward_features(pictures(2), layer=-3)


def test_weights_load_at_another_picture_size(tmp_path):
    saved = tower(num_classes=0)
    save_tower(saved, tmp_path, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    larger = load_tower(str(tmp_path), img_size=96).eval()
    assert larger.patch_embed.img_size == (96, 96) and larger.stages[3].grouping.position_bias.shape == (22, 22)
    saved.set_input_size(96)
    torch.testing.assert_close(larger(pictures(2, 96)), saved(pictures(2, 96)))


def test_groups_and_weight_decay():
    made = tower()
    groups = group_parameters(made, made.group_matcher(), reverse=True)
    assert groups["patch_embed.proj.weight"] == 0
    assert groups["stages.0.blocks.0.attn.qkv.weight"] < groups["stages.1.grouping.key.weight"]
    assert groups["stages.1.grouping.key.weight"] == groups["stages.1.blocks.0.attn.qkv.weight"] < groups["norm.weight"]
    names = dict(made.named_parameters())
    assert made.no_weight_decay() <= set(names) and len(made.no_weight_decay()) == 6


def test_a_token_of_no_patch_has_a_place():
    made = tower()
    tokens = made.forward_features(torch.zeros(1, 3, 64, 64))
    tokens.segments.zero_()  # all in the first
    places = segment_places(tokens, made.patch_embed.grid_size)
    assert torch.isfinite(places).all() and (places[1:] == 0).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"compression": 4.0},
            "compression=4.0: senatra_mini_64 has no adjustable token budget: its number of tokens is fixed, one for 8 x 8",
        ),
        ({"budget": 4.0}, "budget=4.0: senatra_mini_64 has no adjustable token budget"),
        ({"img_size": 63}, "img_size 63: each side must be a multiple of the patch size, 2 pixels"),
        ({"depths": (1, 1)}, "depths (1, 1) and num_heads (1, 2, 4, 8): one number a stage"),
        ({"depths": (1, 0, 1, 1)}, "depths (1, 0, 1, 1): a stage has at least one block"),
        ({"num_heads": (3, 2, 4, 8)}, "num_heads (3, 2, 4, 8): stage 1 is 16 wide"),
        ({"kernel_size": 4}, "kernel_size must be odd and positive, got 4"),
        ({"group_window": 2}, "group_window must be odd and positive, got 2"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"weight_init": "xavier"}, "weight_init must be one of ('normal', 'lecun'), got 'xavier'"),
        ({"global_pool": "token"}, "global_pool must be \"avg\", got 'token'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError) as error:
        timm.create_model("senatra_mini_64", **arguments)
    assert message in str(error.value)


def test_there_is_no_budget():
    """Programs ask by hasattr, and say --compression."""
    assert not hasattr(tower(), "set_compression") and not hasattr(tower(), "budget")


# What it costs


def counted(module: nn.Module, *inputs: Tensor) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("window", [3, None])
def test_macs_of_a_layer_are_those_that_torch_counts(window):
    for grid in ((8, 8), (7, 5)):
        made = layer(grid, window)
        assert sum(grouping_macs(made, grid).values()) == counted(made, torch.randn(1, *grid, 8))


@pytest.mark.parametrize("name", ["senatra_mini_64", "senatra_tiny_224"])
def test_macs_of_a_tower_are_those_that_torch_counts(name):
    made = tower(name)
    x = pictures(1, made.patch_embed.img_size[0])
    assert sum(senatra_macs(made, masked=True).values()) == counted(made, x)
    assert senatra_macs(made)["attention"] < senatra_macs(made, masked=True)["attention"]


def test_local_grouping_is_linear_in_pixels_and_dense_is_not():
    local, dense = layer((8, 8), 3), layer((8, 8), None)
    pairs, largest = {}, {}
    for made in (local, dense):
        for side in (16, 32, 64):
            x = torch.randn(1, side, side, 8)
            pairs[made.window, side] = grouping_macs(made, (side, side))["pairs"]
            largest[made.window, side] = largest_tensor(made, x)
            assert counted(made, x) == sum(grouping_macs(made, (side, side)).values())
    for side in (16, 32):
        assert pairs[3, 2 * side] == 4 * pairs[3, side] and pairs[None, 2 * side] == 16 * pairs[None, side]
        assert largest[3, 2 * side] == 4 * largest[3, side]  # no matrix of all inputs by all outputs
    assert largest[None, 64] == 64**2 * 32**2 * 4


# What it learns


def two_colours(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures of 64 x 64 with a straight border anywhere between two fixed colours, and which side each patch of 2 pixels is."""
    angle, shift = 2 * math.pi * torch.rand(n, generator=generator), 0.6 * torch.rand(n, generator=generator) - 0.3
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    side = (angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * y > shift[:, None, None]).float()
    colours = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.5]])
    pixels = colours[side.long()].permute(0, 3, 1, 2)
    return pixels + 0.1 * torch.randn(pixels.shape, generator=generator), F.avg_pool2d(side[:, None], 2)[
        :, 0
    ].round().long()


def test_segments_learn_to_follow_two_colours(one_thread):
    """Native segmentation: classes of the final tokens, spread by the maps, are all that the loss sees."""
    generator = torch.Generator().manual_seed(0)
    made = tower(num_classes=2, depths=(1, 1, 1, 1)).train()
    test, sides = two_colours(32, generator)

    def purity() -> float:
        """Share of patches on the side on which most of their segment lies."""
        with torch.no_grad():
            segments = made.forward_features(test).segments
        counts = torch.zeros(32, 16, 2).index_put(
            (torch.arange(32)[:, None].expand_as(segments), segments, sides.flatten(1)), torch.ones(()), accumulate=True
        )
        return float(counts.amax(-1).sum() / counts.sum())

    before = purity()
    optimizer = torch.optim.AdamW(made.parameters(), lr=2e-3)
    for _ in range(15):
        pixels, labels = two_colours(16, generator)
        loss = F.cross_entropy(made.forward_semantic(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = float((made.forward_semantic(test).argmax(1) == sides).float().mean())
    after = purity()
    assert right > 0.98 and after > 0.98 and after > before, (before, after, right)


@pytest.mark.parametrize(
    "argument, value",
    [("depths", 3), ("num_heads", (1, "2", 4, 8)), ("embed_dim", "a"), ("iterations", 1.5), ("kernel_size", True)],
)
def test_a_wrong_type_is_named(argument, value):
    with pytest.raises(ValueError, match=rf"{argument} must be .*{re.escape(repr(value))}"):
        timm.create_model("senatra_mini_64", **{argument: value})
