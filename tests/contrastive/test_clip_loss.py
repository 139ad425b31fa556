"""The boundary loss beside open_clip's losses, and the compression it reports."""

from __future__ import annotations

import pytest
import torch
from open_clip import ClipLoss
from open_clip.loss import SigLipLoss
from torch.nn.functional import normalize

from llava_drip.contrastive.compression import CompressionMeter
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
def test_meter_reports_when_the_trainer_logs(accum_freq):
    reports = []
    meter = CompressionMeter("cpu", accum_freq, log_every=3, steps=5, report=lambda *report: reports.append(report))
    for step in range(5):
        for _ in range(accum_freq):
            meter(torch.tensor([step, step + 2]))
    # open_clip logs at steps 0, 3, 6, ... and at the last; each window reaches back to the log before.
    assert reports == [(0, 1, 1.0), (3, 3, 3.0), (4, 1, 5.0)]
    assert meter.epoch.mean() == 3.0
