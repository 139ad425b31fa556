"""Which of several given answers a model holds likeliest, without letting it write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig

from llava_drip.assistant.expand import Expanded
from llava_drip.conversation import checked_turns, write_chat
from llava_drip.engine import Engine, Messages, RequestError


@dataclass(frozen=True)
class Likelihoods:
    """log_probabilities: one for each given answer, nats. visual_tokens: of the request's images together."""

    log_probabilities: list[float]
    visual_tokens: int


def answer_likelihoods(
    engine: Engine,
    requests: Sequence[tuple[Messages, Sequence[Image.Image]]],
    answers: Sequence[Sequence[str]],
    whole: bool = False,
) -> list[Likelihoods]:
    """How likely each of the answers to a request is, from the first token in which they differ on. They are tokenized with the
    prompt, as in training.

    Args:
        requests: B times (messages, images) as `Engine.answer_batch` takes them, ending with a user's message.
        answers: for each request the answers to choose from.
        whole: False: the log-probability of that first token, from one pass over the prompt; enough for "B" or "The answer is
            B.". True: the mean over that token and all that follow, the end mark too, so that long answers are not worse for
            being long; a pass for each answer.
    Raises:
        RequestError: naming the request by its place: a bad conversation, one that is too long, or answers that are told apart
            only by several tokens while `whole` is False.
    """
    rows, tails, owners = [], [], []
    for number, ((messages, images), texts) in enumerate(zip(requests, answers, strict=True)):
        try:
            ids, place = _tokenized(engine, messages, len(images), texts)
            firsts = [row[place] for row in ids]
            if not whole and len(set(firsts)) < len(firsts):
                raise ValueError(f"the tokenizer does not tell the answers {', '.join(texts)} apart by one token")
        except ValueError as error:
            raise RequestError(number, str(error)) from error
        rows += ids if whole else [ids[0][:place]]
        tails += [row[place:] for row in ids] if whole else [firsts]
        owners += [number] * (len(ids) if whole else 1)
    score = _of_whole_answers if whole else _of_first_tokens
    with engine.lock, torch.inference_mode():
        embeds, expanded = _embedded(engine, rows, [requests[number][1] for number in owners], owners)
        scores = score(engine, embeds, expanded, tails)
    found = [Likelihoods([], 0) for _ in requests]
    for number, values, visual in zip(owners, scores, expanded.is_image.sum(1).tolist()):
        found[number] = Likelihoods(found[number].log_probabilities + values, visual)
    return found


def _tokenized(engine: Engine, messages: Messages, images: int, answers: Sequence[str]) -> tuple[list[list[int]], int]:
    """ids of the conversation with each answer, and the place of the first token in which they differ."""
    turns = checked_turns(messages, images, engine.plain)
    texts = []
    for answer in answers:
        turn = {"role": "assistant", "content": [{"type": "text", "text": engine.plain(answer)}]}
        texts.append(write_chat(engine.processor.tokenizer, [*turns, turn], engine.processor.chat_template))
    rows = engine.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    shortest = min(map(len, rows))
    return rows, next((i for i, tokens in enumerate(zip(*rows)) if len(set(tokens)) > 1), shortest - 1)


def _embedded(
    engine: Engine, rows: list[list[int]], pictures: list[Sequence[Image.Image]], owners: list[int]
) -> tuple[Tensor, Expanded]:
    """Rows of ids with their pictures, padded on the left. RequestError, by `owners`: one is longer than the model's context."""
    tokenizer, longest = engine.processor.tokenizer, max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=engine.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=engine.device)
    flat, pixels = [image for images in pictures for image in images], None
    if flat:
        pixels = engine.processor.image_processor(flat, return_tensors="pt")["pixel_values"].to(engine.device)
    embeds, expanded = engine.model.embed(ids, mask, pixels)
    context = getattr(engine.model.config.text_config, "max_position_embeddings", 2**31)
    for owner, length in zip(owners, expanded.attention_mask.sum(1).tolist()):
        if length > context:
            raise RequestError(owner, f"too long: {length} tokens, and the model's context is {context}")
    return embeds, expanded


def _of_first_tokens(engine: Engine, embeds: Tensor, expanded: Expanded, tokens: list[list[int]]) -> list[list[float]]:
    """Log-probabilities of the given tokens behind each row. Through generate, which numbers positions as each family wants."""
    once = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    config = GenerationConfig(**once, pad_token_id=0)
    logits = engine.model.generate_from(embeds, expanded, defaults=config, generation_config=config).logits[0]
    return [row[which].tolist() for row, which in zip(logits.float().log_softmax(-1).cpu(), tokens)]


def _of_whole_answers(engine: Engine, embeds: Tensor, expanded: Expanded, tails: list[list[int]]) -> list[list[float]]:
    """Mean log-probability of each row's last tokens, which `tails` are."""
    positions = (expanded.attention_mask.cumsum(1) - 1).clamp(min=0)
    keep = max(map(len, tails)) + 1
    logits = engine.model.language_model(
        inputs_embeds=embeds,
        attention_mask=expanded.attention_mask,
        position_ids=positions,
        logits_to_keep=keep,
        use_cache=False,
    ).logits
    means = []
    for row, tail in zip(logits, tails):
        row = row[-len(tail) - 1 : -1].float().log_softmax(-1)
        means.append([float(row[torch.arange(len(tail)), torch.tensor(tail)].mean())])
    return means
