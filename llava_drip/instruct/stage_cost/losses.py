"""Each sample's loss, packed and padded: that they are equal is what makes the one as good as the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_drip.assistant.expand import IGNORE_INDEX
from llava_drip.assistant.modeling import LlavaDripForConditionalGeneration
from llava_drip.tokens import Packing


@torch.no_grad()
def sample_losses(model: LlavaDripForConditionalGeneration, batch: dict[str, Tensor], packed: bool) -> Tensor:
    """[B] fp64: mean cross-entropy over each sample's labelled tokens.

    batch: what Collator gives, on the model's device.
    """
    model.pack_samples(packed)
    logits = model(**batch).logits
    _, expanded = model.embed(**batch)
    following = expanded.labels[:, 1:]
    learned = following != IGNORE_INDEX
    logits = logits[0] if packed else logits[:, :-1][learned]  # [K, vocabulary], in the order of rows
    each = F.cross_entropy(logits.float(), following[learned], reduction="none").double()
    counts = learned.sum(1)
    sums = each.new_zeros(len(counts)).index_add(0, Packing.of(counts).image_of_token, each)
    return sums / counts
