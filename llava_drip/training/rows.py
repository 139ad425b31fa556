"""Batches of data with an index (image folders, tables of pairs), in an order that any number of ranks share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch.utils.data import Dataset, default_collate, get_worker_info

from llava_drip.training.seeds import kept_randomness, seed_of, seed_sample
from llava_drip.training.skips import Skips, next_good
from llava_drip.training.streams import Batch


def shuffled(rows: int, seed: int) -> Callable[[int], Sequence[int]]:
    """epoch → a permutation of 0 .. rows - 1."""
    return partial(_permutation, rows, seed)  # no inner function: workers that are not forked get it pickled


def _permutation(rows: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed_of(seed, "rows", epoch))).tolist()


class RowBatches(Dataset):
    """Item b is this rank's part of global batch b of the epoch; the ranks' parts follow each other in the global batch."""

    def __init__(
        self,
        load: Callable[[int], object],
        rows: int,
        *,
        order: Callable[[int], Sequence[int]],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        collate: Callable[[list], object] = default_collate,
    ):
        """
        Args:
            load: row → a sample that collates; raises BadSample or ImageError for one to skip. Seeded as in streams.ShardOptions.
            order: epoch → rows, repeats allowed; an incomplete last global batch is left out.
            batch_size: of this rank.
        """
        self.load, self.rows, self.order, self.batch_size, self.seed = load, rows, order, batch_size, seed
        self.rank, self.ranks, self.collate = rank, ranks, collate

    def batches(self, epoch: int) -> list[tuple[int, list[int], int]]:
        """(epoch, rows of this rank, place of the first in the order of all) of each batch; what __getitem__ takes."""
        order, whole = self.order(epoch), self.batch_size * self.ranks
        starts = range(self.rank * self.batch_size, len(order) // whole * whole, whole)
        return [(epoch, list(order[start : start + self.batch_size]), start) for start in starts]

    def count(self, epoch: int) -> int:
        """How many batches the epoch has, of each rank."""
        return len(self.order(epoch)) // (self.batch_size * self.ranks)

    def __getitem__(self, batch: tuple[int, list[int], int]) -> Batch:
        epoch, rows, start = batch
        skips = Skips()
        with kept_randomness() if get_worker_info() is None else contextlib.nullcontext():
            samples = [self._sample(epoch, start + i, row, skips) for i, row in enumerate(rows)]
        return Batch(self.collate(samples), skips=skips)

    def _sample(self, epoch: int, place: int, row: int, skips: Skips) -> object:
        """The row, or, where it cannot be read (counted), the next one that can."""
        before = partial(seed_sample, self.seed, epoch, place)
        return next_good(self.load, row, self.rows, skips, before)[0]


class Batches:
    """A DataLoader's sampler over RowBatches; can begin within an epoch."""

    def __init__(self, dataset: RowBatches):
        self.dataset, self.epoch, self.first = dataset, 0, 0
        self.known: tuple[int, int] | None = None  # the epoch whose length was asked last, its length

    def __iter__(self) -> Iterator[tuple[int, list[int], int]]:
        batches = self.dataset.batches(self.epoch)
        if not batches:
            whole = self.dataset.batch_size * self.dataset.ranks
            raise ValueError(f"the {self.dataset.rows:,} rows of the data do not fill one batch of {whole:,}")
        yield from batches[self.first :]

    def __len__(self) -> int:
        if self.known is None or self.known[0] != self.epoch:
            self.known = (self.epoch, self.dataset.count(self.epoch))
        return self.known[1]
