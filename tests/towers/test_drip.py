"""What must hold for DRIP (docs/ARCHITECTURE.md), point by point. For every rule and layout: test_drip_layouts.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava_drip.towers.drip import Drip
from llava_drip.towers.presets import PRESETS

MINI = "drip_mini_patch8_64_4x"
LAYOUTS = [(False, "avg"), (True, "token")]


def mini(**kwargs) -> Drip:
    torch.manual_seed(0)
    # Not the size's own "jax" initialization: its head starts at zero and answers the same for every picture.
    return timm.create_model(MINI, **{"num_classes": 10, "weight_init": "", **kwargs})


def give_opinions(drip: Drip) -> None:
    """Logits that spread widely, up and down: images differ in tokens, and a threshold of 0 would be far off."""
    nn.init.normal_(drip.boundary_predictor.fc1.weight, std=0.02)
    nn.init.normal_(drip.boundary_predictor.fc2.weight, std=2.0)


def pictures(n: int, size: int = 64) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


# 1. compression=1 is the dense ViT


@pytest.mark.parametrize("class_token, global_pool", LAYOUTS)
@pytest.mark.parametrize("pre_norm", [False, True])
def test_compression_1_equals_timms_vit(class_token, global_pool, pre_norm):
    shape = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3, "num_classes": 10}
    layout = {"class_token": class_token, "global_pool": global_pool, "pre_norm": pre_norm}
    dense = timm.create_model("vit_tiny_patch16_224", **shape, **layout).eval()
    for parameter in dense.parameters():  # timm starts biases and class token at zero: nothing to tell apart
        nn.init.normal_(parameter, std=0.2)
    drip = timm.create_model("drip_tiny_patch16_224", compression=1, **shape, **layout).eval()
    result = drip.load_state_dict(dense.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(key.startswith("boundary_predictor.") for key in result.missing_keys)
    x = pictures(3)
    torch.testing.assert_close(drip(x), dense(x), atol=1e-4, rtol=0)
    features = drip.forward_features(x)
    patches = dense.forward_features(x)[:, dense.num_prefix_tokens :]
    torch.testing.assert_close(features.to_padded()[0], patches, atol=1e-4, rtol=0)


def test_set_compression_1_equals_the_dense_vit():
    drip = mini(compression=4.0).eval()
    dense = mini(compression=1.0).eval()
    dense.load_state_dict(drip.state_dict())
    drip.set_compression(1.0)
    torch.testing.assert_close(drip(pictures(2)), dense(pictures(2)))


def test_dense_quick_gelu_weights_load(tmp_path):
    dense = timm.create_model("vit_base_patch32_clip_quickgelu_224", depth=2, num_classes=0).eval()
    drip = timm.create_model(
        "drip_base_patch32_224",
        depth=2,
        pool_after=1,
        num_classes=0,
        compression=1,
        class_token=True,
        global_pool="token",
        pre_norm=True,
        norm_layer=nn.LayerNorm,
        act_layer="quick_gelu",
    ).eval()
    result = drip.load_state_dict(dense.state_dict(), strict=False)
    assert not result.unexpected_keys
    x = pictures(1, 224)
    torch.testing.assert_close(drip(x), dense(x), atol=1e-4, rtol=0)


# 2. the task's gradient reaches the predictor (that trained boundaries follow edges: test_boundaries_learn.py)


def test_task_loss_alone_moves_the_predictor():
    drip = mini().train()
    drip(pictures(4)).square().mean().backward()
    for name in ("fc1.weight", "fc2.weight", "fc2.bias", "norm.weight"):
        gradient = drip.boundary_predictor.get_parameter(name).grad
        assert gradient is not None and gradient.abs().max() > 1e-8, name


def test_rate_loss_pulls_towards_the_target():
    drip = mini(compression=4.0).train()
    bias = drip.boundary_predictor.fc2.bias
    for start, sign in ((4.0, 1), (-5.0, -1)):  # far too many boundaries, far too few
        nn.init.constant_(bias, start)
        bias.grad = None
        drip.forward_features(pictures(8)).rate_loss.mean().backward()
        assert sign * bias.grad.item() > 0


# 3. deterministic in eval, independent of batch-mates


@pytest.mark.parametrize("class_token, global_pool", LAYOUTS)
def test_eval_is_deterministic_and_independent_of_the_batch(class_token, global_pool):
    drip = mini(class_token=class_token, global_pool=global_pool)
    give_opinions(drip)
    drip.eval()
    x = pictures(8)
    whole, again = drip.forward_features(x), drip.forward_features(x)
    assert torch.equal(whole.values, again.values)
    assert len(set(whole.lengths.tolist())) > 1, "the images should differ in tokens, or this shows nothing"
    for size in (1, 2):
        parts = [drip.forward_features(x[i : i + size]) for i in range(0, 8, size)]
        assert torch.equal(torch.cat([p.lengths for p in parts]), whole.lengths)
        torch.testing.assert_close(torch.cat([p.values for p in parts]), whole.values, atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.cat([drip.forward_head(p) for p in parts]), drip(x), atol=1e-5, rtol=0)


def test_eval_rate_matches_trainings():
    drip = mini(compression=4.0)
    give_opinions(drip)
    optimizer = torch.optim.AdamW(drip.parameters(), lr=1e-3)
    drip.train()
    for _ in range(60):
        x = torch.randn(16, 3, 64, 64)
        tokens = drip.forward_features(x)
        loss = drip.forward_head(tokens).square().mean() + tokens.rate_loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = torch.randn(256, 3, 64, 64)
    with torch.no_grad():
        drawn, decided = (drip.train(mode).forward_features(x).lengths.float().mean().item() for mode in (True, False))
    assert decided == pytest.approx(drawn, rel=0.05) and 10 < decided < 25


# 4. every patch in exactly one segment, 1 <= tokens <= patches


@pytest.mark.parametrize("kind", ["none", "all", "random"])
def test_segments_partition_the_patches(kind):
    ends = {
        "none": torch.zeros(3, 64, dtype=torch.bool),
        "all": torch.ones(3, 64, dtype=torch.bool),
        "random": torch.rand(3, 64) < 0.3,
    }[kind]
    drip = mini().eval()
    tokens = drip.forward_features(pictures(3), ends=ends)
    for segments, length in zip(tokens.segments, tokens.lengths):
        steps = segments.diff()
        assert segments[0] == 0 and ((steps == 0) | (steps == 1)).all()
        assert segments[-1] + 1 == length and 1 <= length <= 64
    assert len(tokens.values) == tokens.lengths.sum()
    assert torch.isfinite(drip.forward_head(tokens)).all()
    if kind == "none":
        assert tokens.lengths.tolist() == [1, 1, 1]
        logits = drip.forward_head(tokens)
        assert (logits[0] - logits[1]).abs().max() > 1e-4, "one token an image must still tell images apart"


def test_pooled_tokens_are_the_means_of_their_patches():
    drip = mini(pool_after=0, depth=0).eval()
    nn.init.zeros_(drip.boundary_predictor.size_scale)
    ends = torch.rand(2, 64) < 0.3
    ends[:, -1] = True
    x = pictures(2)
    tokens = drip.forward_features(x, layer=None, ends=ends)
    patches = drip.embed(x)
    segments = ends.cumsum(1) - ends.long()
    for b, values in enumerate(tokens.split()):
        for k, value in enumerate(values):
            expected = drip.norm(patches[b, segments[b] == k].mean(0))
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["forced", "eval", "train"])
def test_class_token_is_never_pooled(mode):
    """Pooled behind the last block, so that nothing but pooling lies between it and the dense ViT's."""
    drip = mini(class_token=True, global_pool="token", reg_tokens=2, pool_after=4).eval()
    give_opinions(drip)
    drip.set_compression(1.0)
    dense = drip.forward_features(pictures(2)).prefix
    assert dense.shape == (2, 3, drip.embed_dim) and (dense[0] - dense[1]).abs().max() > 1e-3
    drip.set_compression(None)
    drip.train(mode == "train")
    ends = torch.zeros(2, 64, dtype=torch.bool) if mode == "forced" else None
    tokens = drip.forward_features(pictures(2), ends=ends)
    assert (tokens.lengths < 64).all() and (mode != "forced" or tokens.lengths.tolist() == [1, 1])
    torch.testing.assert_close(tokens.prefix, dense, atol=1e-5, rtol=1e-5)


def test_without_a_class_token_there_is_no_prefix():
    assert mini().eval().forward_features(pictures(2)).prefix is None


# 6. cost follows tokens


def multiply_adds(drip: Drip, x: Tensor, budget: float | Tensor) -> int:
    """As torch counts them; on a CPU it sees attention only in its plain form."""
    drip.set_compression(budget)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        drip.forward_features(x)
    return counter.get_total_flops() // 2


def test_a_batch_costs_what_its_images_cost():
    """Every block, attention too: nothing is computed for the places by which one image has fewer tokens than another."""
    # 256 patches: images too large for the padded attention of small ones
    drip = mini(patch_size=4, pool_after=1).eval()
    x, budgets = pictures(3), torch.tensor([2.0, 4.0, 16.0])
    alone = [multiply_adds(drip, x[i : i + 1], budgets[i]) for i in range(3)]
    assert multiply_adds(drip, x, budgets) == sum(alone)
    # From 16x to 4x and to 2x: 48 and 112 tokens more, in three blocks, by the textbook's 12 n d² + 2 n² d, attention
    # being 8 wider in each head, where it knows sizes.
    textbook = [3 * (12 * n * 96**2 + 2 * n**2 * (96 + 3 * 8)) for n in (128, 64, 16)]
    assert [a - alone[2] for a in alone] == pytest.approx([t - textbook[2] for t in textbook], rel=1e-6)


# the contract around them


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_builds(name):
    with torch.device("meta"):
        drip = timm.create_model(name, num_classes=0)
    assert drip.patch_embed.img_size[0] == PRESETS[name]["img_size"]


def test_budget_is_met_exactly_from_one_set_of_weights():
    drip = mini().eval()
    for compression in (1.0, 2.0, 4.0, 10.0, 64.0):
        drip.set_compression(compression)
        assert drip.forward_features(pictures(2)).lengths.tolist() == [round(64 / compression)] * 2
    drip.set_compression(None)
    lengths = drip.forward_features(pictures(2)).lengths.tolist()
    assert all(12 <= n <= 24 for n in lengths), (
        "the image decides again"
    )  # untrained, on noise: near the rate, not at it


def test_same_type_in_train_and_eval():
    drip = mini()
    for mode in (True, False):
        tokens = drip.train(mode).forward_features(pictures(2))
        assert tokens.rate_loss.shape == (2,) and tokens.segments.shape == (2, 64)
        assert bool(tokens.rate_loss.abs().sum() > 0) == mode
        assert math.isfinite(drip.forward_head(tokens).sum().item())


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        drip = mini(drop_path_rate=0.1).train()
        drip.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        drip(pictures(4)).square().mean().backward()
        gradients.append(drip.blocks[3].mlp.fc1.weight.grad)
    torch.testing.assert_close(*gradients)


def test_inner_layers():
    drip = mini(depth=4, pool_after=2, size_bias=False).eval()
    drip.set_compression(4.0)
    inner = drip.forward_features(pictures(2), layer=-2)
    assert inner.values.shape == (32, drip.embed_dim)
    last = drip.forward_features(pictures(2), layer=-1)
    torch.testing.assert_close(drip.blocks[-1](inner.values, inner.packing), last.values)
    with pytest.raises(ValueError, match="before pooling"):
        drip.forward_features(pictures(1), layer=-4)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"compression": 0.5}, "compression"),
        ({"pool_after": 99}, "pool_after"),
        ({"boundary": "nope"}, "boundary"),
        ({"rate_loss": "nope"}, "rate_loss"),
        ({"boundary": "uniform", "predictor_dim": 8}, "predictor_dim"),
        ({"boundary": "uniform", "rate_loss": "binomial"}, "rate_loss"),
        ({"global_pool": "map"}, "global_pool"),
        ({"patch_drop_rate": 0.5}, "patch_drop_rate"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        mini(**kwargs)


def test_bad_budgets_are_named():
    drip = mini().eval()
    with pytest.raises(ValueError, match="at least 1"):
        drip.set_compression(0.0)
    drip.set_compression(torch.tensor([2.0, 2.0, 2.0]))
    with pytest.raises(ValueError, match="batch of 2"):
        drip.forward_features(pictures(2))
    with pytest.raises(ValueError, match=r"a tensor of shape \(2, 1\)"):
        drip.set_compression(torch.tensor([[2.0], [4.0]]))


def test_budgets_may_be_numpys():
    drip = mini().eval()
    for budget in (np.float32(4), np.int64(4), np.float64(4)):
        drip.set_compression(budget)
        assert drip.forward_features(pictures(2)).lengths.tolist() == [16, 16]


def test_a_dense_tower_has_every_layer():
    drip = mini(depth=4, pool_after=3, compression=1).eval()
    inner = drip.forward_features(pictures(2), layer=-3)
    assert inner.lengths.tolist() == [64, 64]
    last = drip.run_blocks(inner.values, inner.packing, 2, 4)
    torch.testing.assert_close(drip.forward_features(pictures(2), layer=-1).values, last)
    with pytest.raises(ValueError, match="before pooling"):
        drip.forward_features(pictures(1), layer=-3, ends=torch.ones(1, 64, dtype=torch.bool))


@pytest.mark.parametrize("pool_after", [0, 2])
def test_the_predictor_learns_as_fast_as_the_block_it_follows(pool_after):
    tower = timm.create_model("drip_mini_patch8_64_4x", pool_after=pool_after)
    layers = group_parameters(tower, tower.group_matcher(), reverse=True)
    own = {layer for name, layer in layers.items() if name.startswith("boundary_predictor.")}
    assert own == {layers[f"blocks.{max(pool_after - 1, 0)}.norm1.weight"]}
    assert len(set(layers.values())) == len(tower.blocks) + 2  # the stem's, each block's, the head's
