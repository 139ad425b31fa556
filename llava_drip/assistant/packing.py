"""Training without padding: the samples of a batch stand one after another in one row, and attention stays within each.

transformers hands what a model's forward gets beyond its arguments down to the attention function, so the language model needs
no code of ours: any that takes its attention function from transformers' AttentionInterface will do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from llava_drip.assistant.expand import IGNORE_INDEX, Expanded
from llava_drip.tokens import Packing
from llava_drip.towers.attention import packed_attention

ATTENTION = "llava_drip_packed"
# What some models ask of their attention, and this function does not do.
_UNKNOWN = ("softcap", "s_aux", "position_bias")


def packed_causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """An attention function of transformers: causal attention within each sample of a packed row.

    Args:
        query: [1, H, T, d]. key, value: [1, H', T, d] with H' dividing H. attention_mask: None.
        packing: the samples' lengths, sum T; handed down from the language model's forward.
        sliding_window: of a model whose tokens see so many before them only.
    Returns:
        [1, T, H, d], and None for the weights.
    Raises:
        ValueError: an attention that is more than this (packing must be left off), or a sample longer than the window.
    """
    assert packing is not None and attention_mask is None, "packed attention without packed samples"
    asked = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if asked:
        raise ValueError(
            f"{type(module).__name__} asks for {asked[0]}, which packed rows have not; give --packing false"
        )
    if sliding_window is not None and packing.longest > sliding_window:
        raise ValueError(
            f"a sample of {packing.longest} positions is longer than the language model's sliding window of {sliding_window}; "
            f"give --packing false, or --model_max_length {sliding_window}"
        )
    d = query.shape[-1]
    if scaling is not None and scaling != d**-0.5:
        query = query * (scaling * d**0.5)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [T, H, d]
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    return packed_attention(q, k, v, packing, dropout, causal=True)[None], None


AttentionInterface.register(ATTENTION, packed_causal_attention)


@dataclass(frozen=True)
class Packed:
    """The samples of a batch in one row.

    Attributes:
        embeds: [1, T, D]. position_ids: [1, T] int64, from 0 in each sample. packing: their lengths.
        read: [K] int64, the positions whose next token is learned, at least one: of others no logits are needed.
        targets: [1, K] int64, that next token; -100 for a position of `read` that is there to be one.
    """

    embeds: Tensor
    position_ids: Tensor
    packing: Packing
    read: Tensor
    targets: Tensor


def pack(embeds: Tensor, expanded: Expanded) -> Packed:
    """Leave out the padding of [B, L', D] embeddings. The last position of a sample learns nothing of the next sample's first."""
    real = expanded.attention_mask.bool()
    packing = Packing.of(real.sum(1))
    following = torch.full_like(expanded.labels, IGNORE_INDEX)
    following[:, :-1] = expanded.labels[:, 1:]
    following = following[real]  # padding has the label -100, on either side
    read = (following != IGNORE_INDEX).nonzero()[:, 0]
    if not len(read):  # the language model's head stays part of the step: other ranks may need it
        read = read.new_zeros(1)
    return Packed(embeds[real][None], packing.place_of_token[None], packing, read, following[read][None])


def takes_packing(language_model: nn.Module) -> bool:
    """Whether a language model takes its attention function from transformers' AttentionInterface."""
    return bool(getattr(language_model, "_supports_attention_backend", False))
