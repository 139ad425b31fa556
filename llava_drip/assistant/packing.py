"""Training without padding: the samples of a batch stand one after another in one row, and attention stays within each.

transformers hands what a model's forward gets beyond its arguments down to the attention function, so the language model needs
no code of ours. But its layers must see other positions through that function alone: convolutions and recurrent layers would run
on from one sample into the next. So only families are packed that a test has shown to keep samples apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from llava_drip.assistant.expand import IGNORE_INDEX, Expanded
from llava_drip.tokens import Packing
from llava_drip.towers.attention import packed_attention

ATTENTION = "llava_drip_packed"
# Language models (model_type) whose samples are apart, as tests/assistant/test_packing.py shows of each.
PACKED_FAMILIES = (
    *(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma3_text",
        "phi",
        "phi3",
        "smollm3",
        "olmo2",
        "granite",
        "glm4",
    ),
)


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
        ValueError: a sample longer than the window (why_not_packed says so beforehand).
    """
    assert packing is not None and attention_mask is None, "packed attention without packed samples"
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


def why_not_packed(config: PreTrainedConfig, max_length: int | None = None) -> str | None:
    """Why the samples of a language model are not to be packed; None: they may be.

    config: the language model's. max_length: positions of the longest sample, None: not known.
    """
    if config.model_type not in PACKED_FAMILIES:
        return (
            f"{config.model_type} is none of the families that keep packed samples apart ({', '.join(PACKED_FAMILIES)})"
        )
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if window is not None and slides and max_length is not None and max_length > window:
        return (
            f"samples may have {max_length} positions, more than its sliding window of {window}; see --model_max_length"
        )
    return None
