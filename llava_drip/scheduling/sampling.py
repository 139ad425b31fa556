"""How the next token is chosen: a request's arguments, what counts of a checkpoint's generation_config.json, and the choice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import generation as choosers

from llava_drip.scheduling.row import Row

# Of a checkpoint's generation_config.json the sampling and the penalties count, but not these. Beams have no rows to stream and
# no budget for each; other searches need code from a hub, another model or one request at a time; some need the prompt's ids,
# where the language model gets embeddings; and a reply must not depend on the clock. None is generate's "off".
NOT_USED = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False} | dict.fromkeys(
    ("penalty_alpha", "dola_layers", "constraints", "force_words_ids")
    + ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "is_assistant")
    + ("guidance_scale", "token_healing", "prefill_chunk_size", "max_time")
)


COLDEST = 1e-3  # below it a temperature makes infinities of logits


def sampling_arguments(max_new_tokens: int, temperature: float, top_p: float) -> dict:
    """Arguments of transformers' generate; a temperature below COLDEST is greedy. ValueError names one that is out of range."""
    if not max_new_tokens >= 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if temperature < COLDEST:
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"max_new_tokens": int(max_new_tokens), **greedy}
    sampled = {"do_sample": True, "temperature": float(temperature), "top_p": float(top_p), "top_k": 0}
    return {"max_new_tokens": int(max_new_tokens), **sampled}


# Of generate's processors those that look at the scores alone; all others look at what has been written, too.
_OF_SCORES = tuple(
    getattr(choosers, f"{name}LogitsWarper")
    for name in ("Temperature", "TopK", "TopP", "MinP", "Typical", "Epsilon", "Eta", "TopH")
    if hasattr(choosers, f"{name}LogitsWarper")
)


def next_tokens(rows: Sequence[Row], logits: Tensor) -> tuple[Tensor, dict[int, Exception]]:
    """The next token of each row, by its own settings and random numbers alone; nothing waits for a GPU.

    logits: [B, V] of their last tokens. Returns [B] int64, and what went wrong with which row.
    """
    tokens, errors, left = logits.argmax(-1), {}, _together(rows)
    while left:
        places = left.pop()
        try:
            tokens[places] = _choose([rows[place] for place in places], logits[places].float())
        except Exception as error:
            if len(places) == 1:
                errors[places[0]] = error
            else:
                left += [[place] for place in places]  # whose it is
    return tokens, errors


def _together(rows: Sequence[Row]) -> list[list[int]]:
    """Places of rows that are not plainly greedy: with the same processors, and as much written where these look at it."""
    groups: dict[tuple, list[int]] = {}
    for place, row in enumerate(rows):
        if not row.plain_greedy:
            look = any(not isinstance(processor, _OF_SCORES) for processor in row.processors)
            key = (id(row.processors), row.generator is None, len(row.tokens) if look else None)
            groups.setdefault(key, []).append(place)
    return list(groups.values())


def _choose(rows: Sequence[Row], scores: Tensor) -> Tensor:
    """scores: [B, V] float. Returns [B] int64."""
    if rows[0].processors:
        same = min(len(row.tokens) for row in rows)  # where they differ nobody looks
        written = torch.tensor([row.tokens[:same] for row in rows], dtype=torch.int64, device=scores.device)
        scores = rows[0].processors(written.view(len(rows), same), scores)
    if rows[0].generator is None:
        return scores.argmax(-1)
    # torch.multinomial's own way of drawing one: the largest share of its probability that an exponential variate leaves.
    chances, races = scores.softmax(-1), torch.empty_like(scores)
    for row, race in zip(rows, races):
        race.exponential_(generator=row.generator)
    return (chances / races).argmax(-1)
