"""From one <image> placeholder an image to one position a visual token: pure functions over ids, mask and labels.

How many tokens an image gets is known only after the tower has run, so the tokenizer leaves one placeholder for each image and
the sequence grows here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass
class Expanded:
    """Sequences with room for the visual tokens, padded on the side on which the input was padded (left if it was not).

    Attributes:
        input_ids: [B, L'] int64; the placeholder id stands on every visual position, 0 on padding.
        attention_mask: [B, L'] int64.
        labels: [B, L'] int64 (-100 on visual positions and padding), or None.
        is_image: [B, L'] bool; its True positions, row-major, are in the order of the packed visual tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    is_image: Tensor


def check_placeholders(per_row: Tensor, images: int) -> None:
    """Raise ValueError, naming the row, where placeholders and images do not match in number.

    per_row: [B] placeholders of each row. images: how many there are for the whole batch, in the order of the placeholders.
    """
    if int(per_row.sum()) == images:
        return
    used = per_row.cumsum(0)
    short = (used > images).nonzero()
    row = int(short[0]) if len(short) else int(per_row.nonzero()[-1]) if used[-1] else 0
    problem = "runs out of images at" if len(short) else "leaves images over after"
    raise ValueError(
        f"the batch has {int(used[-1])} <image> placeholders and {images} images: it {problem} row {row}, "
        f"which has {int(per_row[row])} <image>; give each row as many <image> as images"
    )


def expand_placeholders(
    input_ids: Tensor,
    attention_mask: Tensor,
    image_token_id: int,
    counts: Tensor,
    labels: Tensor | None = None,
) -> Expanded:
    """Repeat each placeholder as often as its image has tokens.

    Args:
        input_ids: [B, L] int64, each row padded on one side.
        attention_mask: [B, L], 0 on padding.
        image_token_id: the placeholder.
        counts: [images] int64, tokens of each image in row-major order of the placeholders; each at least 1.
        labels: [B, L] int64 or None.
    Raises:
        ValueError: placeholders and images differ in number (names the row).
    """
    real = attention_mask.bool()
    is_placeholder = (input_ids == image_token_id) & real
    check_placeholders(is_placeholder.sum(1), len(counts))
    repeats = real.long()
    repeats[is_placeholder] = counts.to(repeats)

    lengths = repeats.sum(1)
    longest = int(lengths.max())
    column = torch.arange(longest, device=input_ids.device)
    # Rows without padding go left: equally long prompts grow apart here, and generation continues at the right end.
    padded_right = bool((~real[:, -1]).any())
    occupied = column < lengths[:, None] if padded_right else column >= (longest - lengths)[:, None]

    def spread(values: Tensor, fill: int) -> Tensor:
        out = torch.full(occupied.shape, fill, dtype=values.dtype, device=values.device)
        out[occupied] = values.flatten().repeat_interleave(repeats.flatten())
        return out

    new_labels = None
    if labels is not None:
        new_labels = spread(labels.masked_fill(is_placeholder, IGNORE_INDEX), IGNORE_INDEX)
    return Expanded(
        input_ids=spread(input_ids, 0),
        attention_mask=occupied.to(attention_mask.dtype),
        labels=new_labels,
        is_image=spread(is_placeholder.long(), 0).bool(),
    )
