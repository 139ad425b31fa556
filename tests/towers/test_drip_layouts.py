"""What must hold for DRIP (docs/ARCHITECTURE.md), for every boundary rule, rate loss, scan and layout."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from llava_drip.measure.flops import tower_macs
from llava_drip.towers.drip import Drip
from llava_drip.towers.io import load_tower, save_tower
from llava_drip.towers.scan import scan_order

SHAPE = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3, "num_classes": 10}
LAYOUTS = {
    "gumbel": {},
    "similarity": {"boundary": "similarity"},
    "entropy": {"boundary": "entropy"},
    "uniform": {"boundary": "uniform"},
    "lower bound": {"rate_loss": "lower_bound", "rate_spread": 0.5},
    "interval": {"rate_loss": "interval", "rate_interval": (0.5, 1.5)},
    "serpentine": {"scan": "serpentine"},
    "hilbert": {"scan": "hilbert"},
    "rotary": {"relative": "rotary"},
    "rotary, no positions": {"relative": "rotary", "pos_embed": "none"},
    "sizes unknown": {"size_bias": False, "mean_over": "tokens"},
    "elastic": {"elastic": (2.0, 10.0)},
    "places by themselves": {"sampling": "gumbel"},
    "places by themselves, elastic, two depths": {
        "sampling": "gumbel",
        "elastic": (2.0, 10.0),
        "compression": (2.0, 2.0),
        "pool_after": (1, 3),
    },
    "blended, no detail": {"blend": 1.0, "detail_weight": 0.0},
    "elastic, entropy": {"elastic": (2.0, 10.0), "boundary": "entropy"},
    "before the first block": {"pool_after": 0},
    # there the mean over patches would be the same whatever the boundaries
    "behind the last block": {"pool_after": 4, "mean_over": "tokens"},
    "class token": {"class_token": True, "global_pool": "token"},
    "registers": {"class_token": True, "global_pool": "token", "reg_tokens": 2, "scan": "hilbert"},
    "two depths": {"compression": (2.0, 2.0), "pool_after": (1, 3)},
    "two depths, entropy": {"compression": (2.0, 2.0), "pool_after": (1, 3), "boundary": "entropy"},
    "two depths, uniform": {"compression": (2.0, 2.0), "pool_after": (1, 3), "boundary": "uniform"},
    "two depths, all of it": {
        "compression": (2.0, 2.0),
        "pool_after": (1, 3),
        "boundary": "similarity",
        "scan": "hilbert",
        "relative": "rotary",
        "elastic": (2.0, 10.0),
        "class_token": True,
        "global_pool": "token",
    },
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def tower(layout: str, **kwargs) -> Drip:
    torch.manual_seed(0)
    return timm.create_model("drip_tiny_patch16_224", **{**SHAPE, "pool_after": 1, **LAYOUTS[layout], **kwargs})


def pictures(n: int) -> Tensor:
    """Smooth in parts and noisy in others, so that neighbours differ more here than there, and not the same in each."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(n, 3, 4, 4, generator=generator).repeat_interleave(16, 2).repeat_interleave(16, 3)
    grain = torch.randn(n, 3, 64, 64, generator=generator)
    amount = torch.rand(n, 1, 8, 8, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return coarse + grain * amount * torch.linspace(0.1, 2, n)[:, None, None, None]


def predictors(drip: Drip) -> dict[str, nn.Parameter]:
    return {n: p for n, p in drip.named_parameters() if n.startswith(("boundary_predictor", "deeper_predictors"))}


# 1. compression=1 is the dense ViT


@pytest.mark.parametrize("layout", [name for name, kwargs in LAYOUTS.items() if "relative" not in kwargs])
def test_compression_1_is_timms_vit(layout):
    drip = tower(layout).eval()
    own = {"class_token", "global_pool", "reg_tokens"}
    kwargs = {"class_token": False, "global_pool": "avg", **{k: v for k, v in LAYOUTS[layout].items() if k in own}}
    dense = timm.create_model("vit_tiny_patch16_224", **SHAPE, **kwargs).eval()
    for parameter in dense.parameters():  # timm starts biases and class token at zero: nothing to tell apart
        nn.init.normal_(parameter, std=0.2)
    result = drip.load_state_dict(dense.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(key.startswith(("boundary_predictor.", "deeper_predictors.")) for key in result.missing_keys)
    drip.set_compression(1.0)
    tokens = drip.forward_features(pictures(3))
    patches = dense.forward_features(pictures(3))[:, dense.num_prefix_tokens :]
    torch.testing.assert_close(tokens.unpool(), patches, atol=1e-4, rtol=0)
    torch.testing.assert_close(drip.forward_head(tokens), dense(pictures(3)), atol=1e-4, rtol=0)


@every_layout
def test_all_boundaries_are_the_dense_tower(layout):
    """By way of the pooling, every patch its own segment, as by the short cut."""
    drip = tower(layout).eval()
    x, everywhere = pictures(2), torch.ones(2, 64, dtype=torch.bool)
    pooled = drip.forward_features(x, ends=everywhere)
    drip.set_compression(1.0)
    torch.testing.assert_close(pooled.values, drip.forward_features(x).values, atol=1e-5, rtol=1e-5)
    drip.set_compression(torch.tensor([1.0, 4.0]))  # and beside one that is pooled
    mixed = drip.forward_features(x)
    assert mixed.lengths.tolist() == [64, 16]
    torch.testing.assert_close(mixed.split()[0], pooled.split()[0], atol=1e-5, rtol=1e-5)


# 2. what moves the predictor


@every_layout
def test_what_moves_the_predictors(layout):
    drip = tower(layout).train()
    tokens = drip.forward_features(pictures(4))
    named, boundary = predictors(drip), LAYOUTS[layout].get("boundary", "gumbel")
    decides = {name: p for name, p in named.items() if not name.endswith("size_scale")}
    task = drip.forward_head(tokens).square().mean()
    drip.zero_grad()
    if boundary in ("gumbel", "similarity"):
        task.backward(retain_graph=True)
        for name, parameter in decides.items():
            if drip.elastic and name.endswith(("predictor.bias", "fc2.bias", ".0.bias")):
                continue  # the level, which the drawn rate decides
            assert parameter.grad is not None and parameter.grad.abs().max() > 1e-9, f"{name}: the task alone"
    elif boundary == "entropy":
        task.backward(retain_graph=True)
        assert all(p.grad is None for p in decides.values()), "the task says nothing about what comes next"
    drip.zero_grad()
    if boundary == "uniform":
        assert not decides and (tokens.rate_loss == 0).all()
        return
    tokens.rate_loss.mean().backward()
    moved = [name for name, p in decides.items() if p.grad is not None and p.grad.abs().max() > 0]
    assert bool((tokens.rate_loss != 0).any()) == bool(moved)
    assert moved or LAYOUTS[layout].get("rate_loss"), "interval and lower bound ask nothing of a rate that suits them"


# 3. eval is deterministic and knows nothing of batch-mates


@every_layout
def test_eval_is_deterministic_and_independent_of_the_batch(layout):
    drip, x = tower(layout).eval(), pictures(8)
    for budget in (None, 4.0):
        drip.set_compression(budget)
        whole, again = drip.forward_features(x), drip.forward_features(x)
        assert torch.equal(whole.values, again.values) and torch.equal(whole.segments, again.segments)
        assert (whole.rate_loss == 0).all()
        for size in (1, 2):
            parts = [drip.forward_features(x[i : i + size]) for i in range(0, 8, size)]
            assert torch.equal(torch.cat([p.lengths for p in parts]), whole.lengths)
            assert torch.equal(torch.cat([p.segments for p in parts]), whole.segments)
            torch.testing.assert_close(torch.cat([p.values for p in parts]), whole.values, atol=1e-5, rtol=0)
            torch.testing.assert_close(
                torch.cat([drip.forward_head(p) for p in parts]), drip.forward_head(whole), atol=1e-5, rtol=0
            )


# 4. every patch in exactly one segment


@every_layout
@pytest.mark.parametrize("mode", ["none", "all", "forced", "train", "eval", "budget"])
def test_segments_partition_the_patches(layout, mode):
    drip = tower(layout).train(mode == "train")
    ends = {"none": torch.zeros(3, 64), "all": torch.ones(3, 64), "forced": torch.rand(3, 64) < 0.3}.get(mode)
    drip.set_compression(10.0 if mode == "budget" else None)
    tokens = drip.forward_features(pictures(3), ends=None if ends is None else ends.bool())
    along_the_scan = tokens.segments[:, scan_order(drip.scan, 8, 8)]
    for segments, length in zip(along_the_scan, tokens.lengths):
        steps = segments.diff()
        assert segments[0] == 0 and ((steps == 0) | (steps == 1)).all()
        assert segments[-1] + 1 == length and 1 <= length <= 64
    assert len(tokens.values) == tokens.lengths.sum() and torch.isfinite(drip.forward_head(tokens)).all()
    if mode == "none":
        assert tokens.lengths.tolist() == [1, 1, 1]
        assert (tokens.values[0] - tokens.values[1]).abs().max() > 1e-4, "one token an image still tells images apart"
    if mode == "budget":
        assert tokens.lengths.tolist() == [6, 6, 6]
    if tokens.boundary_probs is not None:
        assert tokens.boundary_probs.shape == (3, 64) and not tokens.boundary_probs.requires_grad
        last = tokens.boundary_probs[:, scan_order(drip.scan, 8, 8)[-1]]
        assert (last == 1).all() and ((tokens.boundary_probs >= 0) & (tokens.boundary_probs <= 1)).all()


# 5. place and size survive pooling


@every_layout
def test_place_and_size_survive_pooling(layout):
    drip = tower(layout).eval()
    with torch.no_grad():  # untrained, attention hardly sees anything, places least
        for block in drip.blocks:
            block.attn.qkv.weight.mul_(10)
    x = pictures(1)
    ends = torch.zeros(1, 64, dtype=torch.bool)
    ends[0, [15, 31, 47]] = True
    moved = torch.zeros(1, 3, 64, 64)
    moved[:, :, :16, :16] = x[:, :, :16, :16]
    tokens = drip.forward_features(moved, ends=ends).values
    moved = moved.roll((32, 32), (2, 3))
    elsewhere = drip.forward_features(moved, ends=ends).values
    assert (tokens - elsewhere.roll(2, 0)).abs().max() > 1e-4, "the same picture elsewhere looks the same"
    with torch.no_grad():
        if drip.pos_embed is not None:
            drip.pos_embed.zero_()
        for rule in drip.boundary_predictors:
            rule.size_scale.normal_(std=0.5)
    drip.relative = "none"
    grey, ends = torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, dtype=torch.bool)
    ends[0, [0, 31]] = True  # one patch, thirty-one, thirty-two, and nothing says where
    sizes = drip.forward_features(grey, ends=ends).values
    assert (sizes[0] - sizes[1]).abs().max() > 1e-2, "segments that differ only in size look the same"
    with torch.no_grad():
        for rule in drip.boundary_predictors:
            rule.size_scale.zero_()
    sizes = drip.forward_features(grey, ends=ends).values
    assert (sizes[0] - sizes[1]).abs().max() < 1e-4, "or this shows something else"


# 6. cost follows tokens


@every_layout
def test_linear_layers_see_no_padding(layout):
    drip = tower(layout).eval()
    rows: dict[str, int] = {}
    for name, layer in drip.blocks.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(
                lambda _, args, out, name=name: rows.update({name: args[0].numel() // args[0].shape[-1]})
            )
    drip.set_compression(torch.tensor([2.0, 4.0, 16.0]))
    tokens = drip.forward_features(pictures(3))
    assert tokens.lengths.tolist() == [32, 16, 4]
    prefix, last = 3 * drip.num_prefix_tokens, drip.pool_depths[-1]
    assert len(rows) == 4 * 4, "qkv, proj, fc1 and fc2 of each block"
    assert all(count == 52 + prefix for name, count in rows.items() if int(name.split(".")[0]) >= last)
    if len(drip.pool_depths) == 1:
        assert all(count == 192 + prefix for name, count in rows.items() if int(name.split(".")[0]) < last)
    else:  # between: half of the compression, in its logarithm
        between = [count for name, count in rows.items() if 1 <= int(name.split(".")[0]) < 3]
        assert set(between) == {round(64 / 2**0.5) + 32 + 16 + prefix}


@every_layout
def test_counted_cost_falls_with_the_tokens(layout):
    drip = tower(layout)
    whole = tower_macs(drip, 64)
    if drip.pool_depths == (4,):
        assert tower_macs(drip, 16) == whole, "nothing runs behind the pooling"
    else:
        assert tower_macs(drip, 6) < tower_macs(drip, 16) < tower_macs(drip, 32) < whole


# budgets, elastic training


@every_layout
def test_any_budget_is_met_exactly_by_one_set_of_weights(layout):
    drip = tower(layout).eval()
    for asked in (1.0, 1.5, 2.0, 4.0, 10.0, 64.0, 1000.0):
        drip.set_compression(asked)
        assert drip.forward_features(pictures(2)).lengths.tolist() == [max(round(64 / asked), 1)] * 2
    drip.set_compression(torch.tensor([3.0, 20.0, 1.0]))
    assert drip.forward_features(pictures(3)).lengths.tolist() == [21, 3, 64]


@every_layout
def test_a_batch_can_share_its_budget(layout):
    drip = tower(layout).eval()
    drip.set_compression(4.0, over="batch")
    lengths = drip.forward_features(pictures(6)).lengths
    assert lengths.sum() == 6 * 16 and lengths.min() >= 1
    if LAYOUTS[layout].get("boundary") == "uniform":
        assert lengths.unique().tolist() == [16]
    else:
        assert len(lengths.unique()) > 1


@pytest.mark.parametrize("layout", ["elastic", "elastic, entropy", "two depths, all of it"])
def test_elastic_training_draws_each_images_rate(layout):
    drip = tower(layout).train()
    with torch.no_grad():
        tokens = drip.forward_features(pictures(2).repeat(100, 1, 1, 1))
    rates = 64 / tokens.lengths.float()
    drawn_evenly = rates.log2()
    assert drawn_evenly.mean() == pytest.approx((1 + torch.log2(torch.tensor(10.0)).item()) / 2, abs=0.25)
    assert rates.quantile(0.05) < 3 and rates.quantile(0.95) > 7.5
    drip.set_compression(4.0)  # what is asked for goes before what is drawn
    with torch.no_grad():
        tokens = drip.forward_features(pictures(2).repeat(100, 1, 1, 1))
    assert tokens.lengths.view(100, 2).float().std(0).max() < 6, "of one picture"


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"boundary": "nope"}, "boundary must be one of"),
        ({"rate_loss": "nope"}, "rate_loss must be one of"),
        ({"scan": "nope"}, "scan must be one of"),
        ({"relative": "nope"}, "relative must be one of"),
        ({"boundary": "entropy", "rate_loss": "binomial"}, "rate_loss has no meaning"),
        ({"boundary": "entropy", "predictor_dim": 33}, "predictor_dim must be a multiple"),
        ({"rate_spread": 1.0}, "rate_spread belongs to"),
        ({"rate_loss": "lower_bound", "rate_spread": -1.0}, "rate_spread must be a number, at least 0"),
        ({"rate_loss": "interval", "rate_interval": (2.0, 1.0)}, "rate_interval must be"),
        ({"elastic": (0.5, 2.0)}, "elastic must be"),
        ({"sampling": "none"}, "sampling must be one of"),
        ({"detail_weight": -1.0}, "detail_weight must be"),
        ({"mean_over": "pixels"}, "mean_over must be"),
        ({"blend": 2.0}, "blend must be"),
        ({"elastic": (4.0,)}, "elastic must be"),
        ({"elastic": 4}, "elastic must be"),
        ({"elastic": (1.0, 4.0), "compression": 1.0}, "elastic has no meaning"),
        ({"pool_after": 2.0}, "pool_after must be"),
        ({"compression": "4"}, "compression must be a number"),
        ({"compression": float("inf")}, "compression must be a number"),
        ({"rate_loss": "interval", "rate_interval": 0.5}, "rate_interval must be"),
        ({"boundary": ["gumbel"]}, "boundary must be one of"),
        ({"boundary": "entropy", "sampling": "topk"}, "sampling has no meaning"),
        ({"boundary": "uniform", "detail_weight": 0.1}, "detail_weight has no meaning"),
        ({"budget": "four"}, "compression must be a number"),
        ({"over": "batch"}, "shares a budget"),
        ({"pool_after": (1, 2)}, "one compression for each pooling"),
        ({"pool_after": (2, 1), "compression": (2.0, 2.0)}, "must rise"),
        ({"pool_after": (), "compression": ()}, "one compression for each"),
        ({"relative": "rotary", "embed_dim": 90}, "head width"),
        ({"norm_eps": 1e-5, "norm_layer": nn.LayerNorm}, "give one of them"),
        ({"norm_eps": -1}, "norm_eps must be a number, at least 0"),
        ({"position_scale": "big"}, "position_scale must be a number"),
        ({"position_scale": float("nan")}, "position_scale must be a number"),
        ({"rate_loss": "lower_bound", "rate_spread": "x"}, "rate_spread must be a number"),
        ({"pool_after": True}, "pool_after must be a whole number"),
        ({"predictor_dim": 0}, "predictor_dim must be a whole number, at least 1"),
        ({"predictor_dim": 16.0}, "predictor_dim must be a whole number, at least 1"),
        ({"size_bias": "no"}, "size_bias must be True or False, got 'no'"),
        ({"class_token": "false"}, "class_token must be True or False"),
        ({"qk_norm": 1}, "qk_norm must be True or False"),
    ],
)
def test_arguments_that_are_wrong_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tower("gumbel", **kwargs)


def test_training_draws_as_many_as_eval_takes_elsewhere():
    drip, x = tower("gumbel"), pictures(4)
    evaluated = drip.eval().forward_features(x)
    drawn = [drip.train().forward_features(x) for _ in range(2)]
    assert all(torch.equal(one.lengths, evaluated.lengths) for one in drawn)
    assert not torch.equal(drawn[0].segments, drawn[1].segments)


def test_what_covers_more_counts_more():
    """A token of the mean counts as often as it has patches, so forced segments of like patches change nothing."""
    drip = tower("behind the last block", mean_over="patches", pos_embed="none", num_classes=0).eval()
    with torch.no_grad():
        drip.boundary_predictor.size_scale.zero_()
    x = torch.zeros(1, 3, 64, 64)
    x[..., 48:, :] = 1  # two rows of patches of 8
    ends = torch.zeros(1, 64, dtype=torch.bool)
    ends[:, 47] = True
    whole = torch.ones(1, 64, dtype=torch.bool)
    pooled, patches = (drip.forward_head(drip.forward_features(x, ends=e)) for e in (ends, whole))
    torch.testing.assert_close(pooled, patches, atol=1e-4, rtol=1e-4)
    drip.mean_over = "tokens"
    assert (drip.forward_head(drip.forward_features(x, ends=ends)) - patches).abs().max() > 1e-2


def test_norm_eps_reaches_every_norm():
    drip = tower("class token", norm_eps=1e-3, pre_norm=True)
    own = [m for n, m in drip.named_modules() if isinstance(m, nn.LayerNorm) and "predictor" not in n]
    assert len(own) == 2 * 4 + 2 and {m.eps for m in own} == {1e-3}


def test_towers_of_former_versions_load():
    """Their predictor had a norm.bias, which cancelled."""
    drip = tower("gumbel")
    old = {**drip.state_dict(), "boundary_predictor.norm.bias": torch.ones(96)}
    assert not drip.load_state_dict(old).unexpected_keys


def test_one_call_for_random_numbers_however_many_poolings():
    """A trainer counts the calls; the two depths must not get the same numbers."""
    drip, x = tower("two depths, all of it").train(), pictures(2)
    calls = []
    drip.noise = lambda like: calls.append(torch.rand_like(like)) or calls[-1]
    drip.forward_features(x)
    (numbers,) = calls
    assert numbers.shape == (2, 1 + 2 * 64)
    drip = tower("entropy").train()
    drip.noise = lambda like: pytest.fail("nothing is left to chance")
    drip.forward_features(x)


def test_a_shared_budget_is_kept(tmp_path):
    drip = tower("gumbel")
    drip.set_compression(4.0, over="batch")
    save_tower(drip, tmp_path, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    again = load_tower(str(tmp_path))
    assert (float(again.budget), again.over) == (4.0, "batch")
    again.set_compression(None)
    save_tower(again, tmp_path, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert load_tower(str(tmp_path)).budget is None


def test_the_rule_answers_in_its_own_precision():
    """In bf16 places would tie, and the earlier ones would win."""
    drip, x = tower("gumbel").eval(), pictures(2)
    with torch.autocast("cpu", torch.bfloat16):
        probabilities = drip.forward_features(x).boundary_probs
    assert probabilities.dtype == torch.float32 and len(probabilities[0].unique()) > 60
