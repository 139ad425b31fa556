"""Which of several given answers a model holds likeliest, without letting it write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import GenerationConfig

from llava_drip.conversation import checked_turns, write_chat
from llava_drip.engine import Engine, Messages, RequestError


@dataclass(frozen=True)
class Likelihoods:
    """log_probabilities: of each given answer, nats. visual_tokens: of the request's images together."""

    log_probabilities: list[float]
    visual_tokens: int


def answer_likelihoods(
    engine: Engine,
    requests: Sequence[tuple[Messages, Sequence[Image.Image]]],
    answers: Sequence[Sequence[str]],
) -> list[Likelihoods]:
    """Log-probability of the first token in which the answers to a request differ, after what they have in common.

    Answers such as "B" or "The answer is B." are told apart by one token, so one pass over the prompt decides. They are tokenized
    with the prompt, as in training.

    Args:
        requests: B times (messages, images) as `Engine.answer_batch` takes them, ending with a user's message.
        answers: for each request the answers to choose from.
    Raises:
        RequestError: naming the request by its place: a bad conversation, one that is too long, or answers that are told apart
            only by several tokens.
    """
    prefixes, choices = [], []
    for number, ((messages, images), texts) in enumerate(zip(requests, answers, strict=True)):
        try:
            prefix, tokens = _told_apart(engine, messages, len(images), texts)
        except ValueError as error:
            raise RequestError(number, str(error)) from error
        prefixes.append(prefix)
        choices.append(tokens)
    model, tokenizer = engine.model, engine.processor.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    longest = max(map(len, prefixes))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in prefixes])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prefixes])
    pictures = [image for _, images in requests for image in images]
    with engine.lock, torch.inference_mode():
        pixels = None
        if pictures:
            pixels = engine.processor.image_processor(pictures, return_tensors="pt")["pixel_values"].to(engine.device)
        embeds, expanded = model.embed(ids.to(engine.device), mask.to(engine.device), pixels)
        lengths = expanded.attention_mask.sum(1).tolist()
        context = getattr(model.config.text_config, "max_position_embeddings", 2**31)
        for number, length in enumerate(lengths):
            if length > context:
                raise RequestError(number, f"too long: {length} tokens, and the model's context is {context}")
        # Through generate, which knows the positions of padded rows for every family of language models.
        once = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        config = GenerationConfig(**once, pad_token_id=pad)
        logits = model.generate_from(embeds, expanded, defaults=config, generation_config=config).logits[0]
        log_probabilities = logits.float().log_softmax(-1).cpu()
    visual = expanded.is_image.sum(1).tolist()
    return [Likelihoods(row[tokens].tolist(), count) for row, tokens, count in zip(log_probabilities, choices, visual)]


def _told_apart(engine: Engine, messages: Messages, images: int, answers: Sequence[str]) -> tuple[list[int], list[int]]:
    """ids of the prompt with what all answers begin with, and the next token of each answer."""
    turns = checked_turns(messages, images, engine.plain)
    texts = []
    for answer in answers:
        turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        texts.append(write_chat(engine.processor.tokenizer, [*turns, turn], engine.processor.chat_template))
    rows = engine.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    place = next((i for i, tokens in enumerate(zip(*rows)) if len(set(tokens)) > 1), min(map(len, rows)) - 1)
    tokens = [row[place] for row in rows]
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"the tokenizer does not tell the answers {', '.join(answers)} apart by one token")
    return rows[0][:place], tokens
