"""Batches of rows that are about equally long: less padding where samples are not packed, ranks that wait less for each other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from llava_drip.instruct.data import ConversationDataset, images_of


def rough_lengths(dataset: ConversationDataset) -> list[int]:
    """Positions of each row by words and visual tokens, as LLaVA estimates them: to tokenize 665,000 rows would take long."""
    return [
        sum(len(turn["value"].split()) for turn in record["conversations"])
        + len(images_of(record)) * dataset.image_tokens
        for record in dataset.records
    ]


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """transformers' sampler, whose order follows from the seed and the epoch: the same on all ranks, and after a resumption."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        """batch_size: rows of an optimizer's step, over all ranks."""
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + 1_000_003 * self.epoch)
        return super().__iter__()
