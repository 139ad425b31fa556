"""Closed-form MACs against those that torch counts, and the speed comparison at toy size."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava_drip.measure.flops import block_macs, tower_macs
from llava_drip.measure.speed import _interleave, compare, varied_counts
from llava_drip.measure.stages import StageLog


def counted(model, *args, **kwargs) -> float:
    """MACs by torch's counter; on a CPU it sees attention only in its plain form."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
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
    ("patch16", 2, 2): 10.56,
    ("patch16", 4, 2): 6.98,
    ("patch16", 10, 2): 4.82,
    ("patch16", 4, 4): 9.17,
    ("patch16", 10, 4): 7.44,
}


@pytest.mark.parametrize("patch", ["patch32", "patch16"])
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


def test_fewer_tokens_cost_less():
    drip = timm.create_model("drip_mini_patch8_64_4x", num_classes=0)
    costs = [tower_macs(drip, n) for n in (1, 8, 16, 64)]
    assert costs == sorted(costs) and tower_macs(drip) == costs[2]
    assert block_macs(10, 8) == 12 * 10 * 64 + 2 * 100 * 8


def test_forced_counts_vary_and_meet_the_rate():
    counts = varied_counts(64, 196, 4.0, 0.25, torch.Generator().manual_seed(0)).float()
    assert counts.min() >= 1
    assert counts.mean() == pytest.approx(49, abs=0.5)
    assert counts.std() == pytest.approx(0.25 * 49, rel=0.3)


def test_comparison_times_every_setting():
    towers = {"4x": {"model_name": "drip_tiny_patch32_224", "depth": 2, "pool_after": 1, "compression": 4.0}}
    timings = compare(towers, "vit_tiny_patch16_224", [1, 2], rounds=1)
    assert {(t.tower, t.batch, t.mode) for t in timings} == {
        ("4x", b, m) for b in (1, 2) for m in ("inference", "training")
    }
    for t in timings:
        assert t.milliseconds > 0 and 0 < t.low <= t.speed_up <= t.high
        assert t.flop_speed_up > 4, "patch 32 and two blocks against patch 16 and twelve"


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


@pytest.mark.parametrize("device", ["cpu", "cpu:0", "mps"])
def test_only_cuda_is_synchronized_as_cuda(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("not a CUDA device"))
    assert len(_interleave({"step": lambda: None}, 2, device, "toy")["step"]) == 2
