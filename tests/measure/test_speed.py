"""Times of passes, interleaved; what a pass is; peak memory in a process of its own."""

from __future__ import annotations

import signal
from functools import partial

import pytest
import timm
import torch
from torch import nn

from llava_drip.measure import speed
from llava_drip.measure.memory import peak_on_cpu, peak_on_cuda, rise_in_fresh_process
from llava_drip.measure.speed import Pass, Setting, interleave, time_towers, varied_counts
from llava_drip.measure.subjects import Subject

SMALL = {"img_size": 64, "depth": 2, "num_classes": 5}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_forced_counts_vary_and_meet_the_rate():
    counts = varied_counts(64, 196, 4.0, 0.25, torch.Generator().manual_seed(0)).float()
    assert counts.min() >= 1
    assert counts.mean() == pytest.approx(49, abs=0.5)
    assert counts.std() == pytest.approx(0.25 * 49, rel=0.3)
    for compression in (1.05, 1.2, 60):  # close to all patches, or to few tokens
        counts = varied_counts(256, 196, compression, 0.25, torch.Generator().manual_seed(0)).float()
        assert counts.min() >= 1 and counts.max() <= 196 and len(set(counts.tolist())) > 1
        assert counts.mean() == pytest.approx(196 / compression, rel=0.05)


def towers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "ViT": timm.create_model("vit_tiny_patch16_224", **{**SMALL, "depth": 4}),
        "DRIP": timm.create_model("drip_tiny_patch16_224", **SMALL, pool_after=1),
        "plain": timm.create_model("plain_vit_tiny_patch16_224", **SMALL),
        "two heads": timm.create_model("deit_tiny_distilled_patch16_224", **SMALL),
    }


@pytest.mark.parametrize("mode", speed.MODES)
@pytest.mark.parametrize("dtype", speed.DTYPES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_every_setting(device, dtype, mode):
    models = towers()
    timings = time_towers(models, Setting(device, dtype, mode, batch=3), rounds=4, warmup=1)
    assert [timing.label for timing in timings] == list(models)
    for timing in timings:
        assert 0 < timing.q1 <= timing.milliseconds <= timing.q3 and timing.rounds == 4
        assert timing.images_per_second == pytest.approx(3000 / timing.milliseconds)
    first, drip, plain, two = timings
    assert first.speed_up == 1 and plain.tokens == 16 and first.tokens is None and two.tokens is None
    assert 1 <= drip.tokens < 16 and models["DRIP"].budget is None
    for model in models.values():
        assert all(parameter.grad is None for parameter in model.parameters())
        wanted = torch.float32 if mode == "training" else speed.DTYPES[dtype]
        assert {parameter.dtype for parameter in model.parameters()} == {wanted}
        assert model.training == (mode == "training")


def test_images_of_a_batch_have_different_budgets():
    model = towers()["DRIP"]
    one = Pass(model, Setting("cpu", "float32", "inference", 8), spread=0.5)
    one()
    assert len(set(one.lengths)) > 2 and one.tokens == sum(one.lengths) / 8
    model.set_compression(8.0)
    one = Pass(model, Setting("cpu", "float32", "inference", 2), spread=0)
    one()
    one.end()
    assert one.lengths == [2, 2] and model.budget == 8.0, "around the budget that is asked of it"
    model.set_compression(8.0, over="batch")
    Pass(model, Setting("cpu", "float32", "inference", 2), spread=0).end()
    assert model.over == "batch"


def test_training_reaches_what_a_step_trains(monkeypatch):
    """Task and rate loss: every parameter gets a gradient, the boundary predictor's too."""
    model = towers()["DRIP"]
    one = Pass(model, Setting("cpu", "float32", "training", 2))
    monkeypatch.setattr(one.optimizer, "zero_grad", lambda: None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "measured, not trained"
    assert all("exp_avg_sq" in one.optimizer.state[parameter] for parameter in model.parameters())
    with one.ready():
        one()
        assert all(state["step"] == 1 and state["exp_avg"].any() for state in one.optimizer.state.values())
    assert not one.optimizer.state
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.boundary_predictor.fc1.weight.grad.abs().sum() > 0


def test_where_no_tower_can_be_put_each_is_said(monkeypatch):
    model = towers()["plain"]

    def no_room(*args, **kwargs):
        raise torch.OutOfMemoryError("no room for its weights")

    monkeypatch.setattr(model, "to", no_room)
    (timing,) = time_towers({"plain": model}, Setting("cpu", "float32", "inference", 1), rounds=2)
    assert timing.error == "no room for its weights" and timing.milliseconds is None


def test_rounds_are_interleaved_and_turn():
    calls: list[str] = []
    passes = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = interleave(passes, 3, 1, "cpu", "toy")
    assert calls == [*"abc", *"bca", *"cab", *"abc"]
    assert all(len(own) == 3 for own in seconds.values())


@pytest.mark.parametrize("device", ["cpu", "cpu:0", "mps"])
def test_only_cuda_is_synchronized_as_cuda(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("not a CUDA device"))
    assert len(interleave({"step": lambda: None}, 2, 0, device, "toy")["step"]) == 2


def test_memory_of_a_process_of_its_own():
    subject = Subject("ViT", "vit_base_patch32_224", {"depth": 6, "img_size": 64})
    setting = Setting("cpu", "float32", "inference", 1)
    weights = sum(p.numel() for p in subject.make(10).parameters()) * 4 / 2**30
    light = peak_on_cpu(subject, setting, 10)
    assert 0.9 * weights < light < 2 * weights + 0.15
    trained = peak_on_cpu(subject, Setting("cpu", "float32", "training", 1), 10)
    assert trained > light + 2.5 * weights, "gradients and AdamW's two moments are as large as the weights each"
    with pytest.raises(RuntimeError, match="ViT: its memory at .*: ValueError: nothing_of_this_name: neither"):
        peak_on_cpu(Subject("ViT", "nothing_of_this_name", {}), setting, 10)
    with pytest.raises(RuntimeError, match="much: its process ended with exit code -9"):
        rise_in_fresh_process(partial(signal.raise_signal, signal.SIGKILL), "much")
    with pytest.raises(AssertionError, match="a mistake: TypeError"):  # no want of memory: it has to be seen
        rise_in_fresh_process(partial(len, 3), "a mistake")


@needs_cuda
def test_memory_on_a_gpu():
    other = torch.ones(2**26, device="cuda")  # 1/4 GiB that is nobody's here
    one = Pass(towers()["plain"], Setting("cuda", "float32", "training", 2))
    weights = sum(p.nbytes for p in one.model.parameters()) / 2**30
    assert 4 * weights < peak_on_cuda(one) < 4 * weights + 0.2
    del other
