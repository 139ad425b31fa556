"""From a waiting request to a row that the batch can take: pictures through the tower, embeddings, what chooses its tokens."""

from __future__ import annotations

import time
from itertools import islice

import torch
from transformers import LogitsProcessorList, StopStringCriteria

from llava_drip.scheduling.features import FeatureCache, splice
from llava_drip.scheduling.generate import logits_processors
from llava_drip.scheduling.row import Row

MOST_KEPT = 64  # of different settings
IMAGES_A_STEP = 16


class Pace:
    """How much of something fits into a step, by what it took lately: a step is to end soon, on any machine."""

    def __init__(self, least: int, most: int, seconds: float = 0.4):
        self.least, self.most, self.seconds = least, most, seconds
        self.each: float | None = None  # seconds

    @property
    def amount(self) -> int:
        if self.each is None:
            return self.most
        return max(self.least, min(self.most, int(self.seconds / self.each)))

    def took(self, amount: int, seconds: float) -> None:
        if amount:
            each = seconds / amount
            self.each = each if self.each is None else 0.7 * self.each + 0.3 * each


def synchronize(device: torch.device) -> None:
    """Waits for a GPU, which otherwise would still have to do what a clock is to tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Preparer:
    """Makes rows ready on the worker's thread. What goes wrong is raised, and says something about the row at hand."""

    def __init__(self, model, tokenizer, image_bytes: int):
        self.model, self.tokenizer = model, tokenizer
        self.context = getattr(model.config.text_config, "max_position_embeddings", 2**31)
        self.features = FeatureCache(model, image_bytes)
        self.images = Pace(1, IMAGES_A_STEP)
        self.images.each = self.images.seconds / 4  # to begin with: a large tower on a CPU takes a second for each
        self.made: dict[tuple, tuple[LogitsProcessorList, StopStringCriteria | None]] = {}

    def encode(self, rows: list[Row]) -> None:
        """The pictures of the first rows, or of more, as many as one step takes."""
        count, some = 0, []
        for row in rows:
            count += len(row.request.pixels)
            if some and count > self.images.amount:
                break
            some.append(row)
        started, before = time.perf_counter(), self.features.misses
        for row in some:
            row.started = row.started or started
        found = iter(self.features.tokens([picture for row in some for picture in row.pictures]))
        synchronize(self.model.device)
        self.images.took(self.features.misses - before, time.perf_counter() - started)
        for row in some:
            row.encoded(list(islice(found, len(row.request.pixels))))
            row.pause()

    def prepare(self, row: Row) -> None:
        """The prompt's embeddings, for a row whose pictures are encoded. ValueError: the conversation is too long."""
        tokens = [values for _, values in row.visual]
        row.prepared(*splice(self.model, row.request.ids, tokens))
        row.begin(self.context)
        generation = row.generation
        key = (repr(vars(generation)), repr(row.own_stop_strings), row.prompt_length if generation.min_length else 0)
        if key not in self.made:
            if len(self.made) >= MOST_KEPT:
                self.made.clear()
            # The checkpoint's stop strings may name special tokens, that are no text.
            strings = StopStringCriteria(self.tokenizer, row.own_stop_strings) if row.own_stop_strings else None
            self.made[key] = logits_processors(self.model, row), strings
        row.processors, row.strings = self.made[key]
