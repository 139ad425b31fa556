"""From a boundary rule's logits to boundaries: sampling in training, ranking in eval, budgets. Pure functions.

All take logits [B, L] over the tokens of each image, padded to the longest: entry (b, i) is about the place between token i and
the next one of the scan, and -inf (`NO_PLACE`) where there is none: behind an image's last token, which always ends a segment
and is nobody's decision, and in the padding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 0.5  # of the Gumbel-Sigmoid, as in Nawrot et al. (ACL 2023)
NO_PLACE = -math.inf


def tokens_for_budget(compression: Tensor, patches: int) -> Tensor:
    """Token count [B] int64 closest to patches / compression, within 1 .. patches."""
    return (patches / compression).round().clamp(1, patches).long()


def expected_boundaries(logits: Tensor) -> Tensor:
    """[B] fp32: how many boundaries sampling draws on average."""
    return torch.sigmoid(logits).sum(1)


def _with_noise(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """logits plus logistic noise (the difference of two Gumbel variables), and where there is a place, [B, L] bool; 0 elsewhere:
    the sigmoid of -inf is 0, but its gradient through a sum would be nan."""
    place = logits > NO_PLACE
    uniform = uniform.clamp(1e-6, 1 - 1e-6)  # fp32: 1 - 1e-6 is below 1
    return (logits + uniform.logit()).masked_fill(~place, 0), place


def gumbel_sigmoid(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """drawn [B, L] bool, and the relaxed sample [B, L] in 0 .. 1 that carries the gradient.

    A boundary is drawn where logit + logistic noise > 0, that is where the relaxed sample exceeds 1/2; then the sample is how
    certain it is.

    uniform: [B, L] fp32 random numbers in 0 .. 1.
    """
    noisy, place = _with_noise(logits, uniform)
    soft = torch.sigmoid(noisy / TEMPERATURE) * place
    return soft > 0.5, soft


def gumbel_topk(logits: Tensor, uniform: Tensor, boundaries: Tensor) -> tuple[Tensor, Tensor]:
    """The given number of places, those with the highest logit + logistic noise (the Gumbel-top-k trick, Kool et al., ICML 2019,
    arXiv:1903.06059): drawn [B, L] bool, and the relaxed sample [B, L] in 0 .. 1 that carries the gradient.

    The sample is that of gumbel_sigmoid, but measured from the middle between the last that is taken and the first that is not,
    a constant to the gradient.

    uniform: [B, L] fp32 random numbers in 0 .. 1. boundaries: [B] int64.
    """
    noisy, place = _with_noise(logits, uniform)
    ranked = noisy.detach().masked_fill(~place, NO_PLACE)
    in_order = ranked.sort(dim=1, descending=True).values
    taken, left = (in_order.gather(1, at.clamp(0, logits.shape[1] - 1)[:, None]) for at in (boundaries - 1, boundaries))
    middle = torch.where(left > NO_PLACE, (taken + left) / 2, taken)
    middle = torch.where(middle > NO_PLACE, middle, 0)  # an image without any place
    # Where p comes near 0 or 1 the gradient of the rate loss fades with p (1 - p); this one has to fade as well, or would win
    # there.
    p = torch.sigmoid(logits.detach())
    fading = 4 * p * (1 - p)
    noisy = fading * noisy + ((1 - fading) * noisy).detach()
    return most_probable(ranked, boundaries), torch.sigmoid((noisy - middle) / TEMPERATURE) * place


def shifted_to_expect(logits: Tensor, boundaries: Tensor) -> Tensor:
    """Each image's logits plus a constant of its own, such that sampling draws the given number of boundaries on average. For
    gumbel_sigmoid; gumbel_topk takes the number itself.

    The gradient is that of the shifted logits, the constant's own dependence on them included: what raises one place lowers the
    others, and no gradient can buy more boundaries.

    boundaries: [B], 0 .. number of places; kept a hundredth away from both ends, where the constant would be infinite.
    """
    place = logits > NO_PLACE
    plain = logits.masked_fill(~place, 0)
    with torch.no_grad():
        places = place.sum(1)
        wanted = torch.minimum(boundaries.float().clamp(min=0.01), (places - 0.01).clamp(min=0.01))
        low, high = (plain.new_full((len(plain), 1), bound) - plain.mean(1, keepdim=True) for bound in (-40.0, 40.0))
        for _ in range(30):  # bisection: 80 / 2^30
            middle = (low + high) / 2
            too_few = ((torch.sigmoid(plain + middle) * place).sum(1) < wanted)[:, None]
            low, high = torch.where(too_few, middle, low), torch.where(too_few, high, middle)
        weight = torch.sigmoid(plain + middle)
        weight = weight * (1 - weight) * place
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-12)
    moved = (weight * (plain - plain.detach())).sum(1, keepdim=True)  # zero; its gradient is the constant's
    return (plain + middle - moved).masked_fill(~place, NO_PLACE)


def most_probable(logits: Tensor, boundaries: Tensor) -> Tensor:
    """The given number of places with the highest logits, earlier ones first among equals.

    boundaries: [B] int64. Returns [B, L] bool with `boundaries` True in each row, as far as it has places.
    """
    rank = logits.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (rank < boundaries[:, None]) & (logits > NO_PLACE)


def most_probable_of_batch(logits: Tensor, boundaries: Tensor) -> Tensor:
    """boundaries.sum() places of the whole batch, the highest wherever they lie: pictures that need more tokens take them from
    the others."""
    return most_probable(logits.reshape(1, -1), boundaries.sum()[None]).view_as(logits)


def unlimited(logits: Tensor) -> Tensor:
    """[B] int64: as many boundaries as sampling would draw on average, so eval spends what training spent, image by image.

    A fixed threshold does not: sampling at rate 0.25 may come from logits that are all negative; and a threshold estimated over
        past
    batches lags behind logits that lie close together (docs/ARCHITECTURE.md).
    """
    # Not plain rounding: a sum of exactly k + 1/2 (a 2x tower's start) must not depend on the last bit.
    return (expected_boundaries(logits) + 0.4999).floor().long()
