"""Closed-form MACs against those that torch counts; stages of a run."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava_drip.measure.flops import block_macs, count_macs, has_plain_blocks, tower_macs
from llava_drip.measure.stages import StageLog


def counted(model, *args, **kwargs) -> float:
    """MACs by torch's counter; on a CPU it sees attention only in its plain form."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*args, **kwargs)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name, expected", [("vit_base_patch32_224", 4.409e9), ("vit_base_patch16_224", 17.563e9)])
def test_dense_vits_have_their_published_cost(name, expected):
    with torch.device("meta"):
        assert tower_macs(timm.create_model(name)) == pytest.approx(expected, rel=0.003)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("tokens", [5, 16, 64])
def test_drip_costs_what_torch_counts(tokens, class_token):
    layout = {"class_token": True, "global_pool": "token"} if class_token else {}
    drip = timm.create_model("drip_mini_patch8_64_4x", num_classes=0, **layout).eval()
    ends = torch.zeros(1, 64, dtype=torch.bool)
    ends[0, torch.linspace(0, 63, tokens).long()] = True
    assert int(ends.sum()) == tokens and ends[0, -1]
    x = torch.randn(1, 3, 64, 64)
    assert tower_macs(drip, tokens) == pytest.approx(counted(drip.forward_features, x, ends=ends), rel=0.01)


def test_dense_drip_costs_what_torch_counts():
    drip = timm.create_model("drip_mini_patch8_64_1x", num_classes=10).eval()
    assert tower_macs(drip) == pytest.approx(counted(drip, torch.randn(1, 3, 64, 64)), rel=0.01)


LAYOUTS = {
    "similarity": {"boundary": "similarity"},
    "entropy": {"boundary": "entropy"},
    "uniform": {"boundary": "uniform"},
    "hilbert, rotary": {"scan": "hilbert", "relative": "rotary"},
    "size bias": {"size_bias": True},
    "two depths": {"compression": (2.0, 2.0), "pool_after": (1, 3)},
    "two depths, entropy": {"compression": (2.0, 2.0), "pool_after": (1, 3), "boundary": "entropy"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_costs_what_torch_counts(layout):
    drip = timm.create_model("drip_tiny_patch16_224", num_classes=10, depth=4, **LAYOUTS[layout]).eval()
    drip.set_compression(4.0)
    assert tower_macs(drip) == pytest.approx(counted(drip, torch.randn(1, 3, 224, 224)), rel=0.01)


# Counted with standard blocks and a 768 -> 3072 -> 1 predictor at the same rates: what published DRIP code would take.
CEILINGS = {
    ("patch32", 1, 2): 4.409,  # dense, as published
    ("patch16", 1, 2): 17.563,
    ("patch16", 2, 2): 10.56,
    ("patch16", 4, 2): 6.98,
    ("patch16", 10, 2): 4.82,
    ("patch16", 4, 4): 9.17,
    ("patch16", 10, 4): 7.44,
}


@pytest.mark.parametrize("patch", ["patch32", pytest.param("patch16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rate, pool_after", [(1, 2), (2, 2), (4, 2), (10, 2), (2, 4), (4, 4), (10, 4)])
def test_presets_cost_what_torch_counts(patch, rate, pool_after, one_thread):
    """Patches, blocks, attention and predictor of one picture of 224 px, no classifier; G multiply-accumulates (shown by -s)."""
    name = f"drip_base_{patch}_224_{rate}x" + ("_pool4" if pool_after == 4 else "")
    drip = timm.create_model(name, num_classes=0).eval()
    drip.set_compression(float(rate))
    tokens = round(drip.patch_embed.num_patches / rate)  # 12 of 49 patches at 4x
    closed, real = (
        tower_macs(drip, None if rate == 1 else tokens),
        counted(drip.forward_features, torch.randn(1, 3, 224, 224)),
    )
    print(f"{name}: {real / 1e9:.3f} counted, {closed / 1e9:.3f} closed form")
    assert closed == pytest.approx(real, rel=0.01)
    assert real / 1e9 <= CEILINGS.get((patch, rate, pool_after), float("inf"))


@pytest.mark.parametrize("patch", ["patch32", pytest.param("patch16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rate", ["1x", "2x", "4x", "10x", "elastic"])
def test_presets_for_training_from_scratch_cost_the_same(patch, rate, one_thread):
    """Rotary attention multiplies no matrices. Counted three blocks deep."""
    name = f"drip_base_{patch}_224_{rate}"
    with torch.device("meta"):
        costs = [tower_macs(timm.create_model(one, num_classes=0)) for one in (name, f"{name}_rope")]
    assert costs[0] == costs[1] <= 1e9 * CEILINGS.get((patch, int(rate[:-1]) if rate[0] != "e" else 4, 2), float("inf"))
    drip = timm.create_model(f"{name}_rope", num_classes=0, depth=3).eval()
    drip.set_compression(drip.compression)
    real = counted(drip.forward_features, torch.randn(1, 3, 224, 224))
    assert tower_macs(drip) == pytest.approx(real, rel=0.01)


GATED = {"depth": 2, "embed_dim": 48, "num_heads": 3, "mlp_ratio": 4, "mlp_layer": timm.layers.SwiGLU}
OTHERS = {
    "a CNN at 32 px": ("resnet18", {}, 32),
    "two attentions a block": ("vit_small_patch16_18x2_224", {"depth": 2, "embed_dim": 48, "num_heads": 3}, 224),
    "a gated MLP": ("vit_tiny_patch16_224", GATED, 224),
    "attention pooling": ("vit_tiny_patch16_224", {"depth": 2, "global_pool": "map", "class_token": False}, 224),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_without_a_closed_form_are_counted_and_left_as_they_were(kind):
    name, arguments, size = OTHERS[kind]
    overlay = {"input_size": (3, size, size)}
    model = timm.create_model(name, num_classes=10, pretrained_cfg_overlay=overlay, **arguments).train()
    frozen = next(module for module in model.modules() if not list(module.children()))
    frozen.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert not has_plain_blocks(model)
    macs = count_macs(model, tokens=3.0)
    assert {module for module in model.modules() if not module.training} == {frozen}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert macs == pytest.approx(counted(model.eval(), torch.zeros(1, 3, size, size)), rel=1e-9)


def test_published_costs_of_a_cnn_and_of_a_gated_mlp():
    with torch.device("meta"):
        cnn, gated = timm.create_model("resnet18"), timm.create_model("vit_tiny_patch16_224", **GATED)
    assert count_macs(cnn) == pytest.approx(1.81e9, rel=0.01)
    dim, tokens, hidden = 48, 197, 4 * 48  # three projections in place of two
    block = tokens * (4 * dim**2 + 3 * dim * hidden) + 2 * tokens**2 * dim
    assert count_macs(gated) == pytest.approx(2 * block + 196 * 768 * dim + 1000 * dim, rel=1e-6)


@pytest.mark.parametrize("compression, budget, pooled", [(4.0, None, True), (4.0, 1.0, False), (1.0, 2.0, True)])
def test_a_drip_is_counted_as_it_runs(compression, budget, pooled):
    """Also read at another budget than it was trained for, 1 (dense) included."""
    drip = timm.create_model("drip_mini_patch8_64_4x", num_classes=10, compression=compression).eval()
    drip.set_compression(budget)
    real = counted(drip, torch.randn(1, 3, 64, 64))
    if budget is not None:  # else each image decides
        assert tower_macs(drip) == pytest.approx(real, rel=0.01)
        assert count_macs(drip, 64 / budget) == pytest.approx(real, rel=0.01)
    dense = tower_macs(timm.create_model("drip_mini_patch8_64_1x", num_classes=10))
    assert (count_macs(drip, 16.0) < 0.9 * dense) == pooled and has_plain_blocks(drip)


def test_fewer_tokens_cost_less():
    drip = timm.create_model("drip_mini_patch8_64_4x", num_classes=0)
    costs = [tower_macs(drip, n) for n in (1, 8, 16, 64)]
    assert costs == sorted(costs) and tower_macs(drip) == costs[2]
    assert block_macs(10, 8) == 12 * 10 * 64 + 2 * 100 * 8


def test_stages_are_timed_also_when_they_fail():
    log = StageLog()
    with log.stage("work"):
        block = torch.ones(64, 1024, 1024)  # 256 MiB
    with pytest.raises(RuntimeError), log.stage("failure"):
        del block
        raise RuntimeError
    assert [stage.name for stage in log.stages] == ["work", "failure"]
    assert log.seconds == sum(stage.seconds for stage in log.stages) > 0
    assert log.stages[0].host_gib > 0.25 and log.host_gib >= log.stages[0].host_gib
