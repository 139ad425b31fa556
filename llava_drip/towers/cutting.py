"""One pooling's decision: a rule is asked about every place, and its answers become boundaries: drawn, decided or forced."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llava_drip.tokens import Packing
from llava_drip.towers.boundaries import (
    NO_PLACE,
    expected_boundaries,
    gumbel_sigmoid,
    gumbel_topk,
    shifted_to_expect,
    unlimited,
)
from llava_drip.towers.rate import straight_through_loss
from llava_drip.towers.rules import BoundaryRule


class Cut(NamedTuple):
    """Where a pooling cuts T tokens.

    Attributes:
        ends: [T] bool, True on the last token of each segment.
        confidence: [T] in 0 .. 1, how certain each end is, with the gradient of the task; None: all certain.
        probabilities: [T] fp32, of a segment ending there, without gradient; 1 for an image's last token.
        loss: [B] fp32, to be added to the task's.
    """

    ends: Tensor
    confidence: Tensor | None
    probabilities: Tensor
    loss: Tensor


class Question(NamedTuple):
    """A rule's answers about the tokens of a batch.

    Attributes:
        logits: [B, L], see boundaries.py. last: [T] bool, the last token of each image. loss: [B] fp32, the rule's own.
    """

    rule: BoundaryRule
    packing: Packing
    logits: Tensor
    last: Tensor
    probabilities: Tensor
    loss: Tensor

    @classmethod
    def ask(cls, rule: BoundaryRule, x: Tensor, content: Tensor, packing: Packing) -> Question:
        """x, content: as BoundaryRule.forward takes them."""
        # In the rule's own precision: in bf16 places would tie, and the earlier ones win.
        dtype = rule.size_scale.dtype
        with torch.autocast(x.device.type, enabled=False):
            answers, loss = rule(x.to(dtype), content.to(dtype), packing)
        last = packing.place_of_token == packing.units_of_token - 1
        logits = packing.pad(answers.masked_fill(last, NO_PLACE), NO_PLACE)
        probabilities = torch.sigmoid(answers.detach()).masked_fill(last, 1)
        loss = logits.new_zeros(len(packing.lengths)) if loss is None else loss
        return cls(rule, packing, logits, last, probabilities, loss)

    def forced(self, ends: Tensor) -> Cut:
        """Given segments: ends [T] bool."""
        return Cut(ends | self.last, None, self.probabilities, torch.zeros_like(self.loss))

    def decided(self, boundaries: Tensor | None, over: str) -> Cut:
        """Without chance. boundaries: [B] int64, how many in each image, as far as there are places; None: each image decides.
        over: as in BoundaryRule.choose."""
        if boundaries is None:
            chosen = self.rule.choose(self.logits, self.rule.unlimited(self.logits))
        else:
            chosen = self.rule.choose(self.logits, boundaries, over)
        return Cut(self.packing.unpad(chosen) | self.last, None, self.probabilities, self.loss)

    def drawn(
        self, uniform: Tensor, sampling: str, rate_loss: Callable, rate: Tensor, boundaries: Tensor | None
    ) -> Cut:
        """For training: by chance, with the rule's probabilities.

        Args:
            uniform: [T] fp32 random numbers in 0 .. 1.
            sampling: "topk": in each image the highest of logit plus noise, as many as are drawn on average; "gumbel": each
                place by itself, where logit plus noise is above 0.
            rate_loss: (tokens, units, rate) → [B], see rate.py.
            rate: [B] target tokens per unit, below 1.
            boundaries: [B] int64, how many to draw ("topk": exactly; "gumbel": on average, by logits shifted so), whatever the
                rule's own rate, which the rate loss then acts on alone; None: as many as the rule says. By "topk" the gradient
                may still raise or lower all logits of an image; the shift's own gradient forbids it to "gumbel".
        """
        units = self.packing.lengths_tensor
        uniform = self.packing.pad(uniform, 0.5)
        if sampling == "topk":
            count = unlimited(self.logits.detach()) if boundaries is None else boundaries
            drawn, soft = gumbel_topk(self.logits, uniform, count)
        else:
            logits = self.logits if boundaries is None else shifted_to_expect(self.logits, boundaries)
            drawn, soft = gumbel_sigmoid(logits, uniform)
        expected = 1 + expected_boundaries(self.logits)
        tokens = 1 + drawn.sum(1) if boundaries is None else expected.detach()
        loss = self.loss + straight_through_loss(rate_loss, tokens, expected, units, rate)
        confidence = self.packing.unpad(soft).masked_fill(self.last, 1.0)
        return Cut(self.packing.unpad(drawn) | self.last, confidence, self.probabilities, loss)
