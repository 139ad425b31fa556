"""How the next token is chosen: a request's arguments and what counts of a checkpoint's generation_config.json."""

from __future__ import annotations

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
