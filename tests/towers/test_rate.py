"""Boundary-rate losses against torch.distributions."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Binomial

from llava_drip.towers.rate import RATE_LOSSES, RateOptions, binomial_rate_loss, straight_through_loss


def loss_of(name: str, tokens, units=64, rate=0.25, **options) -> torch.Tensor:
    tokens = torch.as_tensor(tokens)
    units, rate = (torch.as_tensor(value, dtype=torch.float32).expand(tokens.shape) for value in (units, rate))
    return RATE_LOSSES[name](tokens, units, rate, RateOptions(**options))


@pytest.mark.parametrize("patches, rate", [(64, 0.25), (196, 0.1), (49, 0.5)])
def test_binomial_loss_is_the_negative_log_likelihood(patches, rate):
    tokens = torch.arange(1, patches + 1)
    expected = -Binomial(patches, probs=torch.tensor(rate)).log_prob(tokens.float()) / patches
    torch.testing.assert_close(loss_of("binomial", tokens, patches, rate), expected, atol=1e-5, rtol=1e-4)


def test_least_at_the_rate_and_one_rate_an_image():
    counts = torch.arange(1, 65)
    assert counts[loss_of("binomial", counts).argmin()] == 16
    tokens, rates, units = torch.tensor([16, 32, 6]), torch.tensor([0.25, 0.5, 0.1]), torch.tensor([64, 48, 20])
    together = binomial_rate_loss(tokens, units, rates)
    apart = torch.cat([loss_of("binomial", t[None], int(n), float(r)) for t, n, r in zip(tokens, units, rates)])
    torch.testing.assert_close(together, apart)


def test_finite_at_the_ends():
    assert torch.isfinite(loss_of("binomial", [1, 64, 64], 64, [0.25, 0.25, 1 - 1 / 128])).all()


def test_lower_bound_penalises_only_spending_above_it():
    """beta = alpha - lambda sigma, of the issue's formula, by hand: rates 8, 16, 24 of 64, sigma = 0.102."""
    tokens = torch.tensor([8, 16, 24])
    sigma = (8 / 64) * (2 / 3) ** 0.5
    for weight in (0.0, 1.0, 2.0):
        beta = 0.25 - weight * sigma
        expected = torch.tensor([max(k / 64 - beta, 0) for k in (8, 16, 24)])
        torch.testing.assert_close(loss_of("lower_bound", tokens, spread_weight=weight), expected)
    assert loss_of("lower_bound", [1, 2, 5], spread_weight=1.0).sum() == 0, "however few: nothing is asked"


def test_interval_penalises_only_leaving_it():
    counts = torch.arange(1, 65)
    loss = loss_of("interval", counts, low=0.5, high=1.5)
    inside = (counts >= 8) & (counts <= 24)
    assert (loss[inside] == 0).all() and (loss[~inside] > 0).all()
    torch.testing.assert_close(loss[[3, 31]], torch.tensor([(8 - 4) / 64, (32 - 24) / 64]))


@pytest.mark.parametrize("options", [{"spread_weight": -1.0}, {"low": 2.0, "high": 1.0}, {"low": -0.1}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="rate_"):
        RateOptions(**options)


@pytest.mark.parametrize("name", sorted(RATE_LOSSES))
def test_straight_through_has_the_value_drawn_and_the_gradient_expected(name):
    drawn, units, rate = torch.tensor([30, 40]), torch.full((2,), 64.0), torch.full((2,), 0.25)
    expected = torch.tensor([40.0, 6.0], requires_grad=True)
    twin = expected.detach().clone().requires_grad_()

    def loss(tokens, units, rate):
        return RATE_LOSSES[name](tokens, units, rate, RateOptions())

    value = straight_through_loss(loss, drawn, expected, units, rate)
    torch.testing.assert_close(value, loss(drawn, units, rate))
    value.sum().backward()
    loss(twin, units, rate).sum().backward()
    torch.testing.assert_close(expected.grad, twin.grad)
    assert expected.grad[0] > 0, "too many expected tokens are pushed down"
    assert expected.grad[1] < 0 or name == "lower_bound", "too few up, but where nothing is asked for"
