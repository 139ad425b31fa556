"""What transformers' generate does for us: prepared logits; and whole replies, where requests cannot share a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from llava_drip.assistant.expand import Expanded
from llava_drip.scheduling.requests import Finish
from llava_drip.scheduling.row import Row


def prompt_of(row: Row) -> tuple[Tensor, Expanded]:
    """A row's prompt as the assistant's generate_from takes it."""
    ids = torch.from_numpy(row.sequence.ids)[None].to(row.device)
    return row.embeds[None], Expanded(ids, torch.ones_like(ids), None, torch.zeros_like(ids, dtype=torch.bool))


def logits_processors(model, row: Row) -> LogitsProcessorList:
    """Penalties, temperature and so on, in the order and with the defaults of generate, which makes them and stops there."""
    found = []

    def prepared(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        found.append(logits_processor)
        return input_ids

    settings = row.generation
    model.generate_from(*prompt_of(row), defaults=settings, generation_config=settings, custom_generate=prepared)
    return found[0]


class _EachToken(StoppingCriteria):
    """Calls back with every token of the one row; an answer ends it."""

    def __init__(self, tell: Callable[[int], Finish | None]):
        self.tell, self.finish = tell, None

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        self.finish = self.tell(int(input_ids[0, -1]))
        return torch.full((1,), self.finish is not None, device=input_ids.device)


def generate_alone(model, row: Row, tell: Callable[[int], Finish | None]) -> Finish:
    """One whole reply by generate.

    tell: is called with each token; an answer ends the reply. Returns why it ended.
    """
    if row.generation.do_sample and row.request.seed is not None:
        torch.manual_seed(row.request.seed)
    generation = row.generation
    watch = _EachToken(tell)
    model.generate_from(
        *prompt_of(row),
        defaults=generation,
        generation_config=generation,
        stopping_criteria=StoppingCriteriaList([watch]),
    )
    return watch.finish or "length"
