"""Boundary-rate losses against torch.distributions."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Binomial

from llava_drip.towers.rate import RATE_LOSSES, binomial_rate_loss, straight_through_loss


@pytest.mark.parametrize("patches, rate", [(64, 0.25), (196, 0.1), (49, 0.5)])
def test_binomial_loss_is_the_negative_log_likelihood(patches, rate):
    tokens = torch.arange(1, patches + 1)
    expected = -Binomial(patches, probs=torch.tensor(rate)).log_prob(tokens.float()) / patches
    torch.testing.assert_close(binomial_rate_loss(tokens, patches, rate), expected, atol=1e-5, rtol=1e-4)


def test_least_at_the_rate_and_one_rate_an_image():
    counts = torch.arange(1, 65)
    assert counts[binomial_rate_loss(counts, 64, 0.25).argmin()] == 16
    tokens, rates = torch.tensor([16, 32, 6]), torch.tensor([0.25, 0.5, 0.1])
    together = binomial_rate_loss(tokens, 64, rates)
    apart = torch.stack([binomial_rate_loss(t, 64, float(r)) for t, r in zip(tokens, rates)])
    torch.testing.assert_close(together, apart)


def test_finite_at_the_ends():
    assert torch.isfinite(
        binomial_rate_loss(torch.tensor([1, 64, 64]), 64, torch.tensor([0.25, 0.25, 1 - 1 / 128]))
    ).all()


@pytest.mark.parametrize("name", sorted(RATE_LOSSES))
def test_straight_through_has_the_value_drawn_and_the_gradient_expected(name):
    loss = RATE_LOSSES[name]
    drawn = torch.tensor([10, 40])
    expected = torch.tensor([20.0, 12.0], requires_grad=True)
    twin = expected.detach().clone().requires_grad_()
    value = straight_through_loss(loss, drawn, expected, 64, 0.25)
    torch.testing.assert_close(value, loss(drawn, 64, 0.25))
    value.sum().backward()
    loss(twin, 64, 0.25).sum().backward()
    torch.testing.assert_close(expected.grad, twin.grad)
    assert expected.grad[0] > 0 > expected.grad[1], "too many expected tokens are pushed down, too few up"
