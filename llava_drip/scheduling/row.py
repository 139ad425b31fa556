"""One request: what it asks for, what it has got, and how it goes on after each token."""

from __future__ import annotations

import copy
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StopStringCriteria

from llava_drip.scheduling.outbox import Outbox
from llava_drip.scheduling.prefixes import Sequence
from llava_drip.scheduling.requests import Finish, StreamEvent, Usage
from llava_drip.scheduling.slots import KeysValues
from llava_drip.scheduling.text import Detokenizer, StopStrings


@dataclass(frozen=True)
class Picture:
    """What the processor made of one: pixels [3, height, width], and the digest that names them."""

    pixels: Tensor
    digest: bytes


@dataclass(frozen=True)
class Request:
    """What a caller asks for, checked, and made ready without the model.

    Attributes:
        ids: [L] int64 on the CPU, one placeholder an image.
        pixels: [3, height, width] of each image, until they are encoded. digests: what names them.
        patches: of all images.
        compression: patches per visual token; None: as the model is set.
        generation: settings of generate with the request's own in them.
        seed: of sampling; None: chance.
        stop: strings that end the reply and are cut off.
        cancels: any of them, once set, ends the reply.
        deadline: time.perf_counter() at which it is over.
    """

    ids: Tensor
    pixels: list[Tensor]
    digests: list[bytes]
    patches: int
    compression: float | None
    generation: GenerationConfig
    seed: int | None
    stop: tuple[str, ...]
    cancels: list[threading.Event]
    deadline: float
    created: float = field(default_factory=time.perf_counter)

    @property
    def over(self) -> Finish | None:
        """Why the reply must end now, if it must."""
        if any(cancel.is_set() for cancel in self.cancels):
            return "cancelled"
        return "timeout" if time.perf_counter() > self.deadline else None


class Row:
    """A request in work. The worker alone changes it, but for `outbox`, from which the caller reads.

    Attributes:
        outbox: of StreamEvents, or the exception that ends it.
        visual: key and tokens of each picture, None before they are encoded.
        embeds: [L, D] of the prompt, None before that.
        sequence: what the prompt reads as.
        length: tokens that the model has read: of the prompt, then also of the reply.
        kept: keys and values to start from, and so many tokens of them; None once they are in a slot.
        quantum: tokens written since it got its slot; or, while its prompt is read, what reading it is worth in such.
        parked: it had a slot, and gave it up to others.
        started: perf_counter at the start of the work, moved on by what it waits for a slot before its first token.
    """

    def __init__(self, request: Request, tokenizer):
        self.request, self.outbox = request, Outbox()
        self.visual: list[tuple[tuple, Tensor]] | None = None
        self.embeds: Tensor | None = None
        self.sequence: Sequence | None = None
        self.length, self.quantum, self.parked = 0, 0.0, False
        self.kept: KeysValues | None = None
        self.tokens: list[int] = []
        self.started: float | None = None
        self.paused: float | None = None  # since when it waits for a slot
        self.first: float | None = None
        self.usage = Usage(0, request.patches, 0)
        self.generation = copy.copy(request.generation)  # generate's own search for stop strings is not used
        self.own_stop_strings, self.generation.stop_strings = self.generation.stop_strings, None
        eos = self.generation.eos_token_id
        self.eos = {eos} if isinstance(eos, int) else set(eos or ())
        self.text, self.stops = Detokenizer(tokenizer), StopStrings(request.stop)
        self.processors = LogitsProcessorList()
        self.strings: StopStringCriteria | None = None
        self.generator: torch.Generator | None = None

    @property
    def pictures(self) -> list[tuple[bytes, Tensor, float | None]]:
        """What FeatureCache.tokens wants."""
        request = self.request
        return [(name, pixels, request.compression) for name, pixels in zip(request.digests, request.pixels)]

    @property
    def prompt_length(self) -> int:
        return len(self.sequence.ids)

    @property
    def reserved(self) -> int:
        """Tokens that it may come to."""
        return self.prompt_length + self.budget

    @property
    def prefilled(self) -> bool:
        return self.length >= self.prompt_length

    def prepared(self, embeds: Tensor, ids: np.ndarray, is_image: np.ndarray) -> None:
        """embeds: [L, D]; ids: [L] int64; is_image: [L] bool."""
        places, start = np.flatnonzero(is_image), 0
        where = []
        for key, tokens in self.visual:
            where.append((int(places[start]), len(tokens), key))
            start += len(tokens)
        self.visual = []  # in embeds now
        self.embeds, self.device = embeds, embeds.device
        self.sequence = Sequence(ids, tuple(where))
        self.usage = Usage(len(places), self.request.patches, len(ids))

    def begin(self, context: int) -> None:
        """The work starts. ValueError: the conversation is too long for the model's context."""
        if self.prompt_length >= context:
            raise ValueError(too_long(self.usage, context))
        self.budget = min(self.generation.max_new_tokens, context - self.prompt_length)
        self.generation.max_new_tokens = self.budget
        if self.generation.do_sample:
            self.generator = torch.Generator(self.device)
            if self.request.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.request.seed)

    def encoded(self, visual: list[tuple[tuple, Tensor]]) -> None:
        """visual: as the attribute. The pixels are let go."""
        self.visual = visual
        self.request.pixels.clear()

    def pause(self) -> None:
        """It is worked on no more until `go_on`; before its first token that is waiting."""
        if self.first is None:
            self.paused = time.perf_counter()

    def go_on(self) -> None:
        if self.paused is not None:
            self.started += time.perf_counter() - self.paused
            self.paused = None

    @property
    def plain_greedy(self) -> bool:
        """Whether the next token is simply the likeliest."""
        return self.generator is None and not self.processors

    def push(self, token: int) -> tuple[list[StreamEvent], Finish | None]:
        """One more token: what there is to tell, and whether the reply ends with it."""
        self.tokens.append(token)
        self.quantum += 1
        if self.first is None:
            self.first = time.perf_counter()
        text = self.stops.push(self.text.push(token))
        finish = None
        if self.stops.found or token in self.eos or self._wrote_a_stop_string():
            finish = "stop"
        elif len(self.tokens) >= self.budget:
            finish = "length"
        return ([StreamEvent(text, self.usage_now())] if text else []), finish

    def end(self, finish: Finish) -> list[StreamEvent]:
        """The last events: text that was held back, and why it ended."""
        text = self.stops.push(self.text.end()) + self.stops.end()
        if self.stops.found and finish == "length":  # found in what was held back
            finish = "stop"
        events = [StreamEvent(text, self.usage_now())] if text else []
        return [*events, StreamEvent("", self.usage_now(finish))]

    def _wrote_a_stop_string(self) -> bool:
        if self.strings is None:
            return False
        written = torch.tensor([self.tokens], dtype=torch.int64, device=self.device)
        return bool(self.strings(written, None))

    def usage_now(self, finish: Finish | None = None) -> Usage:
        now, started, paused = time.perf_counter(), self.started, self.paused  # once: the worker changes them meanwhile
        if paused is not None:
            started += now - paused
        base = self.usage
        return Usage(
            base.visual_tokens,
            base.patches,
            base.prompt_tokens,
            len(self.tokens),
            None if self.first is None else 1000 * (self.first - started),
            0.0 if started is None else 1000 * (now - started),
            finish,
            base.cached_tokens,
            1000 * ((now if started is None else started) - self.request.created),
        )


def too_long(usage: Usage, context: int) -> str:
    return (
        f"the conversation is too long: {usage.prompt_tokens} tokens, {usage.visual_tokens} of them visual, "
        f"and the model's context is {context}; start a new one, or use fewer images"
    )
