"""The boundary loss beside open_clip's losses, and the compression it reports."""

from __future__ import annotations

import json

import pytest
import torch
from open_clip import ClipLoss
from open_clip.loss import SigLipLoss
from torch.nn.functional import normalize

from llava_drip.contrastive.epoch import EpochMeters, mean_over_ranks
from llava_drip.contrastive.loss import BoundaryLoss


def outputs(B: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = [normalize(torch.randn(B, 8, generator=generator), dim=-1) for _ in range(2)]
    return {"image_features": features[0], "text_features": features[1], "logit_scale": torch.tensor(10.0)}


@pytest.mark.parametrize("base", [ClipLoss(), SigLipLoss()], ids=["clip", "siglip"])
def test_adds_the_weighted_mean(base):
    out = outputs() | ({"logit_bias": torch.tensor(-3.0)} if isinstance(base, SigLipLoss) else {})
    rate_loss = torch.arange(6.0)
    extra = {"rate_loss": rate_loss, "num_tokens": torch.full((6,), 4)}
    losses = BoundaryLoss(base, 0.5)(**out, **extra, output_dict=True)
    assert losses["boundary_loss"] == 0.5 * rate_loss.mean()
    assert losses["contrastive_loss"] == base(**out, output_dict=True)["contrastive_loss"]
    assert BoundaryLoss(base, 0.5)(**out, **extra) == sum(losses.values())


def test_stock_loss_would_refuse_the_entries():
    with pytest.raises(TypeError, match="rate_loss"):
        ClipLoss()(**outputs(), rate_loss=torch.zeros(6), num_tokens=torch.ones(6))


def test_accumulated_gradient_is_that_of_the_whole_batch():
    """As open_clip accumulates: each part once with gradient, beside the detached others."""
    loss, out, tokens = BoundaryLoss(ClipLoss(), 2.0), outputs(), torch.full((6,), 4)
    whole = torch.rand(6, requires_grad=True)
    loss(**out, rate_loss=whole, num_tokens=tokens).backward()
    parts = [part.detach().requires_grad_() for part in whole.chunk(3)]
    for j, part in enumerate(parts):
        rate_loss = torch.cat([p if i == j else p.detach() for i, p in enumerate(parts)])
        loss(**out, rate_loss=rate_loss, num_tokens=tokens).backward()
        assert part.grad is not None
    torch.testing.assert_close(torch.cat([part.grad for part in parts]), whole.grad)


@pytest.mark.parametrize("accum_freq", [1, 2])
def test_meters_of_an_epoch(accum_freq):
    meters = EpochMeters("cpu", accum_freq, patches=16)
    windows = []
    for step in range(5):
        for _ in range(accum_freq):
            meters.add_losses({"a": torch.tensor(float(step)), "b": torch.tensor(1.0)})
            meters.add_tokens(torch.tensor([step + 1, step + 3]))
        meters.end_step()
        assert mean_over_ranks(meters.last) == {"a": step, "b": 1.0, "loss": step + 1.0}
        if step in (0, 3):
            steps, found = meters.take_window()
            windows.append((steps, found["tokens"]))
        if step == 2:  # killed and resumed: as if it had not been
            state = json.loads(json.dumps(meters.state()))
            meters = EpochMeters("cpu", accum_freq, patches=16)
            meters.resume(state)
    assert windows == [(1, 2.0), (1, 5.0)]  # a window does not reach back before a resume
    row = meters.summary(images=8)
    assert (row["loss"], row["a"], row["b"]) == (3.0, 2.0, 1.0)
    assert (row["tokens"], row["compression"]) == (4.0, 4.0)
    assert row["compression_p5"] < 4 < row["compression_p95"]
    assert row["images_per_second"] == 8 / row["step_seconds"] and row["mean_step_seconds"] > 0
    assert row["peak_memory_gib"] >= row["mean_peak_memory_gib"] > 0
